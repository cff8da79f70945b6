"""Batches with Grain: global batch n is a pure function of (sources, sizes, seed, n)."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from grain import DatasetIterator, MapDataset, ReadOptions
from jaxtyping import Int

from engram_jax.data.batch_part import WHOLE, BatchPart
from engram_jax.data.corpus import Corpus
from engram_jax.data.mixture import RowMixture
from engram_jax.data.packing import Batch, PackedRows
from engram_jax.data.workers import WorkerPool
from engram_jax.errors import InputError
from engram_jax.memory.plan import Planner

# Grain's datasets need a length. No run has this many batches.
_ENDLESS = 1 << 48


@dataclass(frozen=True)
class BatchBuilder:
    """Builds one process's part of global batch n: a picklable map from n to a `Batch`.

    Global batch n consists of the rows n·batch_size … (n+1)·batch_size − 1 of the mixture, split
    into `accumulation` consecutive micro-batches, of which a process takes its part.

    Attributes:
        rows: the mixture.
        batch_size: rows of one optimizer step, over all micro-batches and processes.
        accumulation: number A of micro-batches.
        planner: plans the memory of this process's tokens; None for a model without memory.
        part: this process's part.

    Raises:
        InputError: the sizes do not divide.
    """

    rows: RowMixture
    batch_size: int
    accumulation: int = 1
    planner: Planner | None = None
    part: BatchPart = WHOLE

    def __post_init__(self) -> None:
        """Check that the sizes divide."""
        if min(self.batch_size, self.accumulation, self.part.processes) < 1:
            raise InputError("batch_size, accumulation and processes must be at least 1.")
        if not 0 <= self.part.process < self.part.processes:
            raise InputError(
                f"process is {self.part.process}; it must be at least 0 and below processes "
                f"{self.part.processes}."
            )
        if self.batch_size % (self.accumulation * self.part.row_parts):
            raise InputError(
                f"a batch of {self.batch_size} rows does not divide into {self.accumulation} "
                f"micro-batches for {self.part.row_parts} processes; make it a multiple of "
                f"{self.accumulation * self.part.row_parts}."
            )

    def __call__(self, number: int) -> Batch:
        """Return this process's part of global batch `number`."""
        micro = self.batch_size // self.accumulation
        first = number * self.batch_size
        indices = first + np.arange(self.batch_size).reshape(self.accumulation, micro)
        planner, part = self.planner, self.part
        if planner is not None and planner.buffered:  # the plan depends on all tokens
            whole = self._read(indices)
            plan = planner.plan_part(whole.tokens, whole.segments, part)
            return whole.map(part.tokens)._replace(plan=plan)
        rows = self._read(part.rows(indices))
        own = rows.map(part.positions)
        if planner is None:
            return own
        return own._replace(plan=planner(rows.tokens, rows.segments, part))

    def _read(self, indices: Int[np.ndarray, "A B"]) -> Batch:
        rows = self.rows.rows(indices.reshape(-1))
        return rows.map(lambda field: field.reshape(*indices.shape, -1))


class BatchIterator(Iterator[Batch]):
    """An infinite iterator of batches.

    Close it, or use it in a `with` statement. Otherwise worker processes are not stopped. A closed
    iterator is exhausted.
    """

    def __init__(self, batches: DatasetIterator[Batch] | WorkerPool[Batch]) -> None:
        """Take over an iterator."""
        self._batches: DatasetIterator[Batch] | WorkerPool[Batch] | None = batches

    def __next__(self) -> Batch:
        """Return the next batch."""
        if self._batches is None:
            raise StopIteration
        return next(self._batches)

    def __enter__(self) -> "BatchIterator":
        """Return the iterator itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """End threads and worker processes."""
        if self._batches is not None:
            self._batches.close()
        # Drop it now. When Python exits, Grain's own cleanup fails, as its modules are unloaded.
        self._batches = None


def mix_rows(
    corpora: Sequence[Corpus], weights: Sequence[float], sequence_length: int, seed: int
) -> RowMixture:
    """The training rows of several corpora; see `make_batches`."""
    packed = [
        PackedRows(corpus.train, sequence_length, seed, source)
        for source, corpus in enumerate(corpora)
    ]
    return RowMixture(packed, weights)


def make_batches(
    corpora: Sequence[Corpus],
    weights: Sequence[float] = (),
    *,
    sequence_length: int,
    batch_size: int,
    accumulation: int = 1,
    seed: int = 0,
    planner: Planner | None = None,
    first_batch: int = 0,
    part: BatchPart = WHOLE,
    workers: int = 0,
    prefetch: int = 4,
) -> BatchIterator:
    """Return this process's batches first_batch, first_batch + 1, … of the training documents.

    The iterator's only state is the batch number: a run that resumes at batch n gets the same
    batches as an uninterrupted run, for any `workers`, `prefetch` and number of processes.

    Args:
        corpora: corpora to train on; their `train` documents are read.
        weights: shares of rows, one per corpus; by default, each corpus by its size.
        sequence_length: T.
        batch_size: rows of one optimizer step, over all micro-batches and processes.
        accumulation: number A of micro-batches.
        seed: of the order of documents.
        planner: see `BatchBuilder`; must be picklable if there are workers.
        first_batch: number of the first batch to return.
        part: this process's part of each batch.
        workers: number of processes that build batches; 0: a thread of this process does.
        prefetch: number of batches built ahead, over all workers.

    Raises:
        InputError: sizes do not divide, a corpus is too small for one row, the number of weights
            is wrong, or a number is negative.
    """
    if min(first_batch, workers, prefetch) < 0:
        raise InputError("first_batch, workers and prefetch must not be negative.")
    rows = mix_rows(corpora, weights, sequence_length, seed)
    builder = BatchBuilder(rows, batch_size, accumulation, planner, part)
    if not workers:
        numbers = MapDataset.range(first_batch, first_batch + _ENDLESS).map(builder)
        reading = ReadOptions(num_threads=min(1, prefetch), prefetch_buffer_size=prefetch)
        return BatchIterator(iter(numbers.to_iter_dataset(reading)))
    # Not Grain's mp_prefetch: it waits for ever if a worker is killed while it sends a batch.
    return BatchIterator(WorkerPool(builder, first_batch, workers, prefetch))


def prefetch_to_device[Host, Device](
    batches: Iterator[Host], put: Callable[[Host], Device], depth: int = 2
) -> Iterator[Device]:
    """Yield `put(batch)` for each batch, with `depth` further transfers already started.

    `put` must return immediately, like `jax.device_put`. Then the transfer of a batch overlaps with
    the computation of the step before.
    """
    waiting: deque[Device] = deque()
    for batch in batches:
        waiting.append(put(batch))
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting
