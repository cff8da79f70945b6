"""JAX for all tests: the CPU as eight devices, strict about ranks, with a compilation cache."""

import os
from pathlib import Path

# Through the environment as well as the config, for the programs that tests start: those run on one
# CPU device, unless they ask for more.
CACHE = Path(__file__).parent.parent / ".cache" / "xla"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax  # noqa: E402

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
