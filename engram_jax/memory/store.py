"""Tables outside the device: the rows that training has changed, in host memory or in a file.

Which rows a step needs depends on its tokens only, so the host knows them before the device needs
them. A store keeps the records of one layer that were ever written, in *slots* in the order of
their first write, and an index from places to slots. All other rows have their initial values:
computed ones (`initial_rows`), or those of another checkpoint (`StartTable`). So memory and file
grow with the rows that training touches, not with the table.

The file of a store is a sparse mapping of full size. Its disk space is allocated in extents before
slots in them are written: a write through a mapping into a hole on a full disk would kill the
process.
"""

import mmap
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Int32, UInt32

from engram_jax.errors import InputError
from engram_jax.memory.initial_rows import initial_values
from engram_jax.memory.layout import RecordLayout
from engram_jax.memory.mapped_rows import RowReads, is_truncated, prefetch

type Placement = Literal["device", "host", "file"]

EXTENT = 64 << 20  # bytes of a file that are allocated together
PART = 1 << 16  # slots that are copied or compared together
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # Python 3.12 has no name for it


@dataclass(frozen=True)
class StartTable:
    """A table of another checkpoint, whose rows are the initial ones.

    Attributes:
        folder: the checkpoint, as this process names it.
        fingerprint: of the table.
    """

    folder: str = field(compare=False)
    fingerprint: str


@dataclass(frozen=True)
class TableInfo:
    """A table that exists without being written.

    Attributes:
        layer: layer id.
        rows: padded rows R.
        layout: layout of a record.
        seed: seed of the initial rows.
        scale: standard deviation of the initial rows.
        hash: fingerprint of the hash.
        start: the table whose rows are the initial ones; None: they are computed (`initial_rows`).
    """

    layer: int
    rows: int
    layout: RecordLayout
    seed: int
    scale: float
    hash: str
    start: StartTable | None = None

    def initial_records(self, places: Int32[np.ndarray, "n"]) -> UInt32[np.ndarray, "n words"]:
        """The computed records of rows that were never written, for a table without `start`."""
        values = initial_values(
            places, self.layout.width, seed=self.seed, layer=self.layer, scale=self.scale
        )
        return new_records(self.layout, values)

    def as_json(self) -> dict[str, Any]:
        """All fields as plain JSON."""
        return asdict(self)


@runtime_checkable
class StartRows(Protocol):
    """The rows of `TableInfo.start`."""

    def read(self, places: Int32[np.ndarray, "n"]) -> UInt32[np.ndarray, "n words"]:
        """The records of places.

        Raises:
            InputError: there are numbers that are not finite.
        """
        ...

    def check_complete(self) -> None:
        """Checks that the files still have their size.

        Raises:
            InputError: another program has truncated one.
        """
        ...


def new_records(
    layout: RecordLayout, values: Float32[np.ndarray, "n F"]
) -> UInt32[np.ndarray, "n words"]:
    """Records with these embeddings, without moments."""
    records, columns = np.zeros((len(values), layout.words), np.uint32), layout.columns[0]
    if layout.storage.value == "float32":
        records[:, columns] = values.view(np.uint32)
    else:
        halves = values.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32)
        words = columns.stop - columns.start
        records[:, columns] = halves[:, :words]
        records[:, : layout.width - words] |= halves[:, words:] << 16
    return records


class Written(NamedTuple):
    """Rows of a store, in the order of their first write.

    Attributes:
        places: places in the complete table.
        records: their records.
    """

    places: Int32[np.ndarray, "n"]
    records: UInt32[np.ndarray, "n words"]

    def parts(self) -> Iterator["Written"]:
        """The same rows, `PART` at a time."""
        for start in range(0, len(self.places), PART):
            yield Written(*(array[start : start + PART] for array in self))


