"""Rows of mapped files, read at random: from the disk, many at the same time.

Without read-ahead (`MADV_RANDOM`), the system reads one page after another, at 8,000 rows/s. If
many rows are asked for first, it is 48,000 (docs/performance.md, "Tables off the device").
"""

import ctypes
import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from jaxtyping import Integer, Shaped

TOGETHER = 512  # rows that are asked for together, if they come from the disk
LEAST_TIMED = 16  # fewer rows say nothing about where they come from
COLD = 5e-6  # seconds a row: more from the disk, 2 to 3 µs if memory was asked, 0.3 to 1 if not
_LIBC = ctypes.CDLL(None)


class RowReads:
    """Sees by the time of reads whether rows come from the disk."""

    def __init__(self) -> None:
        self._cold = False

    def parts(
        self, array: Shaped[np.ndarray, "R width"], rows: Integer[np.ndarray, "n"]
    ) -> Iterator[slice]:
        """Parts of `rows`, of which each is to be read before the next one is asked for.

        Args:
            array: a mapped array.
            rows: the rows of it that will be read.
        """
        for start in range(0, len(rows), TOGETHER):
            part = slice(start, min(start + TOGETHER, len(rows)))
            with self._timed(part.stop - start):
                if self._cold:
                    prefetch(array, rows[part])
                yield part

    @contextmanager
    def _timed(self, count: int) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if count >= LEAST_TIMED:
            self._cold = time.perf_counter() - begin > COLD * count


def prefetch(array: Shaped[np.ndarray, "R width"], rows: Integer[np.ndarray, "n"]) -> None:
    """Asks the system to read the pages of some rows, all at the same time."""
    size = array.itemsize * array.shape[1]
    begin = array.ctypes.data + rows.astype(np.int64) * size
    first, last = begin // mmap.PAGESIZE, (begin + size - 1) // mmap.PAGESIZE
    for page, end in set(zip(first.tolist(), (last + 1).tolist(), strict=True)):
        _advise(page, end, mmap.MADV_WILLNEED)


def read_ahead(array: Shaped[np.ndarray, "R width"]) -> None:
    """Lets the system read ahead again, before all rows are read in their order."""
    begin, end = array.ctypes.data, array.ctypes.data + array.nbytes
    _advise(begin // mmap.PAGESIZE, -(-end // mmap.PAGESIZE), mmap.MADV_NORMAL)


def is_truncated(array: np.ndarray) -> bool:
    """Whether the file of a mapped array has become shorter. Reading it may end the process."""
    base = array.base
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return isinstance(base, mmap.mmap) and base.size() < len(base)


def _advise(page: int, end: int, advice: int) -> None:
    address, length = page * mmap.PAGESIZE, (end - page) * mmap.PAGESIZE
    _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice)
