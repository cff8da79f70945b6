"""The dense twin of the default run: the same backbone, tokens and steps, without memory.

Command: `python train.py dense`.
"""

from engram_jax.config import Config, MemoryConfig

config = Config(name="dense", memory=MemoryConfig(layers=()))
