"""Rows of a table of DeepSeek-V4.1's size, read in place, against one `pread` per row.

Command: `python -m benchmarks.released_table` (Linux). It makes a checkpoint of the released sizes
without data (a sparse file of 94 GiB that takes a few kilobytes), reads 65,536 random rows (which
loads their pages into memory), and then reads the same rows again, in other orders. Baseline: the
same bytes by one `os.pread` for the numbers of a row and one for its scales. "Records" is what
training reads, with room for moments, if a run begins with this memory (`--memory.start-from`).
"""

import json
import os
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from engram_jax.compression import VocabularyProjection
from engram_jax.formats import deepseek
from engram_jax.formats.start_memory import MappedStart
from engram_jax.hashing import ROW_MULTIPLE
from engram_jax.memory.layout import RecordLayout
from engram_jax.memory.places import stored_places
from engram_jax.memory.store import RowStore, StartTable, TableInfo

ROWS, PROJECTED, ROUNDS, READ = 384_006_168, 99_092, 9, 65_536
PADDED = -(-ROWS // ROW_MULTIPLE) * ROW_MULTIPLE
TABLE = TableInfo(1, PADDED, RecordLayout(256), seed=0, scale=0.02, hash="")
CONFIG = {
    **{"engram_layer_ids": [1], "engram_num_embeddings": [ROWS], "engram_max_ngram_size": 4},
    **{"engram_vocab_size": 16_000_000, "engram_n_heads": 8, "engram_head_dim": 256},
    **{"engram_pad_token_id": 2, "engram_compressed_vocab_size": PROJECTED, "hidden_size": 5120},
    **{"hc_mult": 4, "rms_norm_eps": 1e-20},
}
TENSORS = {
    "embed.weight": ("F8_E4M3", [ROWS, 256], 1),
    "embed.scale": ("F8_E8M0", [ROWS, 8], 1),
    "wkv.weight": ("F8_E4M3", [25_600, 6144], 1),
    "wkv.scale": ("F8_E8M0", [800, 192], 1),
    "q_weight": ("BF16", [4, 5120], 2),
    "k_weight": ("BF16", [4, 5120], 2),
}


def main() -> None:
    """Makes the file, reads, prints."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sparse(folder)
        started = time.perf_counter()
        memory = deepseek.open_memory(folder, VocabularyProjection.identity(PROJECTED))
        opened = time.perf_counter() - started
        table, info = memory.tables[1], deepseek.inspect(folder)
        weight, scale = info["layers.1.engram.embed.weight"], info["layers.1.engram.embed.scale"]
        print(f"{weight.file.stat().st_size / 2**30:.1f} GiB, opened in {opened:.2f} s")

        generator = np.random.default_rng(0)
        rows = generator.integers(0, ROWS, READ)
        first = READ / seconds(lambda: table.gather(rows))
        descriptor = os.open(weight.file, os.O_RDONLY)

        def pread() -> None:
            for row in rows.tolist():
                os.pread(descriptor, 256, weight.start + 256 * row)
                os.pread(descriptor, 8, scale.start + 8 * row)

        rates: dict[str, list[float]] = {
            what: [] for what in ("stored bytes", "float32", "records", "pread")
        }
        for _ in range(ROUNDS):
            generator.shuffle(rows)
            rates["stored bytes"].append(READ / seconds(lambda: table.gather(rows)))
            rates["float32"].append(READ / seconds(lambda: table.read(rows)))
            rates["pread"].append(READ / seconds(pread))
        print(f"largest resident memory: {largest_resident():.2f} GiB")

        start = StartTable(name, table.fingerprint)
        store = RowStore(TABLE, 0, TABLE.rows)
        begun = replace(TABLE, start=start)
        store.set_initial(begun, MappedStart(begun, ROWS, table, folder))
        places = stored_places(rows.astype(np.int32), TABLE.rows)
        records = np.empty((READ, TABLE.layout.words), np.uint32)
        for _ in range(ROUNDS):
            generator.shuffle(places)
            rates["records"].append(READ / seconds(lambda: store.read(places, records)))
        print(f"with records: {largest_resident():.2f} GiB")
        os.close(descriptor)
    print(f"first read: {first:,.0f} rows/s (holes: no disk is read)")
    for what, found in rates.items():
        ratio = np.percentile(np.array(found) / np.array(rates["pread"]), [50, 25, 75])
        print(
            f"{what}: {np.median(found):,.0f} rows/s, "
            f"{ratio[0]:.1f} ({ratio[1]:.1f}–{ratio[2]:.1f}) × pread"
        )


def largest_resident() -> float:
    """The largest resident memory of this process so far, in GiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def write_sparse(folder: Path) -> None:
    """Writes a checkpoint of layer 1 whose data is a hole."""
    header, start = {}, 0
    for name, (dtype, shape, size) in TENSORS.items():
        stop = start + shape[0] * shape[1] * size
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        header[f"layers.1.engram.{name}"], start = entry, stop
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + start)
    (folder / "config.json").write_text(json.dumps({"text_config": CONFIG}))


def seconds(run: Callable[[], object]) -> float:
    """The time of a call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
