"""MoE-27B of the paper: 72 routed experts, of which a token uses 6, and 2 shared; no memory.

Command: `python train.py moe_27b --distributed --data.sources PATHS --data.tokenizer FILE`.
Cost: 26.7 B parameters, 3.8 B activated; docs/scale.md has the costs of a step on a v5p:4x8x8.
Expect: not trained by us.
"""

from configs._paper import paper_config

config = paper_config("moe_27b", experts=72, rows_per_head=None)
