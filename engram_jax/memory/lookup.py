"""From tables to memory vectors and back.

`read_rows` gives each device the distinct rows that its tokens need. `expand` copies them to
tokens; its backward pass sums the gradients of equal rows. `send_gradients` sends these to the
devices that own the rows, and `update_rows` applies the row optimizer there. All of them run on a
mesh, which may have one device. Only gathers and scatters access arrays of R rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from engram_jax.memory import records
from engram_jax.memory.exchange import Route
from engram_jax.memory.layout import RowState, Table
from engram_jax.memory.plan import RowPlan, SlotPlan
from engram_jax.memory.row_adam import RowAdam
from engram_jax.memory.store_table import StoreTable
from engram_jax.sharding import TOKEN_AXES, TOKENS_BT
from pallas_kernels import hashed_gather
from pallas_kernels.hashed_gather import GatherImplementation

PART = 8192  # rows per part, where work in parts saves memory
_BY_DEVICE = jax.P(TOKEN_AXES)  # tables by R, plans by S


class ReadRows(NamedTuple):
    """The distinct rows of a step.

    Attributes:
        values: the rows that the forward pass reads.
        own: the same for the rows that a device owns. `update_rows` of the same step uses them, so
            that pending updates are computed once per step. None with lazy Adam, which has no
            pending updates, and on several devices, where an owner receives requests in another
            order and with duplicates.
    """

    values: Float[Array, "S U F"]
    own: Float[Array, "S U F"] | None


def read_rows(
    table: Table,
    plan: RowPlan,
    adam: RowAdam,
    step: Int32[Array, ""],
    gather: GatherImplementation | None = None,
) -> ReadRows:
    """Reads each device's distinct rows for the forward pass of step `step` + 1.

    Pending updates are applied to this copy. The table does not change. Padding reads as zero.

    Args:
        table: the table.
        plan: the step's rows.
        adam: the row optimizer.
        step: number of finished optimizer steps.
        gather: implementation of `hashed_gather` that reads records; None is "xla".
    """

    def read_own(table: Table, plan: RowPlan, adam: RowAdam, step: Array) -> ReadRows:
        route = _route(table, plan)
        if route.shards == 1:
            if adam.tail is None:
                return ReadRows(records.read_values(table, route.own_places, gather)[None], None)
            current = adam.current(records.read(table, route.own_places, gather), step)[None]
            return ReadRows(current, current)

        def answer(own_rows: Int32[Array, "n"]) -> Float[Array, "n F"]:
            if adam.tail is None:
                return records.read_values(table, own_rows, gather)
            # In parts, because a record has three times as many words as the embedding, which is
            # all that is sent.
            return _in_parts(
                lambda rows: adam.current(records.read(table, rows, gather), step), own_rows
            )

        def fetch_further(state: tuple[Array, Array]) -> tuple[Array, Array]:
            number, rows = state
            fetched, here = route.fetch(number, answer)
            return number + 1, jnp.where(here[:, None], fetched, rows)

        first, _ = route.fetch(jnp.int32(0), answer)
        return ReadRows(_further_rounds(route, fetch_further, first)[None], None)

    return jax.shard_map(
        read_own,
        in_specs=(_BY_DEVICE, _BY_DEVICE, jax.P(), jax.P()),
        out_specs=_BY_DEVICE,
        check_vma=False,  # see `expand`
    )(table, plan, adam, step)


def read_places(
    table: Table | StoreTable,
    places: Int32[Array, "B T H"],
    adam: RowAdam,
    step: Int32[Array, ""],
    gather: GatherImplementation | None = None,
) -> Float[Array, "B T E"]:
    """The memory vectors of a device's tokens, without a plan, for decoding.

    Pending updates are applied as in `read_rows`. Call it inside `shard_map`. On several devices,
    every device requests its rows from all: for a few tokens, this needs less time than a plan.

    Args:
        table: a device's part of the table, or a table outside the devices.
        places: places of the rows in the complete table.
        adam: the row optimizer.
        step: number of finished optimizer steps.
        gather: implementation of `hashed_gather` that reads records; None is "xla".
    """

    flat = places.reshape(-1)
    if isinstance(table, StoreTable):
        rows = _in_parts(lambda rows: current_values(table.read(rows), adam, step), flat)
        return rows.reshape(*places.shape[:2], -1)

    def read_own(rows: Int32[Array, "n"]) -> Float[Array, "n F"]:
        if adam.tail is None:
            return records.read_values(table, rows, gather)
        return adam.current(records.read(table, rows, gather), step)

    owned = len(table.records)
    if jax.lax.axis_size(TOKEN_AXES) == 1:
        rows = _in_parts(read_own, flat)
    else:
        requested = jax.lax.all_gather(flat, TOKEN_AXES, tiled=True)
        own = requested - owned * jax.lax.axis_index(TOKEN_AXES)
        here = (own >= 0) & (own < owned)
        answers = _in_parts(read_own, jnp.where(here, own, owned))
        # One device has the row, and the others send zeros. Bits are summed, not numbers, because
        # the float sum −0 + 0 is +0.
        bits = jax.lax.bitcast_convert_type(answers, jnp.uint32)
        bits = jnp.where(here[:, None], bits, 0)
        bits = jax.lax.psum_scatter(bits, TOKEN_AXES, tiled=True)
        rows = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return rows.reshape(*places.shape[:2], -1)


def current_values(rows: RowState, adam: RowAdam, step: Int32[Array, ""]) -> Float[Array, "n F"]:
    """The embeddings of rows that were read outside the devices, with pending updates."""
    return rows.value if adam.tail is None else adam.current(rows, step)


def expand(
    rows: Float[Array, "S U F"],
    plan: SlotPlan,
    gather: GatherImplementation | None = None,
) -> Float[Array, "B T E"]:
    """Copies rows to the memory vectors of a micro-batch: H rows per token, order-major.

    Args:
        rows: each device's distinct rows, from `read_rows`.
        plan: slots and order of one micro-batch, arrays [B, T, H].
        gather: implementation of `hashed_gather`; None is "xla".
    """

    def expand_own(rows: Array, slots: Array, order: Array) -> Float[Array, "B T E"]:
        return hashed_gather.expand(rows[0], slots, order.reshape(-1), implementation=gather)

    # check_vma is off, because kernels do not declare that their results vary over every mesh axis.
    specs = _BY_DEVICE, TOKENS_BT, TOKENS_BT
    return jax.shard_map(expand_own, in_specs=specs, out_specs=TOKENS_BT, check_vma=False)(
        rows, *plan
    )


@no_type_check  # no checks at run time: as a pytree it may also hold shapes or shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OwnGradients:
    """Row gradients on the owners of the rows: of the first round, and the norm of all rounds.

    Attributes:
        rows: distinct own places of every device, ascending; padding from R / S up.
        sums: their gradients, summed over all devices.
        square_norm: squared norm of the gradients of all rows, including later rounds.
    """

    rows: Int32[Array, "S n"]
    sums: Float[Array, "S n F"]
    square_norm: Float[Array, ""]


def send_gradients(table: Table, plan: RowPlan, gradient: Float[Array, "S U F"]) -> OwnGradients:
    """Sends the row gradients of all devices to the owners of the rows, and sums equal rows."""

    def deliver_own(table: Table, plan: RowPlan, gradient: Array) -> OwnGradients:
        route = _route(table, plan)
        if route.shards == 1:
            rows, sums = route.own_places, gradient[0]
            return OwnGradients(rows[None], sums[None], jax.lax.psum(jnp.sum(sums**2), TOKEN_AXES))

        def add_norm(state: tuple[Array, Array]) -> tuple[Array, Array]:
            number, total = state
            return number + 1, total + jnp.sum(route.deliver(number, gradient[0])[1] ** 2)

        rows, sums = route.deliver(jnp.int32(0), gradient[0])
        square_norm = _further_rounds(route, add_norm, jnp.sum(sums**2))
        return OwnGradients(rows[None], sums[None], jax.lax.psum(square_norm, TOKEN_AXES))

    return jax.shard_map(
        deliver_own,
        in_specs=_BY_DEVICE,
        out_specs=OwnGradients(_BY_DEVICE, _BY_DEVICE, jax.P()),  # type: ignore[arg-type]
    )(table, plan, gradient)


def update_rows(
    table: Table,
    plan: RowPlan,
    gradient: Float[Array, "S U F"],
    by_owner: OwnGradients,
    own_values: Float[Array, "S U F"] | None,
    scale: Float[Array, ""],
    adam: RowAdam,
    step: Int32[Array, ""],
) -> Table:
    """The table after step `step` + 1. Donate the table, so that it is updated in place.

    Args:
        table: the table.
        plan: the step's rows.
        gradient: each device's row gradients; later rounds of the exchange send them again.
        by_owner: result of `send_gradients` for these gradients.
        own_values: `ReadRows.own` from this step's `read_rows`.
        scale: factor of all gradients (clipping).
        adam: the row optimizer.
        step: number of optimizer steps before this one.
    """

    def update_own(
        table: Table,
        plan: RowPlan,
        gradient: Array,
        by_owner: OwnGradients,
        own_values: Array | None,
        scale: Array,
        adam: RowAdam,
        step: Array,
    ) -> Table:
        def write_further(state: tuple[Array, Table]) -> tuple[Array, Table]:
            number, table = state
            rows, sums = route.deliver(number, gradient[0])
            return number + 1, _write_rows(table, rows, scale * sums, None, adam, step)

        route = _route(table, plan)
        current = None if own_values is None else own_values[0]
        rows, sums = by_owner.rows[0], by_owner.sums[0]
        table = _write_rows(table, rows, scale * sums, current, adam, step)
        return table if route.shards == 1 else _further_rounds(route, write_further, table)

    by_device = OwnGradients(_BY_DEVICE, _BY_DEVICE, jax.P())  # type: ignore[arg-type]
    replicated = jax.P()
    return jax.shard_map(
        update_own,
        in_specs=(*[_BY_DEVICE] * 3, by_device, _BY_DEVICE, *[replicated] * 3),
        out_specs=_BY_DEVICE,
    )(table, plan, gradient, by_owner, own_values, scale, adam, step)


def _write_rows(
    table: Table,
    rows: Int32[Array, "n"],
    gradients: Float[Array, "n F"],
    current: Float[Array, "n F"] | None,
    adam: RowAdam,
    step: Int32[Array, ""],
) -> Table:
    """Applies gradients to own rows, in parts. Call it inside `shard_map`."""
    size = min(PART, len(rows))
    padding = len(table.records) + 1 + len(rows)
    all_rows = _split(rows, size, padding + jnp.arange(-len(rows) % size, dtype=jnp.int32))
    parts = all_rows, *jax.tree.map(lambda array: _split(array, size), (gradients, current))

    def write_part(number: Array, table: Table) -> Table:
        rows, gradients, current = jax.tree.map(lambda array: array[number], parts)
        new = adam.update(records.read(table, rows), gradients, step, current)
        return records.write(table, rows, new, step)

    # Rows are ascending, and padding is last. Parts with only padding are skipped.
    used = jnp.sum(all_rows[:, 0] < len(table.records))
    return jax.lax.fori_loop(0, used, write_part, table)


def shard_load(table: Table, plan: RowPlan) -> Float[Array, ""]:
    """Rows requested from the fullest device, relative to the mean; 1 on one device.

    A row that several devices request counts several times, because it is sent to each.
    """

    def load_own(table: Table, plan: RowPlan) -> Float[Array, ""]:
        return _route(table, plan).load()

    return jax.shard_map(load_own, in_specs=_BY_DEVICE, out_specs=jax.P())(table, plan)


@partial(jax.jit, donate_argnums=0, static_argnames="keep_moments")
def settle(
    table: Table, adam: RowAdam, step: Int32[Array, ""], *, keep_moments: bool = False
) -> Table:
    """Applies the pending updates of all rows of a table.

    For a run that continues with another row optimizer or schedule. It works in parts and in place:
    the table is donated. It is not used before saving a checkpoint, because it changes later rows
    in the last bits (see `RowAdam.apply_pending`).

    Args:
        table: the table.
        adam: the row optimizer before the change.
        step: number of finished optimizer steps.
        keep_moments: keep the moments, decayed to `step`; otherwise reset moments and clocks, as at
            step 0.
    """

    def settle_own(table: Table, adam: RowAdam, step: Array) -> Table:
        # Always two parts or more. XLA fuses, and thus rounds, a loop of one round differently; but
        # a table on the devices and one in a store must be settled to the same bits.
        layout, size = table.layout, min(PART, -(-len(table.records) // 2))

        def settle_part(number: Array, words: Array) -> Array:
            # The last part overlaps with the one before. Rows in both are changed only once.
            start = jnp.minimum(number * size, len(words) - size)
            part = jax.lax.dynamic_slice_in_dim(words, start, size)
            rows = adam.apply_pending(layout.unpack(part), step)
            if not keep_moments:
                rows = jax.tree.map(jnp.zeros_like, rows)._replace(value=rows.value)
            done = start + jnp.arange(size) < number * size
            part = jnp.where(done[:, None], part, layout.pack(rows))
            return jax.lax.dynamic_update_slice_in_dim(words, part, start, 0)

        parts = -(-len(table.records) // size)
        return replace(table, records=jax.lax.fori_loop(0, parts, settle_part, table.records))

    replicated = jax.P()
    settle_all = jax.shard_map(
        settle_own, in_specs=(_BY_DEVICE, replicated, replicated), out_specs=_BY_DEVICE
    )
    return settle_all(table, adam, step)


def _route(table: Table, plan: RowPlan) -> Route:
    """The route of this device's distinct rows. Call it inside `shard_map`."""
    rounds = jax.lax.pmax(plan.rounds[0], TOKEN_AXES)
    buffered = None
    if table.places is not None:
        assert plan.buffered is not None, "a buffer needs the plan of its program's planner"
        buffered = plan.buffered[0]
    return Route(plan.places[0], rounds, table.owned_rows, TOKEN_AXES, buffered)


def _further_rounds[State](
    route: Route, body: Callable[[tuple[Array, State]], tuple[Array, State]], state: State
) -> State:
    """Runs rounds 1, 2, … of the exchange; usually there are none."""
    return jax.lax.while_loop(lambda carry: carry[0] < route.rounds, body, (jnp.int32(1), state))[1]


def _in_parts(
    function: Callable[[Int32[Array, "part"]], Float[Array, "part F"]], rows: Int32[Array, "n"]
) -> Float[Array, "n F"]:
    """Applies a function to `PART` places at a time."""
    if len(rows) <= PART:
        return function(rows)
    parts = jax.lax.map(function, _split(rows, PART))
    return parts.reshape(-1, parts.shape[-1])[: len(rows)]


def _split(
    array: Array, size: int, padding: Array | None = None
) -> Shaped[Array, "parts {size} ..."]:
    """Splits an array into parts of `size`; the last part is filled with `padding`, or zeros."""
    missing = -len(array) % size
    if padding is None:
        padding = jnp.zeros((missing, *array.shape[1:]), array.dtype)
    return jnp.concatenate([array, padding]).reshape(-1, size, *array.shape[1:])