class RowStore:
    """The written rows of a contiguous part of a table.

    Args:
        table: the table.
        first: first place of the part.
        count: number of places.
        folder: where the file of the records is created; None: host memory.

    Raises:
        InputError: the file cannot be created, or the system refuses a mapping of this size.
    """

    def __init__(
        self, table: TableInfo, first: int, count: int, folder: Path | None = None
    ) -> None:
        self.first, self.count, self.used = first, count, 0  # used: slots
        self.set_initial(table)
        words = table.layout.words
        self._slot = _reserve(count, 1, None).reshape(-1).view(np.int32)  # of a place; 0: none
        self._place = _reserve(count, 1, None).reshape(-1).view(np.int32)  # of a slot
        self._file = None if folder is None else _Extents(folder, 4 * words * count)
        self._records = _reserve(count, words, self._file)
        self._in_file, self._reads = folder is not None, RowReads()
        self._adopted: Path | None = None
        self._failed: InputError | None = None
        self.compared = 0  # rows that programs have read, and that were found to be right
        self._whole = self._records.view(np.dtype((np.void, 4 * words)))[:, 0]  # moved as one

    def set_initial(self, table: TableInfo, start: StartRows | None = None) -> None:
        """Sets what the rows are before they are written. No row may be written yet.

        Args:
            table: the table.
            start: the rows of `table.start`, if it has one.
        """
        assert not self.used and (table.start is None) == (start is None)
        self.table, self._start = table, start
        self._initial = table.initial_records if start is None else start.read

    @property
    def slots(self) -> Int32[np.ndarray, "places"]:
        """The slot of every place, from 1; 0: never written."""
        return self._slot

    @property
    def records(self) -> UInt32[np.ndarray, "slots words"]:
        """The records by slot; those of slots that are not used are zeros."""
        return self._records

    @property
    def in_file(self) -> bool:
        """Whether the records are in a file."""
        return self._in_file

    def close(self) -> None:
        """Closes the file, which ends when nothing refers to its rows any more."""
        if self._file is not None:
            self._file.file.close()

    def check_complete(self) -> None:
        """Checks that files that the rows are read from still have their size, before a read.

        Rows that are mapped and no longer in the file would end the process (SIGBUS).

        Raises:
            InputError: another program has truncated a file; or a read for a compiled program,
                which cannot raise, has failed since, or had another result than the store has.
        """
        if self._adopted is not None and is_truncated(self._records):
            raise InputError(
                f"{self._adopted} was truncated while its rows were in use; restore another "
                "checkpoint."
            )
        if self._start is not None:
            self._start.check_complete()
        if self._failed is not None:
            raise self._failed

    def read_for_program(
        self, places: Int32[np.ndarray, "n"], out: UInt32[np.ndarray, "n words"]
    ) -> None:
        """Like `read`; if it fails, `out` is zeros, and `check_complete` raises from then on."""
        try:
            self.read(places, out)
        except InputError as error:
            out[...], self._failed = 0, error

    def fail(self, sentence: str) -> None:
        """Lets `check_complete` raise from now on, for a callback, which cannot. The first counts.

        (Rows that could not be read are zeros, and so differ, too.)
        """
        self._failed = self._failed or InputError(sentence)

    @property
    def bytes(self) -> int:
        """Bytes of the written records, and of their places."""
        return self.used * 4 * (self.table.layout.words + 1)

    def read(self, places: Int32[np.ndarray, "n"], out: UInt32[np.ndarray, "n words"]) -> None:
        """Copies the records of places to `out`; initial ones for rows that were never written.

        Raises:
            InputError: the file of the rows was truncated, or a row of another checkpoint has
                numbers that are not finite.
        """
        self.check_complete()
        slots = self._slot[places - self.first]
        if self.used:
            self._copy(np.maximum(slots, 1) - 1, out)
        missing = np.flatnonzero(slots == 0)
        if len(missing):
            out[missing] = self._initial(places[missing])

    def _copy(self, slots: Int32[np.ndarray, "n"], out: UInt32[np.ndarray, "n words"]) -> None:
        if not self._in_file:
            np.take(self._records, slots, axis=0, out=out, mode="clip")
            return

        def ask(part: slice) -> None:
            prefetch(self._records, slots[part])

        for part in self._reads.parts(len(slots), ask):
            np.take(self._records, slots[part], axis=0, out=out[part], mode="clip")

    def write(self, places: Int32[np.ndarray, "n"], records: UInt32[np.ndarray, "n words"]) -> None:
        """Writes the records of distinct places.

        Raises:
            InputError: the disk is full.
        """
        own = places - self.first
        if len(own) and not (own.min() >= 0 and own.max() < self.count):
            raise ValueError("places of another part of the table")
        slots = self._slot[own]
        new = np.flatnonzero(slots == 0)
        if len(new):
            used = self.used + len(new)
            if self._file is not None:
                self._file.allocate(used * records[0].nbytes)
            slots[new] = np.arange(self.used + 1, used + 1, dtype=np.int32)
            self._place[self.used : used] = places[new]
            self._slot[own[new]] = slots[new]
            self.used = used
        whole = np.ascontiguousarray(records).view(self._whole.dtype)[:, 0]
        self._whole[slots - 1] = whole

    def adopt(self, path: Path, written: Written) -> None:
        """Takes over the mapped rows of a file where they are. Then the store can only be read."""
        if not len(written.places):
            return
        self._adopted = path
        self._slot[written.places - self.first] = np.arange(1, len(written.places) + 1)
        self._place, self._records, self.used = written.places, written.records, len(written.places)
        self._in_file = True

    def write_own(self, rows: Written) -> None:
        """Writes those of some rows that are in this part of the table."""
        own = (rows.places >= self.first) & (rows.places < self.first + self.count)
        self.write(rows.places[own], rows.records[own])

    def written(self) -> Iterator[Written]:
        """All written rows, in parts, without a copy."""
        return Written(self._place[: self.used], self._records[: self.used]).parts()

    def write_changed(self, start: int, records: UInt32[np.ndarray, "n words"]) -> None:
        """Writes those of consecutive records that differ from the initial ones.

        Args:
            start: place of the first record.
            records: records of places of this part.
        """
        for begin in range(0, len(records), PART):
            part = records[begin : begin + PART]
            places = np.arange(start + begin, start + begin + len(part), dtype=np.int32)
            changed = np.any(part != self._initial(places), axis=1)
            self.write(places[changed], part[changed])


