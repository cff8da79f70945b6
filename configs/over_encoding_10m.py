"""Small family, 10 M activated: a mixture of experts and OverEncoding, the paper's baseline.

Command: `python train.py over_encoding_10m`.
Cost: 43.7 M parameters, 8.3 M of them in the table; 8.5 M activated besides the vocabulary.
Expect: not trained by us yet; 1.5 to 1.9 s a step on two CPU cores.
"""

from configs._small import small_config

config = small_config("over_encoding", "10m")
