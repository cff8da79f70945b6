"""Small family, 2 M activated: a mixture of experts, no memory.

Command: `python train.py moe_2m`.
Cost: 8.6 M parameters, 1.6 M activated besides the vocabulary.
Expect: not trained by us yet.
"""

from configs._small import small_config

config = small_config("moe", "2m")
