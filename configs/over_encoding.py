"""A baseline for the default run: the same tables, averaged with the input embedding.

Command: `python train.py over_encoding`.
Cost: the same as the default run.
Expect: held-out loss on prose 4.78 nats per token, 0.19 below `dense`.
"""

from engram_jax.config import Config, MemoryConfig

config = Config(name="over_encoding", memory=MemoryConfig(layers=(0,), fusion="over_encoding"))
