"""Small family, 2 M activated: a mixture of experts and Engram.

Command: `python train.py engram_2m`.
Cost: 8.6 M parameters, 1.5 M of them in the table; 1.6 M activated besides the vocabulary.
Expect: not trained by us yet.
"""

from configs._small import small_config

config = small_config("engram", "2m")
