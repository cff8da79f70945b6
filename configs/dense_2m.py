"""Small family, 2 M activated: dense feed-forward layers, no memory.

Command: `python train.py dense_2m --train.steps 500`.
Cost: 2.6 M parameters, 1.6 M activated besides the vocabulary.
Expect: held-out loss on prose 5.216 ± 0.005 nats per token; five minutes on two CPU cores.
"""

from configs._small import small_config

config = small_config("dense", "2m")