type Stores = Mapping[int, RowStore]  # by layer id; empty: the tables are on the devices


class _Extents:
    """A sparse file of full size without a name, whose disk space is allocated in extents.

    It ends with the process: checkpoints have all that is in it.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size, self._allocated = folder, size, 0
        if not hasattr(os, "posix_fallocate"):
            raise InputError(
                "Tables in a file need posix_fallocate, which this system does not have; keep them "
                "in host memory."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # `RowStore.close`
            try:
                self.file.truncate(size)
            except OSError:
                self.file.close()
                raise
        except OSError as error:
            raise InputError(
                f"Cannot create a file of {size:,} bytes for a table in {folder} "
                f"({error.strerror}); give write permission, or keep tables in host memory."
            ) from error

    def map(self) -> mmap.mmap:
        mapping = mmap.mmap(self.file.fileno(), self._size)
        mapping.madvise(mmap.MADV_RANDOM)
        return mapping

    def allocate(self, size: int) -> None:
        """Allocates disk space for the first `size` bytes.

        Raises:
            InputError: the disk is full.
        """
        while self._allocated < size:
            length = min(EXTENT, self._size - self._allocated)
            try:
                os.posix_fallocate(self.file.fileno(), self._allocated, length)
            except OSError as error:
                raise InputError(
                    f"Cannot extend the file of a table in {self._folder} to "
                    f"{self._allocated + length:,} bytes ({error.strerror}); free some space, and "
                    "start again to continue from the newest checkpoint."
                ) from error
            self._allocated += length


def _reserve(rows: int, words: int, file: _Extents | None) -> UInt32[np.ndarray, "{rows} {words}"]:
    """An array of zeros in a mapping. Memory (or disk) is used only for what is written.

    Raises:
        InputError: the system refuses a mapping of this size.
    """
    size = 4 * rows * words
    try:
        if file is not None:
            mapping = file.map()
        else:
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
            mapping = mmap.mmap(-1, size, flags=private)
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"The system does not map a table of {size:,} bytes ({error}); choose fewer "
            "memory.rows-per-head."
        ) from error
    return np.frombuffer(mapping, np.uint32).reshape(rows, words)
