"""Small family, 2 M activated: a mixture of experts and Engram.

Command: `python train.py engram_2m`.
Cost: 43.7 M parameters, 8.3 M of them in the table; 8.5 M activated besides the vocabulary.
Expect: not trained by us yet.
"""

from configs._small import small_config

config = small_config("engram", "2m")
