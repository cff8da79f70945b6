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

    If the number of devices is a power of two up to 4,096, each has the same number of blocks. So
    it has an equal part of every head up to one row per block: of 8 devices, the fullest has 1.004
    times the mean of a head of 200,003 rows, and 1.33 times that of 9,221.

    Args:
        row_numbers: head offset + hash, below R.
        padded_rows: R, a multiple of 4,096.
    """
    block = padded_rows // ROW_MULTIPLE  # rows of one
    return row_numbers % ROW_MULTIPLE * block + row_numbers // ROW_MULTIPLE


def row_numbers(
    places: Int32[np.ndarray, "*shape"], padded_rows: int
) -> Int32[np.ndarray, "*shape"]:
    """The row numbers of places: the inverse of `stored_places`."""
    block = padded_rows // ROW_MULTIPLE  # rows of one
    return places % block * ROW_MULTIPLE + places // block


def expected_distinct(reads: int) -> float:
    """A bound of the distinct rows among this many reads of text: Heaps' law.

    The share of distinct rows among the reads falls with the length of the text. Measured on the
    shipped texts with the default tokenizer of 8,192 ids, the largest of all sources: 0.88 for
    4,096 tokens and 0.79 for 20,480 with 16 columns (n-grams of up to 3 tokens), 0.91 and 0.85 with
    24 columns (up to 4 tokens); docs/experiments.md, 2026-11-29. For these four cases, the bound is
    0.94, 0.90, 0.93 and 0.88. Text that exceeds the bound by more than the margin of
    `exchange_capacity` needs a second round of exchange.

    Args:
        reads: tokens × columns.
    """
    return reads * min((reads / 8192) ** -0.03, 1.0)


def exchange_capacity(bound: int, shards: int, owned: int) -> int:
    """Rows that one device can request from another in one round: 1.05 × mean + 6σ.

    Args:
        bound: bound U of the distinct rows that a device requests from all devices: its reads, or
            all rows of a small table.
        shards: number S of devices.
        owned: rows that each device owns, R / S.
    """
    if shards == 1 or bound >= owned * shards:
        return min(bound, owned)
    mean = expected_distinct(bound) / shards
    capacity = math.ceil(1.05 * mean + 6 * math.sqrt(mean))
    return min(-(-capacity // 8) * 8, bound, owned)
