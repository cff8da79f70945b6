"""Writes checkpoints of other projects, independently of `engram_jax.formats`."""

import json
import struct
from pathlib import Path

import numpy as np

type Entry = tuple[str, tuple[int, ...], bytes | None]  # type, shape, data (None: a hole)

SIZES = {"F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "BF16": 2, "F32": 4, "I64": 8}


def bfloat16(values: np.ndarray) -> bytes:
    """The bytes of numbers that bfloat16 represents exactly."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype("<u2").tobytes()


def write_file(path: Path, entries: dict[str, Entry]) -> None:
    """Writes a file in the order of its entries; data that is None is left as a hole."""
    header, start = {}, 0
    for name, (dtype, shape, _) in entries.items():
        stop = start + int(np.prod(shape, dtype=object)) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (_, _, data) in entries.items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(data or b"")
        file.truncate(8 + len(text) + start)


def write_checkpoint(folder: Path, files: list[dict[str, Entry]], config: dict) -> Path:
    """Writes an index, its files and config.json; returns the folder."""
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for number, entries in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_file(folder / name, entries)
        weight_map |= dict.fromkeys(entries, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder
