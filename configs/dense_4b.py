"""Dense-4B of the paper: 30 layers of latent attention and feed-forward, no experts, no memory.

Command: `python train.py dense_4b --distributed --data.sources PATHS --data.tokenizer FILE`.
Cost: 4.1 B parameters, 3.8 B activated; docs/scale.md has the costs of a step on a v5p:4x8x8.
Expect: not trained by us.
"""

from configs._paper import paper_config

config = paper_config("dense_4b", experts=None, rows_per_head=None)
