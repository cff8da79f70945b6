"""The baseline of the default run: the same tables, averaged into the input embedding.

Command: `python train.py over_encoding`.
"""

from engram_jax.config import Config, MemoryConfig

config = Config(name="over_encoding", memory=MemoryConfig(layers=(0,), fusion="over_encoding"))
