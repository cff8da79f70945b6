"""The files of a checkpoint: their checksums, read by all processes, and the manifest.

Each process reads a share of the files with a few threads, and gives the others its checksums.
"""

import hashlib
import heapq
import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engram_jax.files import parse_json, sync_folder
from engram_jax.processes import gather

MANIFEST = "manifest.json"

# Reading and `zlib.crc32` release the GIL. Python would wait at its end for threads of
# `concurrent.futures`, but not for those of a ThreadPool.
_THREADS = min(8, os.cpu_count() or 1)
_BLOCK_BYTES = 4 << 20

_OWNER = re.compile(r"(?:^|/)ocdbt\.process_(\d+)/")  # Orbax's folder of what a process wrote
_MASK = (1 << 32) - 1


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


def read_facts(folder: Path, names: Sequence[str]) -> dict[str, FileFacts]:
    """Reads these files of a folder."""
    with ThreadPool(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _facts(folder / name), names), strict=True))


def gather_facts(folder: Path, mine: Mapping[str, FileFacts]) -> dict[str, FileFacts]:
    """The facts of all files of a folder, of which each process has read some.

    All processes must call this. What no process has read is read here: the listing of a network
    file system may be late on another machine.
    """
    rows = np.zeros((len(mine), 5), np.uint32)
    for row, (name, (size, crc32)) in zip(rows, mine.items(), strict=True):
        row[:] = (*_digest(name), size >> 32, size & _MASK, crc32)
    counts = gather(np.asarray(len(rows), np.int32)).tolist()
    padded = np.zeros((1 << max(counts).bit_length(), 5), np.uint32)  # few shapes to compile for
    padded[: len(rows)] = rows
    found = {
        (high, low): FileFacts(size_high << 32 | size_low, crc32)
        for part, count in zip(gather(padded).tolist(), counts, strict=True)
        for high, low, size_high, size_low, crc32 in part[:count]
    }
    known = {}
    for name, size in list_files(folder).items():
        facts = found.get(_digest(name))
        if facts is None or facts.size != size:
            facts = _facts(folder / name)
        known[name] = facts
    return known


def find_damage(folder: Path, files: Mapping[str, FileFacts]) -> str | None:
    """Compares files of a checkpoint with what its manifest says, and describes the first damage.

    Returns None if there is none.
    """
    with ThreadPool(_THREADS) as pool:
        found = pool.imap(partial(_damage, folder), files.items())
        return next((damage for damage in found if damage), None)


def write_manifest(
    folder: Path, content: Mapping[str, Any], files: Mapping[str, FileFacts]
) -> None:
    """Writes the manifest of a checkpoint's folder, after all other files.

    Args:
        folder: the folder.
        content: what the manifest says beside that.
        files: the facts of all other files.
    """
    content = {**content, "files": {name: facts._asdict() for name, facts in files.items()}}
    manifest = {"crc32": zlib.crc32(json.dumps(content).encode()), "content": content}
    unfinished = folder / "manifest.partial"
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1))
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(folder / MANIFEST)
    sync_folder(folder)


def read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, FileFacts]]:
    """Returns the content of a manifest, and the facts of its files.

    Raises:
        ValueError, TypeError, KeyError: it is damaged.
        OSError: it cannot be read.
    """
    path = folder / MANIFEST
    manifest = parse_json(path.read_text(encoding="utf-8"))
    content: dict[str, Any] = manifest["content"]
    if zlib.crc32(json.dumps(content).encode()) != manifest["crc32"]:
        raise ValueError(f"{path} has a wrong checksum")
    return content, {name: FileFacts(**facts) for name, facts in content["files"].items()}


def _facts(path: Path) -> FileFacts:
    size = crc32 = 0
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            size, crc32 = size + count, zlib.crc32(block[:count], crc32)
    return FileFacts(size, crc32)


def _damage(folder: Path, file: tuple[str, FileFacts]) -> str | None:
    name, saved = file
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if (size := path.stat().st_size) != saved.size:
        return f"{name} has {size:,} bytes, not {saved.size:,}"
    if _facts(path) != saved:
        return f"{name} has another checksum"
    return None


def _digest(name: str) -> tuple[int, int]:
    """64 bits that stand for a path in arrays of integers."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4]), int.from_bytes(digest[4:])
