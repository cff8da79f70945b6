"""Rows of T tokens from a stream of documents: pure NumPy, random access, no state.

The stream is the concatenation of documents, each as bos … eos. Row i has the positions iT … iT+T
of the stream; the last of them is only a target. Training and evaluation use the same rule.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Integer, UInt64

from engram_jax.data.corpus import CorpusView
from engram_jax.errors import InputError
from engram_jax.memory.plan import BufferPlan, SlotPlan


class Batch(NamedTuple):
    """Packed rows of T tokens: [B, T], or [A, B, T] for the A micro-batches of an optimizer step.

    Arrays are NumPy arrays on the host and JAX arrays on the devices.

    Attributes:
        tokens: the input ids.
        targets: the next id of each.
        target_mask: 1 if the target is in the same document, otherwise 0.
        segments: number of the token's document within the row, from 1; 0 is padding.
        positions: position in the row's part of that document, from 0.
        documents: number of the token's document in the corpus's view (0 in padding, where the mask
            is 0); None: not known.
        plan: the `MemoryPlan` of the step; None: not planned, or a model without memory.
    """

    tokens: Int32[Any, "*A B T"]
    targets: Int32[Any, "*A B T"]
    target_mask: Float32[Any, "*A B T"]
    segments: Int32[Any, "*A B T"]
    positions: Int32[Any, "*A B T"]
    documents: Any = None  # Int32[Any, "*A B T"]
    plan: Any = None

    def map(self, change: Callable[[Any], Any]) -> "Batch":
        """Applies a function to every array except the plan, which is dropped."""
        return Batch(*(None if array is None else change(array) for array in self[:-1]))


class _Stream(NamedTuple):
    starts: Int64[np.ndarray, "documents"]  # in the corpus's ids
    ends: Int64[np.ndarray, "documents"]  # in the stream
    lengths: Int64[np.ndarray, "documents"]


class MicroBatch(NamedTuple):
    """One of the A micro-batches of a step, or all of them, stacked.

    Attributes:
        batch: the tokens, without a plan.
        slots: the slots of their rows, by layer id.
    """

    batch: Batch
    slots: dict[int, SlotPlan]


class SentBatch(NamedTuple):
    """A batch on the devices.

    Attributes:
        batch: the batch.
        buffers: on the host, the rows that owners need, if tables are outside the devices.
    """

    batch: Batch
    buffers: Mapping[int, BufferPlan]


def split_buffers(batch: Batch) -> tuple[Batch, Mapping[int, BufferPlan]]:
    """A batch for the devices, and the plan of its buffers, which stays on the host."""
    if batch.plan is None:
        return batch, {}
    return batch._replace(plan=batch.plan._replace(buffers=None)), batch.plan.buffers or {}


def micro_batches(batch: Batch) -> MicroBatch:
    """The A micro-batches of a step's batch, stacked."""
    return MicroBatch(batch._replace(plan=None), batch.plan.slots if batch.plan else {})


class PackedRows:
    """An infinite sequence of training rows of one corpus.

    Row i belongs to epoch i // rows_per_epoch. An epoch is the stream of all documents in a random
    order; a remainder shorter than a row is dropped. Row i depends only on (documents,
    sequence_length, seed, source, i).
    """

    def __init__(
        self, documents: CorpusView, sequence_length: int, seed: int, source: int = 0
    ) -> None:
        """Pack `documents` into rows of `sequence_length` = T tokens.

        `source` distinguishes corpora that share a seed.

        Raises:
            InputError: all documents together have fewer than T+1 tokens.
        """
        if sequence_length < 1:
            raise InputError(f"sequence_length must be at least 1, not {sequence_length}.")
        self.rows_per_epoch = (documents.token_count - 1) // sequence_length
        if self.rows_per_epoch < 1:
            raise InputError(
                f"corpus {documents.corpus.name} has {documents.token_count} tokens to train on, "
                f"too few for one row of {sequence_length} + 1; lower the sequence length or the "
                "held-out share, or add text."
            )
        self.documents = documents
        self.sequence_length = sequence_length
        self.seed = seed
        self.source = source
        self._epochs: dict[int, _Stream] = {}

    def __reduce__(self) -> tuple[type["PackedRows"], tuple[CorpusView, int, int, int]]:
        """Pickle without the cached epochs."""
        return PackedRows, (self.documents, self.sequence_length, self.seed, self.source)

    def rows(self, indices: Int64[np.ndarray, "B"]) -> Batch:
        """Return the rows of these numbers."""
        corpus = self.documents.corpus
        epochs, rows = np.divmod(indices, self.rows_per_epoch)
        packed = empty_rows(len(indices), self.sequence_length)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            stream = self._stream(int(epoch))
            cut = _cut(
                corpus.ids, stream, rows[chosen], self.sequence_length, corpus.manifest.pad_id
            )
            place_rows(packed, chosen, cut)
        return packed

    def _stream(self, epoch: int) -> _Stream:
        stream = self._epochs.get(epoch)  # read once, because several threads may be here
        if stream is None:
            order = shuffled(len(self.documents), self.seed, self.source, epoch)
            lengths = self.documents.lengths[order]
            stream = _Stream(self.documents.starts[order], np.cumsum(lengths), lengths)
            # A batch can contain rows of two epochs. Older epochs are not needed again.
            self._epochs = dict([*self._epochs.items(), (epoch, stream)][-2:])
        return stream


