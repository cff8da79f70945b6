"""The paper's figures at our scale, and their controls: one file a figure, on `sweep.py`."""

import os

# Before JAX is imported.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", ".cache/xla")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share a GPU
