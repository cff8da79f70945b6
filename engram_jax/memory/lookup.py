"""Tables to memory vectors and back: read the distinct rows, spread them, sum, update.

`read_rows` brings each device the distinct rows that its tokens need; `expand` spreads them to
tokens, and its backward pass sums the gradients of equal rows; `own_gradients` brings those to the
devices that own the rows, and `update_rows` takes the optimizer's step there. Everything runs on a
mesh (of one device, too), and nothing but gathers and scatters touches an array of R rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from engram_jax.memory import records
from engram_jax.memory.exchange import Route
from engram_jax.memory.layout import Table
from engram_jax.memory.plan import RowPlan, SlotPlan
from engram_jax.memory.row_adam import RowAdam
from engram_jax.sharding import TOKEN_AXES
from pallas_kernels import hashed_gather
from pallas_kernels.hashed_gather import GatherImplementation

PART = 8192  # rows gathered at a time, where only a part of them is kept
_BY_DEVICE = jax.P(TOKEN_AXES)  # tables by R, plans by S, tokens by B


class ReadRows(NamedTuple):
    """The distinct rows of a step.

    Attributes:
        values: what the forward pass reads.
        own: the same for the rows that a device owns, for `update_rows` of the same step, so that
            pending updates are computed once a step. None for lazy Adam, which has none; and on
            several devices, where the rows that an owner is asked for repeat, and come in another
            order than its gradients.
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
    """Each device's distinct rows, as the forward pass of step `step` + 1 reads them.

    The row optimizer applies pending updates to this copy; the table stays as it is. Padding reads
    as zero.

    Args:
        table: the table.
        plan: the step's rows.
        adam: the row optimizer.
        step: optimizer steps done.
        gather: how records are read; None is "xla".
    """

    def read_own(table: Table, plan: RowPlan, adam: RowAdam, step: Array) -> ReadRows:
        route = _route(table, plan)
        if route.shards == 1:
            if adam.tail is None:
                return ReadRows(records.read_values(table, route.places, gather)[None], None)
            current = adam.current(records.read(table, route.places, gather), step)[None]
            return ReadRows(current, current)

        def answer(own_rows: Int32[Array, "n"]) -> Float[Array, "n F"]:
            if adam.tail is None:
                return records.read_values(table, own_rows, gather)
            # In parts: a record is three times as large as what is sent of it.
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


def expand(
    rows: Float[Array, "S U F"],
    plan: SlotPlan,
    gather: GatherImplementation | None = None,
) -> Float[Array, "B T E"]:
    """Spreads rows to the memory vector of every token of a micro-batch: its H rows, order-major.

    Args:
        rows: each device's distinct rows, as `read_rows` gives them.
        plan: slots and order of one micro-batch: arrays [B, T, H].
        gather: how rows are read; None is "xla".
    """

    def expand_own(rows: Array, slots: Array, order: Array) -> Float[Array, "B T E"]:
        return hashed_gather.expand(rows[0], slots, order.reshape(-1), implementation=gather)

    # Kernels do not tell JAX over which axes their results vary; all vary over all here.
    return jax.shard_map(expand_own, in_specs=_BY_DEVICE, out_specs=_BY_DEVICE, check_vma=False)(
        rows, *plan
    )


@no_type_check  # at run time: as a pytree it also holds shapes and shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OwnGradients:
    """Row gradients with their owners: what the first round brought, and the norm of all rounds.

    Attributes:
        rows: distinct own row numbers of every device, ascending; padding from R / S up.
        sums: their gradients, summed over all devices.
        square_norm: squared norm of all rows' gradients, those of later rounds included.
    """

    rows: Int32[Array, "S n"]
    sums: Float[Array, "S n F"]
    square_norm: Float[Array, ""]


