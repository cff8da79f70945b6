"""Rows of T tokens from a stream of documents: pure NumPy, random access, no state.

The stream is the concatenation of documents, each as bos … eos. Row i has the positions iT … iT+T
of the stream; the last of them is only a target. Training and evaluation use the same rule.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Integer, UInt64

from engram_jax.data.corpus import CorpusView, blocks
from engram_jax.errors import InputError
from engram_jax.memory.plan import BufferPlan, SlotPlan

ORDER = 2  # version of the order of an epoch's documents

type Order = Callable[[Int64[np.ndarray, "n"]], Integer[np.ndarray, "n"]]


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
        epochs, rows = np.divmod(indices, self.rows_per_epoch)
        packed = empty_rows(len(indices), self.sequence_length)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            cut = self._stream(int(epoch)).cut(rows[chosen], self.sequence_length)
            place_rows(packed, chosen, cut)
        return packed

    def _stream(self, epoch: int) -> "_Stream":
        stream = self._epochs.get(epoch)  # read once, because several threads may be here
        if stream is None:
            # All documents of the corpus, of which the held-out ones have no tokens here.
            count = self.documents.corpus.manifest.documents
            order = Shuffle(count, self.seed, self.source, epoch)
            stream = _Stream(self.documents, count, order)
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
    stream = _Stream(documents, len(documents), documents.indices.__getitem__)
    row_count = -(-(documents.token_count - 1) // sequence_length)
    return (
        stream.cut(first + np.arange(batch_size), sequence_length)
        for first in range(0, row_count, batch_size)
    )


# A stream has one prefix sum for this many documents. The others are computed for each batch.
_GROUP = 64


class _Stream:
    """Documents one after another.

    Args:
        view: the documents.
        count: number of places in the stream.
        order: the number in the corpus of the document at every place. Those that are not in the
            view have no tokens.
    """

    def __init__(self, view: CorpusView, count: int, order: Order) -> None:
        self._view, self._corpus, self._count, self._order = view, view.corpus, count, order
        sums = [np.zeros(1, np.int64)]
        for block in blocks(count):
            _, lengths = self._documents(np.arange(block.start, block.stop))
            sums.append(np.add.reduceat(lengths, np.arange(0, len(lengths), _GROUP)))
        self._marks = np.cumsum(np.concatenate(sums))  # tokens before each group, and of all

    def _documents(
        self, places: Int64[np.ndarray, "n"]
    ) -> tuple[Integer[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
        """Numbers in the corpus, and tokens, of the documents at some places."""
        numbers = self._order(places)
        return numbers, np.where(self._view.contains(numbers), self._corpus.lengths_of(numbers), 0)

    def cut(self, rows: Int64[np.ndarray, "B"], sequence_length: int) -> Batch:
        """Return rows of the stream, with padding after its end.

        Their `documents` are numbers in the stream.
        """
        corpus = self._corpus
        first = rows[:, None] * sequence_length
        places = first + np.arange(sequence_length + 1)
        inside = places < self._marks[-1]
        near, numbers, begins, ends = self._near(places)
        documents = np.where(inside, np.searchsorted(ends, places, side="right"), 0)
        sources = (corpus.offsets[numbers] - begins)[documents] + places
        tokens = np.where(inside, corpus.ids[np.where(inside, sources, 0)], corpus.manifest.pad_id)
        tokens = tokens.astype(np.int32)
        same = (documents[:, 1:] == documents[:, :-1]) & inside[:, 1:]
        ranks = np.cumsum(ends > begins)[documents]
        segments = np.where(inside, ranks - ranks[:, :1] + 1, 0)
        positions = np.where(inside, places - np.maximum(begins[documents], first), 0)
        return Batch(
            tokens=tokens[:, :-1],
            targets=tokens[:, 1:],
            target_mask=same.astype(np.float32),
            segments=segments[:, :-1].astype(np.int32),
            positions=positions[:, :-1].astype(np.int32),
            documents=np.where(inside, near[documents], 0)[:, :-1].astype(np.int32),
        )

    def _near(
        self, places: Int64[np.ndarray, "B T_and_one"]
    ) -> tuple[Integer[np.ndarray, "near"], ...]:
        """The documents in the groups of these places.

        Returns:
            Their numbers in the stream and in the corpus, and where they begin and end.
        """
        spans = np.searchsorted(self._marks, places[:, [0, -1]], side="right") - 1
        spans = np.minimum(spans, len(self._marks) - 2)
        groups = np.unique(np.concatenate([np.arange(low, high + 1) for low, high in spans]))
        near = (groups[:, None] * _GROUP + np.arange(_GROUP)).ravel()
        near = near[near < self._count]
        numbers, lengths = self._documents(near)
        sums = np.cumsum(lengths)
        skipped = self._marks[groups] - (sums - lengths)[::_GROUP]
        ends = sums + np.repeat(skipped, _GROUP)[: len(near)]
        return near, numbers, ends - lengths, ends


class Shuffle:
    """A random order of `count` items, which depends only on the arguments.

    The item of every place is computed from the place alone, so that an order of very many
    documents takes no memory. It is a bijection of the numbers of b bits: in every round an odd
    factor, a sum and a shift, as in SplitMix64. A number beyond the items is mapped again, until it
    is one of them (cycle walking). Unlike the shuffle of a NumPy generator, this cannot change
    between NumPy releases.

    Args:
        count: number of items.
        key: integers, such as a seed and an epoch.
    """

    def __init__(self, count: int, *key: int) -> None:
        bits = max((count - 1).bit_length(), _LEAST_BITS)
        self._count, self._mask = np.uint64(count), np.uint64((1 << bits) - 1)
        self._shift = np.uint64((bits + 1) // 2)
        state = np.zeros(1, np.uint64)
        for part in key:
            state = _mix(state ^ np.uint64(part % 2**64))
        drawn = _mix(state + np.arange(2 * _ROUNDS, dtype=np.uint64) * _GOLDEN)
        self._factors, self._terms = drawn[:_ROUNDS] | np.uint64(1), drawn[_ROUNDS:]

    def __call__(self, places: Integer[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """Returns the items at these places."""
        items = self._map(places.astype(np.uint64))
        while len(beyond := np.flatnonzero(items >= self._count)):
            items[beyond] = self._map(items[beyond])
        return items.astype(np.int64)

    def _map(self, numbers: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
        for factor, term in zip(self._factors, self._terms, strict=True):
            numbers = (numbers * factor + term) & self._mask
            numbers ^= numbers >> self._shift
        return numbers


_ROUNDS, _LEAST_BITS = 6, 6  # with fewer, orders of a hundred items are less than random
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """An output of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
