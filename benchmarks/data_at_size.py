"""Packing of very many documents, compared with arrays that hold numbers of each document.

    python -m benchmarks.data_at_size [--documents 100000000] [--no-plain]

The corpus has random lengths and no text: its file of ids is sparse. The plain version packs the
same rows with int64 arrays, which hold an epoch's permutation of the documents, and start, length
and end of every document in it. Each version runs in its own process, on one core; a data worker
needs the same memory. Seconds are those of the CPU, so other programs may run. Bytes are those of
NumPy's arrays. Files that are mapped are not counted, because all processes of a machine share
them. The two versions are checked to be equal.
"""

import json
import multiprocessing
import statistics
import tempfile
import time
import tracemalloc
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engram_jax.command_line import run_function
from engram_jax.data.corpus import Corpus, Manifest, column_checksum
from engram_jax.data.packing import Batch, PackedRows, Shuffle
from engram_jax.data.token_cache import FORMAT

ROWS, LENGTH = 8, 4096
BATCHES = 50
HELD_OUT = 0.01
LONGEST = 1000  # tokens


class Costs(NamedTuple):
    """Costs of one version.

    Attributes:
        opened: seconds to open the corpus and choose its training documents.
        order: seconds of the first batch, which include those of the epoch's order.
        batch: seconds of a later batch whose ids are in memory, the median.
        held: bytes of arrays after the first batch.
        peak: the most bytes of arrays at a time.
        checksum: of the batches.
    """

    opened: float
    order: float
    batch: float
    held: int
    peak: int
    checksum: int


class PlainStream(NamedTuple):
    """Start in the ids, end in the stream, and length of every document, in the stream's order."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray

    def cut(self, rows: np.ndarray, sequence_length: int) -> Batch:
        """Rows of the stream; not beyond its end."""
        first = rows[:, None] * sequence_length
        places = first + np.arange(sequence_length + 1)
        documents = np.searchsorted(self.ends, places, side="right")
        begins = self.ends[documents] - self.lengths[documents]
        tokens = self.ids[self.starts[documents] + places - begins].astype(np.int32)
        positions = (places - np.maximum(begins, first)).astype(np.int32)
        return Batch(
            tokens=tokens[:, :-1],
            targets=tokens[:, 1:],
            target_mask=(documents[:, 1:] == documents[:, :-1]).astype(np.float32),
            segments=(documents - documents[:, :1] + 1)[:, :-1].astype(np.int32),
            positions=positions[:, :-1],
            documents=documents[:, :-1].astype(np.int32),
        )


class PlainRows(PackedRows):
    """The same rows, with arrays of all documents."""

    def _stream(self, epoch: int) -> PlainStream:  # type: ignore[override]
        if epoch not in self._epochs:
            corpus = self.documents.corpus
            count = corpus.manifest.documents
            order = Shuffle(count, self.seed, self.source, epoch)(np.arange(count))
            order = order[self.documents.contains(order)]
            starts = corpus.offsets[order]
            lengths = corpus.offsets[order + 1] - starts
            stream = PlainStream(corpus.ids, starts, np.cumsum(lengths), lengths)
            self._epochs = {epoch: stream}  # type: ignore[dict-item]
        return self._epochs[epoch]  # type: ignore[return-value]


def write_corpus(folder: Path, documents: int) -> None:
    """Writes a cache folder of documents of random lengths, with a sparse file of ids."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, LONGEST + 1, documents)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "byte_lengths.npy", lengths)
    np.save(folder / "hashes.npy", generator.integers(0, 1 << 64, documents, np.uint64))
    tokens = int(offsets[-1])
    with (folder / "ids.bin").open("wb") as ids:
        ids.truncate(2 * tokens)
    checksum = column_checksum(folder)
    manifest = Manifest(
        *(FORMAT, "random", "none", 1 << 16, 0, "uint16", documents, tokens, 0, checksum)
    )
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest)))


def measure(rows_of: type[PackedRows], folder: Path) -> Costs:
    """Measures a version in this process."""
    tracemalloc.start()
    start = time.process_time()
    documents = Corpus(folder, HELD_OUT).train
    opened = time.process_time() - start
    start = time.process_time()
    rows = rows_of(documents, LENGTH, 0)
    rows.rows(np.arange(ROWS))
    order = time.process_time() - start
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    seconds, checksum = [], 0
    for number in range(1, BATCHES + 1):
        indices = number * (rows.rows_per_epoch // BATCHES - 1) + np.arange(ROWS)
        rows.rows(indices)  # reads the ids from the file
        start = time.process_time()
        batch = rows.rows(indices)
        seconds.append(time.process_time() - start)
        # The tokens are zeros, so positions and segments say which documents are there.
        checksum = zlib.crc32(batch.positions.tobytes() + batch.segments.tobytes(), checksum)
    return Costs(opened, order, statistics.median(seconds), held, peak, checksum)


def main(documents: int = 10_000_000, plain: bool = True) -> None:
    """Prints seconds and bytes of both versions, and their ratios.

    Args:
        documents: number of documents. Each takes 24 bytes of temporary files.
        plain: also measure the plain version, which needs 90 bytes of memory per document.
    """
    spawn = multiprocessing.get_context("spawn")  # as data workers are started
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as processes:
            processes.submit(write_corpus, folder, documents).result()
            versions = (PackedRows, PlainRows) if plain else (PackedRows,)
            costs = [processes.submit(measure, rows, folder).result() for rows in versions]
    if len({of_version.checksum for of_version in costs}) != 1:
        raise AssertionError("the two versions have different batches")
    print(f"{documents:,} documents, batches of {ROWS} rows of {LENGTH:,} tokens")
    for what, field, scale, unit in (
        ("open the corpus", "opened", 1, "s"),
        ("first batch, with the epoch's order", "order", 1, "s"),
        ("a later batch", "batch", 1e3, "ms"),
        ("arrays held by a process", "held", 1e-6, "MB"),
        ("arrays at the peak", "peak", 1e-6, "MB"),
    ):
        values = [getattr(of_version, field) * scale for of_version in costs]
        line = f"{what}: {values[0]:,.2f} {unit}"
        if plain:
            line += f"; plain {values[1]:,.2f} {unit}, {values[0] / values[1]:.2f} ×"
        print(line)


if __name__ == "__main__":
    run_function(main)
