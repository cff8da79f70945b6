"""Compares the exchange on a TPU slice with XLA's own partitioned gather. No TPU is needed.

    python -m benchmarks.exchange [--topology v5p:4x4x4]

The table is one of Engram-27B's (16 hash columns of 2,262,500 rows of width 80), with exact row
Adam. Every chip requests the rows of 4,096 tokens. Prints, per chip, the bytes sent over the
interconnect, and the bytes of temporary buffers. XLA's gather is `table.at[numbers].get()` of a
table that holds only embeddings, split by row. Needs libtpu (`pip install -e '.[tpu]'`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array

from engram_jax.command_line import run_function
from engram_jax.costs.ahead_of_time import Cost, compile_cost, topology_mesh
from engram_jax.memory import lookup
from engram_jax.memory.layout import RecordLayout, Table
from engram_jax.memory.plan import RowPlan, SlotPlan
from engram_jax.memory.row_adam import RowAdamConfig, make_row_adam
from engram_jax.sharding import ROWS_SU, TOKEN_AXES, TOKENS_BT, MeshConfig

COLUMNS, WIDTH = 16, 80
ROWS = -(-COLUMNS * 2_262_500 // 4096) * 4096


class Costs(NamedTuple):
    """Costs of one step on one chip.

    Attributes:
        lookup: fetching the distinct rows, and copying them to [T, E] in bfloat16.
        update: sending row gradients to their owners, and exact row Adam.
        gather: XLA's gather, by dtype of the table.
    """

    lookup: Cost
    update: Cost
    gather: dict[str, Cost]


def measure(topology: str, tokens: int, rows: int = ROWS) -> Costs:
    """Compiles the three programs.

    Args:
        topology: such as "v5p:4x4x4".
        tokens: tokens per chip.
        rows: rows of the table.
    """
    mesh = topology_mesh(topology, MeshConfig())
    chips, asked = mesh.size, tokens * COLUMNS
    adam = make_row_adam(
        RowAdamConfig(form="exact"), lambda done: jnp.full(jnp.shape(done), 1e-3), 100
    )

    def abstract(*shape: int, dtype: Any = jnp.int32, spec: jax.P = ROWS_SU) -> Any:
        place = jax.NamedSharding(mesh, spec if shape else jax.P())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    layout = RecordLayout(WIDTH)
    table = Table(abstract(rows, layout.words, dtype=jnp.uint32), layout, layer=0)
    plan = RowPlan(abstract(chips, asked), abstract(chips), abstract(chips))
    slots = SlotPlan(*[abstract(chips, tokens, COLUMNS, spec=TOKENS_BT)] * 2)
    gradient = abstract(chips, asked, WIDTH, dtype=jnp.float32)

    def look_up(table: Table, plan: RowPlan, slots: SlotPlan, step: Array) -> Array:
        read = lookup.read_rows(table, plan, adam, step)
        return lookup.expand(read.values, slots).astype(jnp.bfloat16)

    def update(table: Table, plan: RowPlan, gradient: Array, step: Array) -> Table:
        own = lookup.send_gradients(table, plan, gradient)
        return lookup.update_rows(table, plan, gradient, own, None, jnp.float32(1), adam, step)

    with jax.set_mesh(mesh):
        ours = (
            compile_cost(jax.jit(look_up), table, plan, slots, abstract()),
            compile_cost(jax.jit(update, donate_argnums=0), table, plan, gradient, abstract()),
        )
    return Costs(*ours, _gather(mesh, rows, tokens))


def _gather(mesh: jax.sharding.Mesh, rows: int, tokens: int) -> dict[str, Cost]:
    free = jax.sharding.Mesh(
        mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names)
    )
    by_row = jax.NamedSharding(free, jax.P(TOKEN_AXES))
    numbers = jax.ShapeDtypeStruct((mesh.size * tokens, COLUMNS), jnp.int32, sharding=by_row)
    gather = jax.jit(
        lambda table, numbers: table.at[numbers].get(mode="clip"), out_shardings=by_row
    )
    return {
        dtype: compile_cost(
            gather, jax.ShapeDtypeStruct((rows, WIDTH), dtype, sharding=by_row), numbers
        )
        for dtype in ("bfloat16", "float32")
    }


def main(topology: str = "v5p:4x4x4", tokens: int = 4096) -> None:
    """Compiles and prints.

    Args:
        topology: TPU generation and shape.
        tokens: tokens per chip.
    """
    jax.config.update("jax_platforms", "cpu")
    costs = measure(topology, tokens)
    print(f"{topology}, {ROWS:,} rows of {WIDTH}, {tokens:,} tokens per chip; MB per chip and step")
    print(f"{'':<26}{'sent':>10}{'temporaries':>14}")
    named = {"lookup": costs.lookup, "row update": costs.update}
    named |= {f"XLA's gather, {dtype}": cost for dtype, cost in costs.gather.items()}
    for name, cost in named.items():
        print(f"{name:<26}{cost.sent / 1e6:>10,.1f}{cost.temporaries / 1e6:>14,.1f}")
    least = costs.gather["bfloat16"]
    print(
        f"\nXLA's gather in bfloat16 sends {least.sent / costs.lookup.sent:.0f} × as many bytes as "
        f"the lookup, with {least.temporaries / costs.lookup.temporaries:.1f} × its temporaries."
    )


if __name__ == "__main__":
    run_function(main)
