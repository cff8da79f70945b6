"""A finished table in mapped files: read at its rows, without a copy of the table."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
from jaxtyping import Float, Float32, Int, Shaped

from engram_jax.errors import InputError
from engram_jax.memory.mapped_rows import (
    RowReads,
    is_truncated,
    mapping_of,
    prefetch,
    read_ahead,
)

SCALED = 32  # consecutive numbers of a row that share a scale
_DECODED = 1024  # rows of a part decoded at a time, so that they stay in the cache
_HASHED, _SAMPLED = 1 << 30, 4096  # larger tables have a fingerprint of so many rows


@dataclass(frozen=True, eq=False)
class MappedTable:
    """The rows of a table as a file stores them, in any type, with or without scales.

    A number is the stored number × its scale × `factor`. Only the rows that are read are copied.

    Attributes:
        parts: consecutive rows, [rows, F] each; all have the same number of rows.
        scales: for every part, a factor for each 32 consecutive numbers of a row; None: 1.
        factor: of all numbers.
    """

    parts: tuple[Shaped[np.ndarray, "_ F"], ...]
    scales: tuple[Shaped[np.ndarray, "_ blocks"], ...] | None = None
    factor: float = 1.0
    _reads: tuple[RowReads, RowReads] = field(
        default_factory=lambda: (RowReads(), RowReads()), init=False, repr=False
    )

    @property
    def rows(self) -> int:
        """Stored rows, including padding."""
        return sum(map(len, self.parts))

    @property
    def width(self) -> int:
        """Row width F."""
        return int(self.parts[0].shape[1])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) of types, sizes, and rows: all, or a sample of a large table.

        Raises:
            InputError: another program has truncated a file.
        """
        found = hashlib.sha256(f"{self.rows} {self.width} {self.factor}".encode())
        whole = sum(array.nbytes for array in self.arrays) <= _HASHED
        for array in self._all_rows() if whole else self._sampled_rows():
            found.update(f"{array.dtype}".encode() + array.tobytes())
        return found.hexdigest()[:16]

    def _all_rows(self) -> Iterator[Shaped[np.ndarray, "_ _width"]]:
        read_ahead(*self.arrays)
        for array in self.arrays:
            for start in range(0, len(array), _SAMPLED):
                self._require_complete()
                yield array[start : start + _SAMPLED]
        read_ahead(*self.arrays, random=True)

    def _sampled_rows(self) -> Iterator[Shaped[np.ndarray, "_ _width"]]:
        rows = np.linspace(0, self.rows - 1, _SAMPLED).astype(np.int64)
        self._require_complete()
        yield from (array for array in self.gather(rows) if array is not None)

    def _require_complete(self) -> None:
        if self.is_truncated:
            raise InputError(
                "A file of a memory was truncated while it was read; export or download it again."
            )

    @property
    def is_truncated(self) -> bool:
        """Whether a file has become shorter. Reading its rows may end the process."""
        return any(is_truncated(array) for array in self._one_of_each_map)

    @cached_property
    def _one_of_each_map(self) -> list[Shaped[np.ndarray, "_ _width"]]:
        return list({id(mapping_of(array)): array for array in self.arrays}.values())

    @property
    def arrays(self) -> tuple[Shaped[np.ndarray, "_ _width"], ...]:
        """All mapped arrays."""
        return self.parts + (self.scales or ())

    def gather(
        self, rows: Int[np.ndarray, "n"]
    ) -> tuple[Shaped[np.ndarray, "n F"], Shaped[np.ndarray, "n blocks"] | None]:
        """The stored numbers of rows, and their scales (None without scales), undecoded.

        Raises:
            IndexError: there is no such row.
        """
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.rows):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a table of {self.rows}")
        of_parts, of_scales = self._reads  # rows may be in the page cache, and their scales not
        scales = None if self.scales is None else _take(self.scales, rows, of_scales)
        return _take(self.parts, rows, of_parts), scales

    def read(self, rows: Int[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape F"]:
        """The rows of these numbers in float32; every stored type converts to it exactly."""
        flat = rows.reshape(-1)
        values = np.empty((len(flat), self.width), np.float32)
        together = _DECODED * len(self.parts)
        for start in range(0, len(flat), together):
            part = slice(start, start + together)
            stored, scales = self.gather(flat[part])
            values[part] = _to_float32(stored)
            if scales is not None:
                values[part] *= _to_float32(scales).repeat(SCALED, axis=1)[:, : self.width]
        if self.factor != 1:
            values *= np.float32(self.factor)
        return values.reshape(*rows.shape, self.width)


def _to_float32(numbers: Shaped[np.ndarray, "n width"]) -> Float32[np.ndarray, "n width"]:
    """Numbers in float32. Those of one byte are looked up, in an even width two at a time.

    The lookup takes a third of the time of `astype`, and with two at a time a quarter.
    """
    if numbers.dtype.itemsize > 1:
        return numbers.astype(np.float32)
    count = 1 if numbers.shape[1] % 2 else 2
    values = _values_of_bytes(numbers.dtype, count)
    return np.take(values, numbers.view(f"u{count}"), mode="clip").view(np.float32)


@lru_cache
def _values_of_bytes(dtype: np.dtype, count: int) -> Float[np.ndarray, "_"]:
    """The `count` values in float32, as one number, of all `count` bytes of a type of one byte."""
    every = np.arange(256**count, dtype=f"u{count}")
    return every.view(dtype).astype(np.float32).view(f"f{4 * count}")


def _take(
    parts: tuple[Shaped[np.ndarray, "_ width"], ...], rows: Int[np.ndarray, "n"], reads: RowReads
) -> Shaped[np.ndarray, "n width"]:
    """Rows of consecutive parts. The parts' bytes are moved, whatever their type is."""
    taken = np.empty((len(rows), parts[0].shape[1]), parts[0].dtype)
    if len(parts) == 1:
        [stored], found = parts, taken.view(np.uint8)
        for some in reads.parts(len(rows), lambda some: prefetch(stored, rows[some])):
            np.take(stored.view(np.uint8), rows[some], axis=0, out=found[some], mode="clip")
        return taken
    numbers, within = np.divmod(rows, len(parts[0]))
    order = np.argsort(numbers, kind="stable")
    numbers, within = numbers[order], within[order]

    def ask(some: slice) -> None:
        for part, own in _by_part(numbers[some]):
            prefetch(parts[part], within[some][own])

    for some in reads.parts(len(rows), ask):
        for part, own in _by_part(numbers[some]):
            stored, found = parts[part].view(np.uint8), taken[some][own].view(np.uint8)
            np.take(stored, within[some][own], axis=0, out=found, mode="clip")
    in_order = np.empty_like(taken)
    in_order[order] = taken
    return in_order


def _by_part(numbers: Int[np.ndarray, "n"]) -> Iterator[tuple[int, slice]]:
    """The parts in an ascending array of parts' numbers, and where each one is in it."""
    starts = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()
    for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True):
        yield int(numbers[start]), slice(start, stop)
