"""Storage types of exported tables."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_jax.errors import InputError
from engram_jax.formats.mapped_table import MappedTable
from engram_jax.formats.quantize import SCALES, STORED, TableType, quantize


def there_and_back(rows: np.ndarray, table_type: TableType) -> np.ndarray:
    stored, scales = quantize(rows, table_type)
    assert stored.dtype == STORED[table_type] and stored.shape == rows.shape
    table = MappedTable((stored,), None if scales is None else (scales,))
    return table.read(np.arange(len(rows)))


def largest_of_block(rows: np.ndarray) -> np.ndarray:
    """The largest absolute number of the 32 numbers that every number belongs to."""
    largest = np.empty_like(rows)
    for start in range(0, rows.shape[1], 32):
        block = slice(start, start + 32)
        largest[:, block] = np.abs(rows[:, block]).max(axis=1, keepdims=True)
    return largest


@settings(max_examples=60)
@given(
    st.integers(1, 70),
    st.sampled_from([*STORED]),
    st.integers(-30, 30),
    st.integers(0, 2**31),
    st.sampled_from([0.5, 1, 232, 464, 448, 0]),
)
def test_errors_are_bounded_and_bytes_are_stable(
    width: int, table_type: TableType, magnitude: int, seed: int, special: float
) -> None:
    """`special` numbers lie between two scales of e4m3."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(20, width)) * 10.0 ** (magnitude + generator.integers(-3, 4))
    rows[:5] = np.clip(generator.integers(-1, 2, (5, width)) * special, -special, special)
    rows[5] = 0
    rows = rows.astype(np.float32)
    found = there_and_back(rows, table_type)
    largest = largest_of_block(rows)
    bound = {
        "float32": 0 * largest,
        "bfloat16": np.abs(rows) * 2.0**-8,
        # Half a unit of three bits after the leading one; 2⁻¹⁰ of the scale near zero.
        "float8": np.maximum(np.abs(rows) * 2.0**-4, largest * (2.0**-10 / 232)),
        # Half a unit of 1/127; rounding the scale to bfloat16 can cut off as much.
        "int8": largest * (0.5 / 127) * 1.01,
    }[table_type]
    assert (np.abs(found - rows) <= bound).all()
    once, again = quantize(rows, table_type), quantize(found, table_type)
    for one, other in zip(once, again, strict=True):
        assert one is other is None or one.tobytes() == other.tobytes()


@pytest.mark.parametrize("table_type", SCALES)
def test_blocks_that_round_to_zeros_are_those_of_zeros(table_type: TableType) -> None:
    tiny = np.array([[1e-42], [-5e-42], [0]], np.float32)
    stored, scales = quantize(tiny, table_type)
    assert not stored.astype(np.float32).any() and (scales == 1).all()


@pytest.mark.parametrize("table_type", sorted({*STORED} - {"float32"}))
def test_numbers_that_would_round_to_infinity_are_refused(table_type: TableType) -> None:
    with pytest.raises(InputError, match="above 1e38"):
        quantize(np.array([[1, -3.4e38]], np.float32), table_type)
    assert np.isfinite(there_and_back(np.array([[1, -1.7e38]], np.float32), table_type)).all()


def test_scales_of_float8_are_the_smallest_possible() -> None:
    """The largest number of a block is stored as 240 to 448."""
    generator = np.random.default_rng(0)
    rows = (generator.normal(size=(500, 64)) * 10.0 ** generator.integers(-9, 9, (500, 1))).astype(
        np.float32
    )
    stored, _ = quantize(rows, "float8")
    largest = largest_of_block(stored.astype(np.float32))
    assert largest.min() >= 240 and largest.max() == 448


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(wrong: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        quantize(np.full((1, 3), wrong, np.float32), "int8")


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("table_type", SCALES)
def test_every_byte_is_read_exactly(width: int, table_type: TableType) -> None:
    unit = np.dtype(f"u{width}")
    stored = np.arange(256**width, dtype=unit).view(STORED[table_type]).reshape(-1, width)
    read = MappedTable((stored,)).read(np.arange(len(stored)))
    assert np.array_equal(read, stored.astype(np.float32), equal_nan=True)
