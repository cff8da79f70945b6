"""Where rows stand in a table, and how many of them two devices exchange at once. Pure NumPy.

A row's place is not its row number: places are dealt so that every head is spread evenly over all
devices, however many they are. (Of 64 devices, a contiguous split of the concatenated heads gives
the fullest 1.20 of the mean load, this one 1.02.)
"""

import math

import numpy as np
from jaxtyping import Int32

from engram_jax.hashing import ROW_MULTIPLE


def stored_places(
    row_numbers: Int32[np.ndarray, "*shape"], padded_rows: int
) -> Int32[np.ndarray, "*shape"]:
    """Where rows stand in a table: they are dealt to 4,096 blocks in turn.

    Any power of two up to 4,096 of devices holds whole blocks, hence an equal part of every head.

    Args:
        row_numbers: head offset + hash, below R.
        padded_rows: R, a multiple of 4,096.
    """
    blocks = padded_rows // ROW_MULTIPLE
    return row_numbers % ROW_MULTIPLE * blocks + row_numbers // ROW_MULTIPLE


def exchange_capacity(distinct_rows: int, shards: int) -> int:
    """Rows that one device asks of another in one round of the exchange: 1.25 × mean + 6σ.

    Args:
        distinct_rows: bound U of the distinct rows that a device asks for in all.
        shards: devices S that own rows.
    """
    if shards == 1:
        return distinct_rows
    mean = distinct_rows / shards
    capacity = math.ceil(1.25 * mean + 6 * math.sqrt(mean))
    return min(-(-capacity // 8) * 8, distinct_rows)
