"""The default run: a small Engram model on the five shipped corpora.

Command: `python train.py` (or `make train`).
"""

from engram_jax.config import Config

config = Config()
