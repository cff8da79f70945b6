"""The memory plan: the rows of one optimizer step, and the row of every token. Pure NumPy.

The input pipeline builds plans on the host; every process plans for its own devices. A device
requests each distinct row once. Rows are sorted by place, and thus by the device that owns them.
Shapes are static: the bound is U = tokens × columns, or all rows of a small table, and the unused
part is padding. Plans have NumPy arrays on the host and JAX arrays on the devices.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from engram_jax.batch_part import WHOLE, BatchPart
from engram_jax.errors import InputError
from engram_jax.hashing import NgramHash
from engram_jax.memory.places import exchange_capacity, stored_places

MOST_ROUNDS = 2**15  # more would overflow the 32-bit arithmetic of `exchange`


class RowPlan(NamedTuple):
    """The rows of one layer's table that every device requests in a step.

    Attributes:
        places: places of the distinct rows, ascending; then padding R, R+1, … (R: padded rows).
        rounds: rounds of the exchange that the device needs, a power of two; usually 1.
        distinct: number of `places` that are not padding.
        buffered: where the owners keep these rows in the step's buffer (see `BufferPlan`); from V
            up, padding. None: the tables are on the devices.
    """

    places: Int32[Any, "S U"]
    rounds: Int32[Any, "S"]
    distinct: Int32[Any, "S"]
    buffered: Int32[Any, "S U"] | None = None


class SlotPlan(NamedTuple):
    """For the tokens of the A micro-batches: where their rows of one layer are on their device.

    Attributes:
        slots: for every token and column, the index of its row in the device's `places`.
        order: for each micro-batch and device, the stable order that sorts its flattened slots. It
            is a permutation of all of them, and only stored in the shape of `slots`.
    """

    slots: Int32[Any, "A B T H"]
    order: Int32[Any, "A B T H"]


class BufferPlan(NamedTuple):
    """The rows of one layer that any device requests in a step, by owner.

    Tables outside the devices send only these rows, in a buffer of V rows for each owner.

    Attributes:
        places: places of the rows of each owner, ascending; then padding R, R+1, …
        distinct: number of `places` that are not padding.
    """

    places: Int32[np.ndarray, "S V"]
    distinct: Int32[np.ndarray, "S"]


class MemoryPlan(NamedTuple):
    """The plan of one optimizer step, by layer id.

    Attributes:
        rows: the rows that devices request.
        slots: the rows of the tokens.
        buffers: the rows that owners need, if tables are outside the devices. They stay on the
            host.
    """

    rows: dict[int, RowPlan]
    slots: dict[int, SlotPlan]
    buffers: dict[int, BufferPlan] | None = None


class Planner:
    """Maps the tokens of this process's part of a step to its memory plan.

    Args:
        ngram_hash: the hash.
        shards: number S of devices of all processes, over which tables and tokens are split.
        local_shards: number of this process's devices, over which its tokens are split evenly.
        context: number of devices over which every sequence is split.
        buffered: the tables are outside the devices, so also plan the buffers of the owners. They
            depend on the tokens of all devices: `local_shards` must be `shards`, and
            `plan_part` gives the part of a process.
    """

    def __init__(
        self,
        ngram_hash: NgramHash,
        *,
        shards: int = 1,
        local_shards: int | None = None,
        context: int = 1,
        buffered: bool = False,
    ) -> None:
        self.ngram_hash = ngram_hash
        self.shards = shards
        self.local_shards = shards if local_shards is None else local_shards
        self.context = context
        self.buffered = buffered

    def __call__(
        self,
        tokens: Int[np.ndarray, "A B T"],
        segments: Int[np.ndarray, "A B T"] | None = None,
        part: BatchPart = WHOLE,
    ) -> MemoryPlan:
        """Plans one step.

        Args:
            tokens: token ids of complete sequences; −1 marks image placeholders.
            segments: document number of every position; None: each row of the batch is one
                document.
            part: its part of T is planned.

        Raises:
            InputError: a token id is outside the vocabulary, or the hash is degenerate.
        """
        window = [ids.reshape(-1) for ids in self.ngram_hash.look_back(tokens, segments)]
        rows, slots, buffers = {}, {}, {}
        for index, layer in enumerate(self.ngram_hash.spec.layers):
            padded_rows = self.ngram_hash.padded_rows[index]
            by_column = self.ngram_hash.hash_window(layer, window)
            places = stored_places(by_column, padded_rows).T.reshape(*tokens.shape, -1)
            rows[layer], slots[layer] = plan_places(
                part.positions(places),
                padded_rows,
                shards=self.shards,
                local_shards=self.local_shards,
                context=min(self.context, self.local_shards),
            )
            if self.buffered:
                buffers[layer], buffered = plan_buffers(rows[layer], padded_rows)
                rows[layer] = rows[layer]._replace(buffered=buffered)
        return MemoryPlan(rows, slots, buffers or None)

    def plan_part(
        self,
        tokens: Int[np.ndarray, "A B T"],
        segments: Int[np.ndarray, "A B T"],
        part: BatchPart,
    ) -> MemoryPlan:
        """The plan of a process, from the tokens of all processes.

        Args:
            tokens: token ids of all processes.
            segments: document number of every position.
            part: the process's part.
        """
        if not self.buffered:
            return self(part.rows(tokens), part.rows(segments), part)
        return _part_of_plan(self(tokens, segments), part)


def plan_places(
    places: Int32[np.ndarray, "A B T H"],
    padded_rows: int,
    *,
    shards: int = 1,
    local_shards: int = 1,
    context: int = 1,
) -> tuple[RowPlan, SlotPlan]:
    """Plans the rows of one table.

    Args:
        places: place of the row of every token and column.
        padded_rows: rows R of the table.
        shards: number S of devices of all processes.
        local_shards: number of this process's devices.
        context: number of these over which T is split.

    Raises:
        InputError: the places are too close to each other for the exchange.
    """
    # The tokens of a device are a contiguous part of B and T in each of the A micro-batches.
    # Consecutive devices share rows of B, each with another part of T.
    micro_batches, _, length, columns = places.shape
    split = (micro_batches, local_shards // context, -1, context, length // context, columns)
    by_device = places.reshape(split).transpose(1, 3, 0, 2, 4, 5).reshape(local_shards, -1)
    bound, owned = min(by_device.shape[1], padded_rows), padded_rows // shards
    rows = np.empty((local_shards, bound), np.int32)
    slots, order = np.empty(by_device.shape, np.int32), np.empty(by_device.shape, np.int32)
    distinct, rounds = np.empty(local_shards, np.int32), np.empty(local_shards, np.int32)
    for device, keys in enumerate(by_device):
        sorted_slots, positions, found = _number_distinct(keys)
        slots[device][positions] = sorted_slots
        rows[device, : len(found)] = found
        rows[device, len(found) :] = padded_rows + np.arange(bound - len(found))
        distinct[device] = len(found)
        capacity = exchange_capacity(bound, shards, owned)
        rounds[device] = exchange_rounds(found, capacity, owned)
        order[device] = _split_order(positions, micro_batches)

    def by_token(array: Int32[np.ndarray, "S n"]) -> Int32[np.ndarray, "A B T H"]:
        parted = array.reshape(split[1], context, micro_batches, -1, *split[-2:])
        return np.ascontiguousarray(parted.transpose(2, 0, 3, 1, 4, 5)).reshape(places.shape)

    return RowPlan(rows, rounds, distinct), SlotPlan(by_token(slots), by_token(order))


def plan_buffers(rows: RowPlan, padded_rows: int) -> tuple[BufferPlan, Int32[np.ndarray, "S U"]]:
    """Plans the buffers of all owners, and finds the requested rows in them.

    V is U on one device. On several it is the `exchange_capacity` of all reads, or twice that, four
    times …, if an owner needs more. (Then the step is compiled again.)

    Args:
        rows: the requests of all S devices.
        padded_rows: rows R of the table.

    Returns:
        The buffers, and `RowPlan.buffered`.
    """
    shards, bound = rows.places.shape
    requests = [places[:count] for places, count in zip(rows.places, rows.distinct, strict=True)]
    needed = requests[0] if shards == 1 else np.unique(np.concatenate(requests))
    owned = padded_rows // shards
    starts = np.searchsorted(needed, np.arange(shards + 1) * owned)
    distinct = np.diff(starts).astype(np.int32)
    size = bound if shards == 1 else exchange_capacity(bound * shards, shards, owned)
    while size < distinct.max():
        size *= 2
    size = min(size, owned)
    places = padded_rows + np.zeros((shards, 1), np.int32) + np.arange(size, dtype=np.int32)
    buffered = size + np.zeros((shards, 1), np.int32) + np.arange(bound, dtype=np.int32)
    for shard, request in enumerate(requests):
        places[shard, : distinct[shard]] = needed[starts[shard] : starts[shard + 1]]
        owner_start = starts[request // owned]
        buffered[shard, : len(request)] = np.searchsorted(needed, request) - owner_start
    return BufferPlan(places, distinct), buffered


def _part_of_plan(plan: MemoryPlan, part: BatchPart) -> MemoryPlan:
    """The plan of one process, from the plan of all."""

    def of_shards[Plan: (RowPlan, BufferPlan)](whole: Plan) -> Plan:
        return type(whole)(*(None if array is None else part.shards(array) for array in whole))

    return MemoryPlan(
        {layer: of_shards(rows) for layer, rows in plan.rows.items()},
        {layer: SlotPlan(*map(part.tokens, slots)) for layer, slots in plan.slots.items()},
        {layer: of_shards(buffer) for layer, buffer in (plan.buffers or {}).items()},
    )


def exchange_rounds(found: Int32[np.ndarray, "distinct"], capacity: int, owned: int) -> int:
    """The smallest power of two of rounds in which no request exceeds the capacity.

    Round k of n requests the k-th of n equal parts of every owner's rows (see `exchange`). With 2n
    rounds, each part is within a part of n rounds. So a number of rounds that suffices for one
    device also suffices for devices that need fewer.

    Args:
        found: places that one device requests.
        capacity: rows that a pair of devices exchanges in a round.
        owned: rows that each device owns.

    Raises:
        InputError: more than `MOST_ROUNDS` are needed.
    """
    owner, own = np.divmod(found.astype(np.int64), owned)
    rounds = 1
    while np.bincount(owner * rounds + own * rounds // owned).max() > capacity:
        rounds *= 2
    if rounds > MOST_ROUNDS:
        raise InputError(
            f"The rows of a batch are so close to each other in the table that they need {rounds} "
            "rounds of exchange; the hash is degenerate. Choose more rows or another seed."
        )
    return rounds


def _number_distinct(
    keys: Int32[np.ndarray, "n"],
) -> tuple[Int32[np.ndarray, "n"], Int[np.ndarray, "n"], Int32[np.ndarray, "distinct"]]:
    """Numbers the distinct keys in ascending order.

    Returns, in the order of the sorted keys, their numbers and their positions in `keys`; and the
    distinct keys.
    """
    # A sort of 64-bit words (key in the upper half, position in the lower) is several times faster
    # than a stable argsort.
    words = keys.astype(np.int64) << 32
    words |= np.arange(len(keys))
    words.sort()
    positions = words & 0xFFFFFFFF
    ascending = (words >> 32).astype(np.int32)
    is_new = np.empty(len(keys), bool)
    is_new[:1] = True
    np.not_equal(ascending[1:], ascending[:-1], out=is_new[1:])
    return np.cumsum(is_new, dtype=np.int32) - 1, positions, ascending[is_new]


def _split_order(positions: Int[np.ndarray, "n"], parts: int) -> Int32[np.ndarray, "n"]:
    """The sort order of each of `parts` equal parts, from the sort order of all keys."""
    if parts == 1:
        return positions.astype(np.int32)
    part, within = np.divmod(positions, len(positions) // parts)
    return within[np.argsort(part, kind="stable")].astype(np.int32)
