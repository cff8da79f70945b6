"""Engram-27B of the paper: MoE-27B with 17 experts fewer and 5.8 B parameters of memory.

Command: `python train.py engram_27b --distributed --data.sources PATHS --data.tokenizer FILE`.
Cost: 26.7 B parameters, 3.8 B activated; docs/scale.md has the costs of a step on a v5p:4x8x8.
Expect: not trained by us.
"""

from configs._paper import paper_config

config = paper_config("engram_27b", experts=55, rows_per_head=2_262_400)