def empty_rows(count: int, sequence_length: int) -> Batch:
    """Return `count` rows to be filled."""
    shape = (count, sequence_length)
    tokens, targets, segments, positions = (np.empty(shape, np.int32) for _ in range(4))
    return Batch(tokens, targets, np.empty(shape, np.float32), segments, positions)


def place_rows(packed: Batch, chosen: Bool[np.ndarray, "B"], rows: Batch) -> None:
    """Write `rows` to the chosen rows of `packed`, without fields that are None in `packed`."""
    for target, values in zip(packed, rows, strict=True):
        if target is not None:
            target[chosen] = values


def pack_held_out(documents: CorpusView, sequence_length: int, batch_size: int) -> Iterator[Batch]:
    """Cut documents, each once and in their order, into batches of `batch_size` rows.

    Every token except a document's bos is a target exactly once. After the last document, rows are
    padded with the tokenizer's pad id, in segment 0 with mask 0.

    Raises:
        InputError: there are no documents (at the call, not at the first batch).
    """
    corpus = documents.corpus
    if not len(documents):
        raise InputError(
            f"corpus {corpus.name} has no held-out documents; raise the held-out share, or add to "
            f"its {corpus.manifest.documents} documents."
        )
    if sequence_length < 1 or batch_size < 1:
        raise InputError("sequence_length and batch_size must be at least 1.")
    lengths = documents.lengths
    stream = _Stream(documents.starts, np.cumsum(lengths), lengths)
    row_count = -(-(documents.token_count - 1) // sequence_length)
    pad_id = corpus.manifest.pad_id
    return (
        _cut(corpus.ids, stream, first + np.arange(batch_size), sequence_length, pad_id)
        for first in range(0, row_count, batch_size)
    )


def _cut(
    ids: Integer[np.ndarray, "tokens"],
    stream: _Stream,
    rows: Int64[np.ndarray, "B"],
    sequence_length: int,
    pad_id: int,
) -> Batch:
    """Return rows of a stream, with padding after its end."""
    first = rows[:, None] * sequence_length
    places = first + np.arange(sequence_length + 1)
    documents = np.searchsorted(stream.ends, places, side="right")
    inside = documents < len(stream.ends)
    documents = np.where(inside, documents, 0)
    begins = stream.ends[documents] - stream.lengths[documents]
    sources = np.where(inside, stream.starts[documents] + places - begins, 0)
    tokens = np.where(inside, ids[sources], pad_id).astype(np.int32)
    same = (documents[:, 1:] == documents[:, :-1]) & inside[:, 1:]
    segments = np.where(inside, documents - documents[:, :1] + 1, 0)
    positions = np.where(inside, places - np.maximum(begins, first), 0)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        target_mask=same.astype(np.float32),
        segments=segments[:, :-1].astype(np.int32),
        positions=positions[:, :-1].astype(np.int32),
        documents=documents[:, :-1].astype(np.int32),
    )


def shuffled(count: int, *key: int) -> Int64[np.ndarray, "count"]:
    """Return a permutation of range(count) that depends only on the arguments.

    Items are sorted by their output of SplitMix64 (Steele, Lea and Flood 2014). Outputs are
    distinct. Unlike the shuffle of a NumPy generator, this cannot change between NumPy releases.
    """
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state ^ np.uint64(part % 2**64))
    return np.argsort(_mix(state + np.arange(count, dtype=np.uint64) * _GOLDEN))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: UInt64[np.ndarray, "count"]) -> UInt64[np.ndarray, "count"]:
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
