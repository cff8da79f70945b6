"""Storage types of an exported table: float32, bfloat16, and two types with scales."""

from typing import Literal

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Shaped

from engram_jax.errors import InputError
from engram_jax.formats.mapped_table import SCALED

type TableType = Literal["float32", "bfloat16", "float8", "int8"]

STORED: dict[TableType, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8": np.dtype(ml_dtypes.float8_e4m3fn),
    "int8": np.dtype(np.int8),
}
SCALES: dict[TableType, np.dtype] = {
    "float8": np.dtype(ml_dtypes.float8_e8m0fnu),
    "int8": np.dtype(ml_dtypes.bfloat16),
}


def blocks(width: int) -> int:
    """Scales of a row of this width."""
    return -(-width // SCALED)


def quantize(
    rows: Float32[np.ndarray, "n F"], table_type: TableType
) -> tuple[Shaped[np.ndarray, "n F"], Shaped[np.ndarray, "n blocks"] | None]:
    """Rows in a storage type, and a scale for each 32 numbers; None for types without scales.

    Quantizing what `MappedTable.read` gives back results in the same bytes.

    - "float8": e4m3, rounded to nearest. The scale is the smallest power of two with which no
      number is above 464, which still rounds to 448, the largest number of e4m3.
    - "int8": −127…127. The scale is the largest number of the block / 127, rounded to bfloat16.

    Raises:
        InputError: a number is not finite, or from 2¹²⁷ up and could be rounded to infinity.
    """
    if not np.isfinite(rows).all():
        raise InputError("The table has numbers that are not finite; export another checkpoint.")
    if table_type != "float32" and np.abs(rows).max(initial=0) >= 2.0**127:
        raise InputError(f"The table has numbers above 1e38, too large for {table_type}.")
    if table_type not in SCALES:
        return rows.astype(STORED[table_type]), None
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % SCALED)))
    in_blocks = padded.reshape(len(rows), -1, SCALED)
    largest = np.abs(in_blocks).max(axis=2).astype(np.float64)
    if table_type == "float8":
        fraction, exponent = np.frexp(largest / 464)
        exponent = np.clip(exponent - (fraction == 0.5), -127, 127)
        scales = (exponent + 127).astype(np.uint8).view(SCALES[table_type])
        fitted = np.ldexp(in_blocks, -exponent[..., None])
        stored = np.clip(fitted, -448, 448).astype(STORED[table_type])
    else:
        factor = np.where(largest > 0, np.maximum(largest / 127, 2.0**-126), 1)
        scales = factor.astype(SCALES[table_type])
        fitted = np.rint(in_blocks / scales.astype(np.float32)[..., None])
        stored = np.clip(fitted, -127, 127).astype(np.int8)
    scales[(stored == 0).all(axis=2)] = 1  # as for a block of zeros
    return np.ascontiguousarray(stored.reshape(padded.shape)[:, : rows.shape[1]]), scales
