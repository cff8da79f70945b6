"""Programs compiled for TPU slices without TPUs, and the costs that are read from them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import vary

from engram_jax.command_line import load_named_config
from engram_jax.costs.ahead_of_time import (
    Collective,
    Cost,
    abstract_step,
    compile_cost,
    compile_costs,
    read_collectives,
    topology_mesh,
)
from engram_jax.errors import InputError
from engram_jax.memory import lookup
from engram_jax.memory.layout import RecordLayout, Table
from engram_jax.memory.places import exchange_capacity
from engram_jax.memory.plan import RowPlan, SlotPlan
from engram_jax.memory.row_adam import RowAdam, RowAdamConfig, make_row_adam
from engram_jax.program import Program
from engram_jax.sharding import ROWS_SU, TOKENS_BT, MeshConfig
from engram_jax.train_step import make_train_step

TOPOLOGY = "v5p:2x2x1"
TOKENS, COLUMNS = 256, 16  # per chip


@pytest.fixture(scope="module")
def mesh(libtpu: None) -> jax.sharding.Mesh:
    return topology_mesh(TOPOLOGY, MeshConfig(fsdp=2))


def abstract(
    mesh: jax.sharding.Mesh,
    shape: tuple[int, ...],
    dtype: type = jnp.int32,
    spec: jax.P = ROWS_SU,
) -> jax.ShapeDtypeStruct:
    place = jax.NamedSharding(mesh, spec if shape else jax.P())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def compile_memory_part(mesh: jax.sharding.Mesh, width: int, rows: int) -> Cost:
    """Lookup and update of one table as one program."""
    adam: RowAdam = make_row_adam(
        RowAdamConfig(form="exact"), lambda done: jnp.full(jnp.shape(done), 1e-3), 100
    )
    chips, asked = mesh.size, TOKENS * COLUMNS
    layout = RecordLayout(width)
    table = Table(abstract(mesh, (rows, layout.words), jnp.uint32), layout, layer=1)
    plan = RowPlan(
        abstract(mesh, (chips, asked)), abstract(mesh, (chips,)), abstract(mesh, (chips,))
    )
    slots = SlotPlan(*[abstract(mesh, (chips, TOKENS, COLUMNS), spec=TOKENS_BT)] * 2)

    def part(table: Table, plan: RowPlan, slots: SlotPlan, adam: RowAdam, step: jax.Array):
        read = lookup.read_rows(table, plan, adam, step)
        memory, pullback = jax.vjp(lambda rows: lookup.expand(rows, slots), read.values)
        (gradient,) = pullback(memory)
        own = lookup.send_gradients(table, plan, gradient)
        scale = jnp.minimum(1, 1 / own.square_norm)
        return lookup.update_rows(table, plan, gradient, own, read.own, scale, adam, step)

    with jax.set_mesh(mesh):
        jitted = jax.jit(part, donate_argnums=0)
        return compile_cost(jitted, table, plan, slots, adam, abstract(mesh, ()))


def assert_only_gathers_and_scatters_meet(own_rows: int, text: str) -> None:
    """Only the named instructions create an array with the rows that one chip owns."""
    for line in text.splitlines():
        shape = rf"\[{own_rows}(?:,\d+)?\]"
        made = re.match(rf"\s*(?:ROOT )?%[\w.-]+ = (.*?){shape}\S* ([\w-]+)\((.*)", line)
        if not made or made[1].startswith("("):  # tuples only pass on results of other instructions
            continue
        kind, rest = made[2], made[3]
        if kind == "fusion":
            assert re.search(r"op_name=\"[^\"]*scatter", rest), line
        else:
            assert re.fullmatch(
                "parameter|get-tuple-element|bitcast|scatter|gather|while|call", kind
            ), line
    assert re.search(rf"\[{own_rows},\d+\]", text)


@pytest.mark.slow
def test_the_exchange_sends_a_fraction_of_what_xlas_own_partitioning_sends(
    mesh: jax.sharding.Mesh,
) -> None:
    """Devices exchange the requested rows, instead of an all-reduce of all rows.

    Only gathers and scatters access the table, which is too large for on-chip memory.
    """
    width, rows = 80, 3_200_000
    ours = compile_memory_part(mesh, width, rows)
    assert_only_gathers_and_scatters_meet(rows // mesh.size, ours.text)
    assert {part.kind for part in ours.collectives} == {"all-to-all", "all-reduce"}
    for part in ours.collectives:
        assert part.kind == "all-to-all" or part.sent <= 2 * 8, part  # scalars
        assert part.group == mesh.size
    # Rows, gradients in the other direction, and row numbers: lookup and update ask once.
    sent_rows = (mesh.size - 1) * exchange_capacity(TOKENS * COLUMNS, mesh.size, rows // mesh.size)
    assert ours.sent == pytest.approx(sent_rows * (2 * width + 1) * 4, rel=1e-3)
    assert ours.sent < 1.3 * TOKENS * COLUMNS * (2 * width + 1) * 4


def compile_step(width: int, rows: int, sizes: dict[str, int]) -> Cost:
    """The step of a small model with a table that is too large for on-chip memory."""
    config = vary(
        load_named_config("default"),
        model={"width": 64, "layers": 2, "feed_forward": 128},
        memory={
            "row_width": width,
            "rows_per_head": (rows, rows),
            "adam": RowAdamConfig(form="exact"),
        },
        mesh=sizes,
    )
    mesh = topology_mesh(TOPOLOGY, config.mesh)
    program = Program.of_sizes(config, mesh)
    state, batch = abstract_step(program)
    with jax.set_mesh(mesh):
        cost = compile_cost(make_train_step(program), state, batch, program.abstract_row_adam())
    assert_only_gathers_and_scatters_meet(program.ngram_hash.padded_rows[0] // mesh.size, cost.text)
    return cost


@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
def test_with_sequences_on_several_chips_only_gathers_and_scatters_meet_the_table() -> None:
    compile_step(256, 200_000, {"context": 2})


@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
def test_on_v5p_a_step_does_not_grow_with_the_table(mesh: jax.sharding.Mesh) -> None:
    """To 0.2 %, because the compiler keeps small masks in on-chip memory for some R only."""
    costs = [compile_step(80, rows, {"fsdp": 2}) for rows in (200_000, 800_000)]
    growth = abs(costs[1].temporaries - costs[0].temporaries)
    assert growth <= 0.002 * costs[0].temporaries
    assert growth < 0.1 * (16 * 600_000 / mesh.size)  # bytes per row


@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
def test_the_whole_step_of_the_default_run_compiles() -> None:
    config = load_named_config("default")
    program = Program.of_sizes(config, topology_mesh(TOPOLOGY, config.mesh))
    costs = dict(compile_costs(program))
    assert set(costs) == {"first state", "lookup", "row update", "optimizer", "training step"}
    step = costs["training step"]
    assert step.temporaries > costs["lookup"].temporaries > 0
    assert step.sent > 4 * 3_000_000  # every parameter's gradient is summed over the chips
    rows = program.ngram_hash.padded_rows[0]
    assert step.arguments > rows * config.memory.layout.words * 4 / program.mesh.size
    first_state = costs["first state"].text  # every chip draws only its own rows
    assert f"[{rows // program.mesh.size}," in first_state and f"[{rows}," not in first_state


@pytest.mark.slow
def test_what_a_loop_over_layers_sends_is_counted_for_every_layer(mesh: jax.sharding.Mesh) -> None:
    """The compiled program contains each collective once, and its trip count elsewhere."""
    model = {"width": 128, "layers": 5, "feed_forward": 256, "scan": True}
    config = vary(
        load_named_config("dense"), model=model | {"remat": "nothing_saveable"}, mesh={"fsdp": 2}
    )
    program = Program.of_sizes(config, mesh)
    state, batch = abstract_step(program)
    with jax.set_mesh(mesh):
        cost = compile_cost(make_train_step(program), state, batch, program.abstract_row_adam())
    assert {part.trips for part in cost.collectives} == {1, 5}
    # Half of its parameters is gathered twice; gradients need at least as many bytes.
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params["blocks"][0]))
    layer = sum(part.sent for part in cost.collectives if part.trips == 5)
    assert layer > 4 * size


@pytest.mark.usefixtures("libtpu")
def test_rows_that_do_not_fill_lanes_are_refused_on_tpu() -> None:
    config = vary(load_named_config("default"), memory={"row_width": 16})
    with pytest.raises(InputError, match=r"64 words.*minimum is 22"):
        Program.of_sizes(config, topology_mesh(TOPOLOGY, config.mesh))


@pytest.mark.usefixtures("libtpu")
def test_an_unknown_topology_is_refused() -> None:
    with pytest.raises(InputError, match="v9z:2x2"):
        topology_mesh("v9z:2x2", MeshConfig())


def test_collectives_are_read_with_groups_trips_and_bytes() -> None:
    text = """