def own_gradients(table: Table, plan: RowPlan, gradient: Float[Array, "S U F"]) -> OwnGradients:
    """Brings the row gradients of all devices to the rows' owners, and sums those of equal rows."""

    def deliver_own(table: Table, plan: RowPlan, gradient: Array) -> OwnGradients:
        route = _route(table, plan)
        if route.shards == 1:
            rows, sums = route.places, gradient[0]
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
    own_gradients: OwnGradients,
    own_values: Float[Array, "S U F"] | None,
    scale: Float[Array, ""],
    adam: RowAdam,
    step: Int32[Array, ""],
) -> Table:
    """The table after step `step` + 1; donate the table, so that it is updated in place.

    Args:
        table: the table.
        plan: the step's rows.
        gradient: each device's row gradients, from which later rounds are delivered again.
        own_gradients: what the function of that name made of them.
        own_values: `ReadRows.own` of this step's `read_rows`.
        scale: factor of all gradients (clipping).
        adam: the row optimizer.
        step: optimizer steps done before this one.
    """

    def update_own(
        table: Table,
        plan: RowPlan,
        gradient: Array,
        own_gradients: OwnGradients,
        own_values: Array | None,
        scale: Array,
        adam: RowAdam,
        step: Array,
    ) -> Table:
        def write_part(table: Table, part: tuple[Array, Array, Array | None]) -> Any:
            rows, sums, current = part
            state = adam.apply_pending(records.read(table, rows), step, current)
            new = adam.apply_gradient(state, sums * scale, step)
            return records.write(table, rows, new, step), None

        def write(table: Table, rows: Array, sums: Array, current: Array | None) -> Table:
            size = min(PART, len(rows))
            padding = len(table.records) + 1 + len(rows)
            rows = _split(rows, size, padding + jnp.arange(-len(rows) % size, dtype=jnp.int32))
            parts = rows, *jax.tree.map(lambda array: _split(array, size), (sums, current))
            return jax.lax.scan(write_part, table, parts)[0]

        def write_further(state: tuple[Array, Table]) -> tuple[Array, Table]:
            number, table = state
            return number + 1, write(table, *route.deliver(number, gradient[0]), None)

        route = _route(table, plan)
        current = None if own_values is None else own_values[0]
        table = write(table, own_gradients.rows[0], own_gradients.sums[0], current)
        return table if route.shards == 1 else _further_rounds(route, write_further, table)

    by_device = OwnGradients(_BY_DEVICE, _BY_DEVICE, jax.P())  # type: ignore[arg-type]
    everywhere = jax.P()
    return jax.shard_map(
        update_own,
        in_specs=(*[_BY_DEVICE] * 3, by_device, _BY_DEVICE, *[everywhere] * 3),
        out_specs=_BY_DEVICE,
    )(table, plan, gradient, own_gradients, own_values, scale, adam, step)


def shard_load(table: Table, plan: RowPlan) -> Float[Array, ""]:
    """Rows asked of the fullest device, over the mean of all; 1 on one device.

    A row that several devices ask for counts for each, as it is sent to each.
    """

    def load_own(table: Table, plan: RowPlan) -> Float[Array, ""]:
        return _route(table, plan).load()

    return jax.shard_map(load_own, in_specs=_BY_DEVICE, out_specs=jax.P())(table, plan)


def settle(
    table: Table, adam: RowAdam, step: Int32[Array, ""], *, keep_moments: bool = False
) -> Table:
    """A table whose rows have no pending updates after `step` steps.

    For use where another optimizer or schedule takes over. Works in parts, in place: the table is
    donated. Checkpoints hold tables with their pending updates, because applying those twice is
    not bit for bit the same as once.

    Args:
        table: the table.
        adam: the optimizer whose updates are pending.
        step: optimizer steps done.
        keep_moments: keep moments and clocks; otherwise the rows start anew, as at step 0.
    """

    def settle_own(table: Table, adam: RowAdam, step: Array) -> Table:
        layout, size = table.layout, min(PART, len(table.records))

        def settle_part(number: Array, words: Array) -> Array:
            # The last part overlaps the one before it, whose rows are not settled a second time.
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

    everywhere = jax.P()
    settle_all = jax.shard_map(
        settle_own, in_specs=(_BY_DEVICE, everywhere, everywhere), out_specs=_BY_DEVICE
    )
    return jax.jit(settle_all, donate_argnums=0)(table, adam, step)


def _route(table: Table, plan: RowPlan) -> Route:
    """This device's distinct rows; inside `shard_map`, where R is what it owns."""
    rounds = jax.lax.pmax(plan.rounds[0], TOKEN_AXES)
    return Route(plan.places[0], rounds, len(table.records), TOKEN_AXES)


def _further_rounds[State](
    route: Route, body: Callable[[tuple[Array, State]], tuple[Array, State]], state: State
) -> State:
    """Runs rounds 1, 2, … of the exchange, of which there are mostly none."""
    return jax.lax.while_loop(lambda carry: carry[0] < route.rounds, body, (jnp.int32(1), state))[1]


def _in_parts(
    function: Callable[[Int32[Array, "part"]], Float[Array, "part F"]], rows: Int32[Array, "n"]
) -> Float[Array, "n F"]:
    """Applies a function of row numbers to `PART` of them at a time."""
    if len(rows) <= PART:
        return function(rows)
    parts = jax.lax.map(function, _split(rows, PART))
    return parts.reshape(-1, parts.shape[-1])[: len(rows)]


def _split(
    array: Array, size: int, padding: Array | None = None
) -> Shaped[Array, "parts {size} ..."]:
    """The array in parts of `size`; what fills the last one is `padding`, or zeros."""
    missing = -len(array) % size
    if padding is None:
        padding = jnp.zeros((missing, *array.shape[1:]), array.dtype)
    return jnp.concatenate([array, padding]).reshape(-1, size, *array.shape[1:])
