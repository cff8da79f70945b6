"""Rows of mapped files, read at random: from the disk, many at the same time.

Without read-ahead (`MADV_RANDOM`), the system reads one page after another, at 8,000 rows/s. If
many rows are asked for first, it is 48,000 (docs/performance.md, "Tables off the device").
"""

import ctypes
import mmap
import time
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Integer, Shaped

TOGETHER = 512  # rows that are asked for together, if they come from the disk
LEAST_TIMED = 16  # fewer rows say nothing about where they come from
COLD = 5e-6  # seconds a row, if it was not asked for: more from the disk, 0.03 to 1 µs from memory
CALLS = 100e-6  # seconds that the calls of a part take, whatever its rows are
JUDGE_EVERY = 8  # of so many parts that are asked for, the next one is timed without asking
_LIBC = ctypes.CDLL(None)


class RowReads:
    """Sees by the time of reads whether the rows of an array, or of arrays, come from the disk."""

    def __init__(self) -> None:
        self._cold, self._asked = False, 0

    def parts(self, count: int, ask: Callable[[slice], object]) -> Iterator[slice]:
        """Parts of the rows to read, of which each is to be read before the next one.

        Args:
            count: number of rows.
            ask: asks the system to read a part of the rows (`prefetch`).
        """
        start = 0
        while start < count:
            part = slice(start, min(start + TOGETHER, count))
            if self._cold and self._asked < JUDGE_EVERY:
                self._asked += 1
                ask(part)
                yield part
            else:
                # Asking takes more time than reading from memory, so it would always look cold.
                if self._cold:
                    part = slice(start, min(start + LEAST_TIMED, count))
                begin = time.perf_counter()
                yield part
                size = part.stop - start
                if size >= LEAST_TIMED:
                    self._cold = time.perf_counter() - begin > CALLS + COLD * size
                self._asked = 0
            start = part.stop


def prefetch(array: Shaped[np.ndarray, "R width"], rows: Integer[np.ndarray, "n"]) -> None:
    """Asks the system to read the pages of some rows of a mapped array, all at the same time."""
    size = array.itemsize * array.shape[1]
    begin = array.ctypes.data + rows.astype(np.int64) * size
    first, last = begin // mmap.PAGESIZE, (begin + size - 1) // mmap.PAGESIZE
    for page, end in set(zip(first.tolist(), (last + 1).tolist(), strict=True)):
        _advise(page, end, mmap.MADV_WILLNEED)


def read_ahead(*arrays: Shaped[np.ndarray, "_ _"], random: bool = False) -> None:
    """Lets the system read mapped arrays ahead, before all rows are read in their order.

    Args:
        arrays: the arrays.
        random: do not read ahead, because rows will be read at random.
    """
    for array in arrays:
        begin, end = array.ctypes.data, array.ctypes.data + array.nbytes
        advice = mmap.MADV_RANDOM if random else mmap.MADV_NORMAL
        _advise(begin // mmap.PAGESIZE, -(-end // mmap.PAGESIZE), advice)


def mapping_of(array: np.ndarray) -> mmap.mmap | None:
    """The map of an array; None: it is not mapped."""
    base = array.base
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, mmap.mmap) else None


def is_truncated(array: np.ndarray) -> bool:
    """Whether the file of a mapped array has become shorter. Reading it may end the process."""
    mapping = mapping_of(array)
    return mapping is not None and mapping.size() < len(mapping)


def _advise(page: int, end: int, advice: int) -> None:
    address, length = page * mmap.PAGESIZE, (end - page) * mmap.PAGESIZE
    _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice)
