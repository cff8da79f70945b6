"""The files of a checkpoint and their checksums, which all processes read.

Each process reads a share of the files with a few threads, and gives the others its checksums.
"""

import hashlib
import heapq
import os
import re
import zlib
from collections.abc import Mapping
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from engram_jax.processes import gather

# Reading and `zlib.crc32` release the GIL. Python would wait at its end for threads of
# `concurrent.futures`, but not for those of a ThreadPool.
_THREADS = min(8, os.cpu_count() or 1)
_BLOCK_BYTES = 4 << 20

_OWNER = re.compile(r"(?:^|/)ocdbt\.process_(\d+)/")  # Orbax's folder of what a process wrote
_MASK = (1 << 32) - 1


type Digest = tuple[int, int]  # two words of 32 bits, which JAX can send


class FileFacts(NamedTuple):
    """What a manifest says of a file: its bytes and their CRC-32."""

    size: int
    crc32: int


def list_files(folder: Path) -> dict[str, int]:
    """The bytes of every file in a folder, by path within it, in the order of the paths."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def share_of(sizes: Mapping[str, int], process: int, processes: int) -> list[str]:
    """The files that one of several processes reads, so that all read about as many bytes.

    These are files that it wrote itself, up to about its part of all bytes. Then the largest
    remaining file goes to the process with the fewest bytes.

    Args:
        sizes: bytes of the files, by path.
        process: its index.
        processes: their number.
    """
    part = sum(sizes.values()) / processes
    loads, share, rest = [0] * processes, [], []
    for name, size in sizes.items():
        found = _OWNER.search(name)
        owner = int(found[1]) if found else processes
        if owner < processes and loads[owner] + size / 2 <= part:
            loads[owner] += size
            share += [name] * (owner == process)
        else:
            rest.append(name)
    heap = [(load, index) for index, load in enumerate(loads)]
    heapq.heapify(heap)
    for name in sorted(rest, key=lambda name: -sizes[name]):
        load, index = heap[0]
        heapq.heapreplace(heap, (load + sizes[name], index))
        share += [name] * (index == process)
    return share


def read_share(folder: Path) -> dict[str, FileFacts]:
    """Reads this process's share of the files in a folder."""
    names = _own_share(list_files(folder))
    with ThreadPool(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: facts_of(folder / name), names), strict=True))


def gather_facts(mine: Mapping[str, FileFacts]) -> dict[Digest, FileFacts]:
    """The facts of the files of all processes, by digests of the paths; all must call this."""
    rows = np.zeros((len(mine), 5), np.uint32)
    for row, (name, (size, crc32)) in zip(rows, mine.items(), strict=True):
        row[:] = (*_digest(name), size >> 32, size & _MASK, crc32)
    counts = gather(np.asarray(len(rows), np.int32)).tolist()
    padded = np.zeros((1 << max(counts).bit_length(), 5), np.uint32)  # few shapes to compile for
    padded[: len(rows)] = rows
    return {
        (high, low): FileFacts(size_high << 32 | size_low, crc32)
        for part, count in zip(gather(padded).tolist(), counts, strict=True)
        for high, low, size_high, size_low, crc32 in part[:count]
    }


def list_facts(folder: Path, gathered: Mapping[Digest, FileFacts]) -> dict[str, FileFacts]:
    """The facts of all files in a folder, by path.

    What no process has read is read here: on another machine, the listing of a network file system
    may be late.
    """
    known = {}
    for name, size in list_files(folder).items():
        facts = gathered.get(_digest(name))
        if facts is None or facts.size != size:
            facts = facts_of(folder / name)
        known[name] = facts
    return known


def find_damage(folder: Path, files: Mapping[str, FileFacts]) -> str | None:
    """Compares this process's share of a checkpoint's files with what its manifest says.

    Returns a description of the first damage; None if there is none.
    """
    share = _own_share({name: facts.size for name, facts in files.items()})
    with ThreadPool(_THREADS) as pool:
        found = pool.imap(lambda name: damage_of(folder / name, name, files[name]), share)
        return next((damage for damage in found if damage), None)


def _own_share(sizes: Mapping[str, int]) -> list[str]:
    return share_of(sizes, jax.process_index(), jax.process_count())


def facts_of(path: Path) -> FileFacts:
    """Reads a file's bytes and checksum."""
    size = crc32 = 0
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            size, crc32 = size + count, zlib.crc32(block[:count], crc32)
    return FileFacts(size, crc32)


def damage_of(path: Path, name: str, saved: FileFacts) -> str | None:
    """How a file differs from what was saved as `name`; None if it does not."""
    if not path.is_file():
        return f"{name} is missing"
    if (size := path.stat().st_size) != saved.size:
        return f"{name} has {size:,} bytes, not {saved.size:,}"
    if facts_of(path) != saved:
        return f"{name} has another checksum"
    return None


def _digest(name: str) -> Digest:
    """64 bits that stand for a path in arrays of integers."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4]), int.from_bytes(digest[4:])
