"""Small family, 100 M activated: a mixture of experts and OverEncoding, the paper's baseline.

Command: `python train.py over_encoding_100m`.
Cost: 587 M parameters, 117 M of them in the table; 114 M activated besides the vocabulary.
Expect: not trained by us yet.
"""

from configs._small import small_config

config = small_config("over_encoding", "100m")
