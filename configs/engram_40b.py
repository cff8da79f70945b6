"""Engram-40B of the paper: Engram-27B with 18.5 B parameters of memory.

Command: `python train.py engram_40b --distributed --data.sources PATHS --data.tokenizer FILE`.
Cost: 39.5 B parameters, 3.8 B activated; docs/scale.md has the costs of a step on a v5p:4x8x8.
Expect: not trained by us.
"""

from configs._paper import paper_config

config = paper_config("engram_40b", experts=55, rows_per_head=7_239_680)
