"""Small family, 2 M activated: dense feed-forward layers, no memory.

Command: `python train.py dense_2m`.
Cost: 2.6 M parameters, 1.6 M activated besides the vocabulary.
Expect: not trained by us yet.
"""

from configs._small import small_config

config = small_config("dense", "2m")
