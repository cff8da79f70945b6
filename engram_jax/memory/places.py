"""The places of rows in a table, and the capacity of the exchange. Pure NumPy.

The place of a row differs from its row number. Places are chosen so that every head is distributed
evenly over all devices. (On 64 devices, the fullest has 1.02 of the mean load. With a contiguous
split of the concatenated heads it has 1.20.)
"""

import math

import numpy as np
from jaxtyping import Int32

from engram_jax.hashing import ROW_MULTIPLE


def stored_places(
    row_numbers: Int32[np.ndarray, "*shape"], padded_rows: int
) -> Int32[np.ndarray, "*shape"]:
    """The places of rows in a table. Consecutive rows are in different ones of 4,096 blocks.

    If the number of devices is a power of two up to 4,096, each has the same number of blocks, and
    thus an equal part of every head.

    Args:
        row_numbers: head offset + hash, below R.
        padded_rows: R, a multiple of 4,096.
    """
    blocks = padded_rows // ROW_MULTIPLE
    return row_numbers % ROW_MULTIPLE * blocks + row_numbers // ROW_MULTIPLE


def expected_distinct(reads: int) -> float:
    """How many distinct rows this many reads of text have, at most: Heaps' law.

    Measured on the shipped texts, n-grams of 2 and 3 tokens: at most 0.98 of the rows that 256
    tokens read, 0.88 for 4,096 tokens and 0.79 for 20,480 (docs/experiments.md, 2026-11-29). Other
    text may have more. Then a step needs two rounds of exchange.

    Args:
        reads: tokens × columns.
    """
    return reads * min((reads / 8192) ** -0.06, 1.0)


def exchange_capacity(reads: int, shards: int) -> int:
    """Rows that one device can request from another in one round: 1.05 × mean + 6σ.

    Args:
        reads: bound U of the distinct rows that a device requests from all devices.
        shards: number S of devices.
    """
    if shards == 1:
        return reads
    mean = expected_distinct(reads) / shards
    capacity = math.ceil(1.05 * mean + 6 * math.sqrt(mean))
    return min(-(-capacity // 8) * 8, reads)
