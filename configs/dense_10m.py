"""Small family, 10 M activated: dense feed-forward layers, no memory.

Command: `python train.py dense_10m`.
Cost: 10.5 M parameters, 8.4 M activated besides the vocabulary.
Expect: not trained by us yet; 1.5 to 1.9 s a step on two CPU cores.
"""

from configs._small import small_config

config = small_config("dense", "10m")
