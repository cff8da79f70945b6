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
from jaxtyping import Array, Float, Int32, UInt32

from engram_jax.memory.exchange import Route
from engram_jax.memory.layout import RowState, Table, mix
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
        own: what each owner keeps of its rows for their update in this step.
    """

    values: Float[Array, "S U F"]
    own: Any = None


def read_rows(
    table: Table,
    plan: RowPlan,
    adam: RowAdam,
    step: Int32[Array, ""],
    gather: GatherImplementation | None = None,
) -> ReadRows:
    """Each device's distinct rows, as the forward pass of step `step` + 1 reads them.

    The row optimizer adds what it owes idle rows to this copy; the table stays as it is.
    Padding reads as zero.

    Args:
        table: the table.
        plan: the step's rows.
        adam: the row optimizer.
        step: optimizer steps done.
        gather: how rows are read that are owed nothing; None is "xla". (Rows that are owed
            something need their moments, too, which XLA reads.)
    """

    def read_own(table: Table, plan: RowPlan, adam: RowAdam, step: Array) -> Float[Array, "1 U F"]:
        loaded = adam.loaded(step)

        def answer(own_rows: Int32[Array, "n"]) -> Float[Array, "n F"]:
            if adam.drift is None:  # nothing is owed
                return hashed_gather.read(
                    table.records, own_rows[:, None], table.layout.value, implementation=gather
                )

            def read(row: Int32[Array, ""]) -> Float[Array, "F"]:
                return loaded.current(_gather(table, row[None]), step)[0]

            # In parts: a record is three times as large as what is sent of it.
            return jax.lax.map(read, own_rows, batch_size=PART)

        route = _route(table, plan)
        if route.shards == 1:
            return answer(route.places)[None]

        def fetch_further(state: tuple[Array, Array]) -> tuple[Array, Array]:
            number, rows = state
            fetched, here = route.fetch(number, answer)
            return number + 1, jnp.where(here[:, None], fetched, rows)

        first, _ = route.fetch(jnp.int32(0), answer)
        return _further_rounds(route, fetch_further, first)[None]

    values = jax.shard_map(
        read_own,
        in_specs=(_BY_DEVICE, _BY_DEVICE, jax.P(), jax.P()),
        out_specs=_BY_DEVICE,
        check_vma=False,  # see `expand`
    )(table, plan, adam, step)
    return ReadRows(values)


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
    own: OwnGradients,
    own_rows: Any,
    scale: Float[Array, ""],
    adam: RowAdam,
    step: Int32[Array, ""],
) -> Table:
    """The table after step `step` + 1; donate the table, so that it is updated in place.

    Args:
        table: the table.
        plan: the step's rows.
        gradient: each device's row gradients, from which later rounds are brought again.
        own: what `own_gradients` made of them.
        scale: what all gradients are multiplied by (clipping).
        adam: the row optimizer.
        step: optimizer steps done before this one.
    """

    def update_own(
        table: Table,
        plan: RowPlan,
        gradient: Array,
        own: OwnGradients,
        scale: Array,
        adam: RowAdam,
        step: Array,
    ) -> Table:
        loaded = adam.loaded(step)

        def write_part(table: Table, part: tuple[Array, Array]) -> tuple[Table, None]:
            rows, sums = part
            new = loaded.update(_gather(table, rows, distinct=True), sums * scale, step)
            return _scatter(table, rows, new, step), None

        def write(table: Table, rows: Array, sums: Array) -> Table:
            missing = -len(rows) % min(PART, len(rows))
            padding = len(table.records) + 1 + len(rows) + jnp.arange(missing, dtype=jnp.int32)
            rows = jnp.concatenate([rows, padding])
            sums = jnp.pad(sums, ((0, missing), (0, 0)))
            size = min(PART, len(rows))
            parts = rows.reshape(-1, size), sums.reshape(-1, size, sums.shape[1])
            return jax.lax.scan(write_part, table, parts)[0]

        def write_further(state: tuple[Array, Table]) -> tuple[Array, Table]:
            number, table = state
            return number + 1, write(table, *route.deliver(number, gradient[0]))

        route = _route(table, plan)
        table = write(table, own.rows[0], own.sums[0])
        return table if route.shards == 1 else _further_rounds(route, write_further, table)

    by_device = OwnGradients(_BY_DEVICE, _BY_DEVICE, jax.P())  # type: ignore[arg-type]
    return jax.shard_map(
        update_own,
        in_specs=(_BY_DEVICE, _BY_DEVICE, _BY_DEVICE, by_device, jax.P(), jax.P(), jax.P()),
        out_specs=_BY_DEVICE,
    )(table, plan, gradient, own, scale, adam, step)


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
    """A table whose rows are owed nothing after `step` steps.

    For where another optimizer or schedule takes over; made in parts, in the memory of
    the table, which is donated. Checkpoints hold tables unsettled: settling twice is not bit for
    bit settling once.

    Args:
        table: the table.
        adam: the optimizer that owes.
        step: optimizer steps done.
        keep_moments: moments and clocks go on; otherwise the rows start anew, as at step 0.
    """

    def settle_own(table: Table, adam: RowAdam, step: Array) -> Table:
        loaded = adam.loaded(step)

        def settle_record(record: UInt32[Array, "words"]) -> UInt32[Array, "words"]:
            rows = loaded.settled(table.layout.unpack(record[None]), step)
            if not keep_moments:
                rows = jax.tree.map(jnp.zeros_like, rows)._replace(value=rows.value)
            return table.layout.pack(rows)[0]

        return replace(table, records=jax.lax.map(settle_record, table.records, batch_size=PART))

    specs = (_BY_DEVICE, jax.P(), jax.P())
    settle_all = jax.shard_map(settle_own, in_specs=specs, out_specs=_BY_DEVICE)
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


def _gather(table: Table, rows: Int32[Array, "n"], *, distinct: bool = False) -> RowState:
    """Reads rows; numbers beyond the table read as zeros."""
    records = table.records.at[rows].get(
        mode="fill", fill_value=0, indices_are_sorted=distinct, unique_indices=distinct
    )
    return table.layout.unpack(records)


def _scatter(table: Table, rows: Int32[Array, "n"], new: RowState, step: Int32[Array, ""]) -> Table:
    """The table with distinct ascending rows replaced; those beyond it are dropped."""
    # Random bits by table, row of the whole table and step, hence the same on every mesh.
    place = rows + jax.lax.axis_index(TOKEN_AXES) * len(table.records)
    noise = mix(mix(place.astype(jnp.uint32)) + mix(step.astype(jnp.uint32)) + table.layer)
    records = table.records.at[rows].set(
        table.layout.pack(new, noise), mode="drop", indices_are_sorted=True, unique_indices=True
    )
    return replace(table, records=records)
