"""Small family, 100 M activated: dense feed-forward layers, no memory.

Command: `python train.py dense_100m`.
Cost: 120 M parameters, 113 M activated besides the vocabulary.
Expect: not trained by us yet.
"""

from configs._small import small_config

config = small_config("dense", "100m")
