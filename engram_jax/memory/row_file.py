"""The written rows of a store as a file of a checkpoint.

    magic, length of the header (8 bytes), header (JSON), spaces up to a multiple of 64 bytes
    records   uint32 [n, words], in the order of their first write
    places    int32 [n]

The header has the table (layer, rows, layout, seed, scale, hash, start) and n. All numbers are
little-endian.
"""

import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.errors import InputError
from engram_jax.files import parse_json
from engram_jax.memory.layout import RecordLayout, StorageConfig
from engram_jax.memory.store import RowStore, StartTable, TableInfo, Written

MAGIC = b"ENGRAMRW"
ALIGNMENT = 64


def save_rows(store: RowStore, path: Path) -> None:
    """Writes the written rows of a store, and waits until they are on the disk."""
    header = json.dumps({"table": store.table.as_json(), "written": store.used}).encode()
    header = MAGIC + len(header).to_bytes(8, "little") + header
    with path.open("wb") as file:
        file.write(header.ljust(-(-len(header) // ALIGNMENT) * ALIGNMENT))
        for part in store.written():
            file.write(part.records)
        for part in store.written():
            file.write(part.places)
        file.flush()
        os.fsync(file.fileno())


def map_rows(path: Path, *, random: bool = False) -> tuple[TableInfo, Written]:
    """The table and its written rows, mapped and not read.

    Args:
        path: the file.
        random: rows will be read in random order, so the system should not read ahead.

    Raises:
        InputError: it is no such file, or it has another size than its header says.
    """
    try:
        with path.open("rb") as file:
            magic, length = file.read(8), int.from_bytes(file.read(8), "little")
            if magic != MAGIC or length > path.stat().st_size:
                raise ValueError("no rows of a table")
            content: dict[str, Any] = parse_json(file.read(length))
        facts, count = dict(content["table"]), int(content["written"])
        layout, start = facts.pop("layout"), facts.pop("start", None)
        table = TableInfo(
            **facts,
            layout=RecordLayout(layout["width"], StorageConfig(**layout["storage"])),
            start=None if start is None else StartTable(**start),
        )
        begin, words = -(-(16 + length) // ALIGNMENT) * ALIGNMENT, table.layout.words
        expected = begin + 4 * count * (words + 1)
        if (size := path.stat().st_size) != expected:
            raise ValueError(f"{size:,} bytes, not {expected:,}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}); restore another checkpoint.") from error
    if not count:
        return table, Written(np.empty(0, np.int32), np.empty((0, words), np.uint32))
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if random:
        mapping.madvise(mmap.MADV_RANDOM)
    numbers = np.frombuffer(mapping, np.uint32, offset=begin)
    records, places = np.split(numbers, [count * words])
    return table, Written(places.view(np.int32), records.reshape(count, words))
