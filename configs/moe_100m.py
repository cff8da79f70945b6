"""Small family, 100 M activated: a mixture of experts, no memory.

Command: `python train.py moe_100m`.
Cost: 587 M parameters, 114 M activated besides the vocabulary.
Expect: not trained by us yet.
"""

from configs._small import small_config

config = small_config("moe", "100m")