HloModule jit_f

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gather.1 = f32[8,4]{1,0} all-gather(%x), replica_groups={{0,1},{2,3}}, dimensions={0}
}

%inner.2 (p: f32[4]) -> f32[4] {
  %sum.1 = bf16[16]{0} all-reduce(%y), replica_groups=[2,4]<=[8], to_apply=%add
}

%counted.4 (p: f32[4]) -> f32[4] {
  %swap.4 = f32[10]{0} all-to-all(%y), replica_groups=[2,4]<=[8]
}

%below.5 (p: (s32[], f32[8])) -> pred[] {
  %most.1 = s32[]{:T(128)} constant(7)
  ROOT %less.1 = pred[]{:T(512)} compare(%number, %most.1), direction=LT
}

ENTRY %main.3 (a: f32[8]) -> f32[8] {
  %many.1 = (f32[1000]{0}, f32[10]{0}) all-reduce-start(%p, %q), replica_groups=[2,4]<=[8]
  %many.2 = (f32[1000]{0}, f32[10]{0}) all-reduce-done(%many.1)
  %pair.1 = ((f32[2]{0}, s32[3]{0}), (f32[8]{0}, s32[12]{0})) all-gather-start(%p, %q), GROUPS
  %next.1 = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%p), PAIRS
  %swap.1 = s32[4,6]{1,0} all-to-all(%a), replica_groups=mesh['data'=2,'fsdp'=2] {'data','fsdp'}
  %loop.1 = (s32[], f32[8]) while(%t), condition=%cond.1, body=%body.1, KNOWN
  %loop.2 = (s32[], f32[8]) while(%t), condition=%cond.2, body=%inner.2
  %loop.3 = (s32[], f32[8]) while(%t), condition=%below.5, body=%counted.4
}
"""
    for short, whole in (
        ("KNOWN", 'backend_config={"known_trip_count":{"n":"30"}}'),
        ("GROUPS", "replica_groups=[2,4]<=[8]"),
        ("PAIRS", "source_target_pairs={{0,1},{1,0}}"),
    ):
        text = text.replace(short, whole)
    found = list(read_collectives(text))
    assert found == [
        Collective("all-gather", "f32[8,4]{1,0}", 2, 30, 64),
        Collective("all-reduce", "bf16[16]{0}", 4, 0, 48),
        Collective("all-to-all", "f32[10]{0}", 4, 7, 30),
        Collective("all-reduce", "(f32[1000]{0}, f32[10]{0})", 4, 1, 6060),
        Collective("all-gather", "f32[8]{0}, s32[12]{0}", 4, 1, 60),
        Collective("collective-permute", "f32[6]{0}", 1, 1, 24),
        Collective("all-to-all", "s32[4,6]{1,0}", 4, 1, 72),
    ]
    assert (
        np.sum([part.sent * part.trips for part in found]) == 64 * 30 + 30 * 7 + 6060 + 60 + 24 + 72
    )
