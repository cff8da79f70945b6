"""The axis letters of this project's annotations. Einsums use them in lower case, and may add more.

| letter | axis                              | letter | axis                                     |
|--------|-----------------------------------|--------|------------------------------------------|
| B      | batch (rows of one micro-batch)   | H      | hash columns = (N−1)·K, order-major      |
| T      | time (tokens)                     | R      | rows of one layer's table, padded        |
| D      | model width                       | F      | width of one row of a table              |
| M      | residual branches (1 = plain)     | E      | memory width = H·F                       |
| N      | largest n-gram order              | U      | distinct rows a device asks for (bound)  |
| K      | hash heads per order              | G      | n-grams hashed together                  |
| V      | tokenizer vocabulary              | L      | memory layers                            |
| A      | micro-batches of a step           | S      | table shards                             |
| Q      | query heads of attention          | J      | key/value heads of attention             |
| P      | width of one attention head       | X      | experts                                  |
| C      | rows that two devices exchange    | W      | width of a feed-forward layer            |
| Y      | width of attention's latent       | Z      | rotated width of a latent head           |
| O      | width of a head's value           | I      | width of compressed queries              |
"""

from typing import Any

type PyTree = Any
type Parameters = dict[str, Any]  # nested dicts of arrays; names are those of the modules
