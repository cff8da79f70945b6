"""Lookup with a plan compared with a plain gather, on one device and on eight."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import (
    LAYER,
    LAYOUT,
    MESHES,
    NGRAM_HASH,
    ROWS,
    WIDTH,
    draw_cotangent,
    draw_step,
    draw_table,
    make_adam,
    make_step,
    mesh_of,
    places,
    plan_step,
    put,
    put_plan,
    shared_step,
)

from engram_jax.memory import exchange, lookup, records
from engram_jax.memory import plan as plan_module
from engram_jax.memory.layout import RecordLayout, StorageConfig, Table
from engram_jax.memory.plan import Planner, RowPlan, SlotPlan
from engram_jax.memory.row_adam import RowAdam, RowAdamForm
from engram_jax.sharding import BATCH_ABT, TABLE_RW, TOKEN_AXES


@pytest.mark.parametrize("name", MESHES)
def test_memory_is_the_hashed_rows_bit_for_bit(name: str) -> None:
    tokens, segments = draw_step()
    mesh = mesh_of(name)
    with jax.set_mesh(mesh):
        table = draw_table(mesh)
        plan = plan_step(mesh, tokens, segments)
        step = shared_step("lazy")(table, plan, draw_cotangent(mesh), 0)
        assert step.memory.sharding.spec[1] == BATCH_ABT[1]
    expected = np.asarray(table.unpack().value)[places(tokens, segments)]
    np.testing.assert_array_equal(step.memory, expected.reshape(step.memory.shape))


@pytest.mark.parametrize("name", MESHES)
def test_gradients_are_those_of_a_plain_gather(name: str) -> None:
    """Checked with the first moments after one step, and with the norm."""
    tokens, segments = draw_step()
    at, mesh = places(tokens, segments), mesh_of(name)
    with jax.set_mesh(mesh):
        plan, cotangent = plan_step(mesh, tokens, segments), draw_cotangent(mesh)
        step = shared_step("exact")(draw_table(mesh), plan, cotangent, 0)
    dense = np.zeros((ROWS, WIDTH))
    np.add.at(dense, at.reshape(-1), np.asarray(cotangent, np.float64).reshape(-1, WIDTH))
    assert len(np.unique(at)) < at.size / 2  # there must be many duplicates
    after = step.table.unpack()
    np.testing.assert_allclose(np.asarray(after.mean) / 0.1, dense, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(step.norm, np.linalg.norm(dense), rtol=1e-6)
    np.testing.assert_array_equal(np.flatnonzero(after.clock), np.unique(at))


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("form", ["exact", pytest.param("lazy", marks=pytest.mark.slow)])
def test_all_meshes_make_the_same_step(form: RowAdamForm) -> None:
    """With a used table: memory is equal bit for bit, tables up to rounding."""
    steps = {}
    for name in MESHES:
        mesh = mesh_of(name)
        with jax.set_mesh(mesh):
            table, plan = draw_table(mesh, used=True), plan_step(mesh, *draw_step())
            inputs = table, plan, draw_cotangent(mesh), 12, 0.5
            step = make_step(form)
            steps[name], again = step(*inputs), step(*inputs)
        jax.tree.map(np.testing.assert_array_equal, steps[name], again)
    one, many = steps.values()
    np.testing.assert_array_equal(many.memory, one.memory)
    np.testing.assert_allclose(many.norm, one.norm, rtol=1e-6)
    found, expected = many.table.unpack(), one.table.unpack()
    np.testing.assert_array_equal(found.clock, expected.clock)
    for part, other in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_allclose(part, other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("optimized")
def test_stochastic_rounding_is_the_same_on_every_mesh() -> None:
    """Without gradients, whose sums differ in the last bits, all records are equal."""
    layout = RecordLayout(WIDTH, StorageConfig("bfloat16", "bfloat16", "row"))
    records = {}
    for name in MESHES:
        mesh = mesh_of(name)
        with jax.set_mesh(mesh):
            table = draw_table(mesh, used=True, layout=layout)
            plan, step = plan_step(mesh, *draw_step()), make_step("exact")
            nothing = 0 * draw_cotangent(mesh)
            for done in (12, 13):
                after = step(table, plan, nothing, done).table.records
                records[name, done] = jax.device_get(after)
        assert np.any(records[name, 12] != jax.device_get(table.records))
    for (_, done), found in records.items():
        np.testing.assert_array_equal(found, records["1", done])
    one, other = (layout.unpack(jnp.asarray(records["1", done])) for done in (12, 13))
    assert np.any(one.mean != other.mean)


def test_more_rounds_give_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a capacity far below the requests, no row and no gradient is lost."""
    mesh, plans, steps = mesh_of("2x4"), {}, {}
    inputs = draw_table(mesh, used=True), draw_cotangent(mesh), 12, 0.5
    for capacity, step in ((None, shared_step("exact")), (4, make_step("exact"))):
        if capacity:
            for module in (plan_module, exchange):
                monkeypatch.setattr(module, "exchange_capacity", lambda *_: 4)
        with jax.set_mesh(mesh):
            plans[capacity] = Planner(NGRAM_HASH, shards=8)(*draw_step())
            plan = put_plan(mesh, plans[capacity])
            steps[capacity] = step(inputs[0], plan, *inputs[1:])
    rounds = plans[4].rows[LAYER].rounds
    assert plans[None].rows[LAYER].rounds.max() == 1 and rounds.max() > 2
    assert len(set(rounds)) > 1  # some devices need fewer rounds
    one, more = steps.values()
    np.testing.assert_array_equal(more.memory, one.memory)
    np.testing.assert_allclose(more.norm, one.norm, rtol=1e-6)
    for found, expected in zip(more.table.unpack(), one.table.unpack(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", MESHES)
def test_shard_load_counts_what_every_device_asks_of_each(name: str) -> None:
    tokens, segments = draw_step()
    mesh = mesh_of(name)
    with jax.set_mesh(mesh):
        rows = plan_step(mesh, tokens, segments).rows[LAYER]
        load = jax.jit(lookup.shard_load)(draw_table(mesh), rows)
    asked = np.zeros(mesh.size)
    for part in np.split(places(tokens, segments), mesh.size, axis=1):
        np.add.at(asked, np.unique(part) // (ROWS // mesh.size), 1)
    assert load == pytest.approx(asked.max() / asked.mean(), rel=1e-6)
    assert load == 1 if mesh.size == 1 else load > 1.01


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("form", ["exact", "lazy"])
def test_reading_places_is_reading_with_a_plan(name: str, form: RowAdamForm) -> None:
    """Bit for bit, with rows that contain −0, which a sum with other devices' zeros would lose."""
    tokens, segments = draw_step()
    mesh = mesh_of(name)
    rows = jax.tree.map(np.array, draw_table(mesh_of("1"), used=True).unpack())
    rows.value[:, 2], rows.mean[:, 2] = -0.0, 0.0  # a pending update of −0
    records = LAYOUT.pack(jax.tree.map(jnp.asarray, rows))

    specs = jax.P(TOKEN_AXES), jax.P(TOKEN_AXES), jax.P(), jax.P()
    read_places = jax.shard_map(
        lookup.read_places, in_specs=specs, out_specs=specs[0], check_vma=False
    )

    @jax.jit
    def read(
        table: Table, plan: RowPlan, slots: SlotPlan, at: jax.Array, adam: RowAdam
    ) -> tuple[jax.Array, jax.Array]:
        planned = lookup.read_rows(table, plan, adam, jnp.int32(12)).values
        return lookup.expand(planned, slots), read_places(table, at, adam, jnp.int32(12))

    with jax.set_mesh(mesh):
        table = put(mesh, Table(np.asarray(records), LAYOUT, LAYER))
        plan = plan_step(mesh, tokens, segments)
        slots = jax.tree.map(lambda array: array[0], plan.slots[LAYER])
        at = put(mesh, places(tokens, segments)[0], jax.P(TOKEN_AXES))
        planned, found = read(table, plan.rows[LAYER], slots, at, make_adam(form))
    assert np.asarray(found).tobytes() == np.asarray(planned).tobytes()
    signs = np.signbit(np.asarray(found).reshape(-1, WIDTH)[:, 2])
    assert signs.any() and not np.asarray(found).reshape(-1, WIDTH)[:, 2].any()


@pytest.mark.parametrize("count", [4, records.FEW + 4])
def test_padding_reads_zero_and_not_the_last_row(count: int) -> None:
    """Few rows are copied one by one, and more are gathered."""
    table = jax.tree.map(jnp.asarray, jax.device_get(draw_table(mesh_of("1"), used=True)))
    read = records.read(table, jnp.resize(jnp.array([0, ROWS - 1, ROWS, ROWS + 1]), count))
    for part, stored in zip(read, table.unpack(), strict=True):
        np.testing.assert_array_equal(part[:2], stored[jnp.array([0, -1])])
        assert not np.any(part[2:4])


@pytest.mark.parametrize("form", ["exact", "lazy"])
def test_a_named_gather_reads_the_same_rows(form: RowAdamForm) -> None:
    mesh = mesh_of("1")
    with jax.set_mesh(mesh):
        inputs = draw_table(mesh, used=True), plan_step(mesh, *draw_step()).rows[LAYER]
        read = jax.jit(lookup.read_rows, static_argnums=4)
        named, unnamed = (
            read(*inputs, make_adam(form), jnp.int32(12), gather).values
            for gather in ("reference", None)
        )
    np.testing.assert_array_equal(named, unnamed)


@pytest.mark.parametrize("name", MESHES)
def test_settling_is_reading_all_rows(name: str) -> None:
    tokens, mesh = draw_step(), mesh_of(name)
    with jax.set_mesh(mesh):
        table = draw_table(mesh, used=True)
        before = table.unpack().value
        plan = plan_step(mesh, *tokens)
        step = shared_step("exact")(table, plan, draw_cotangent(mesh), 12)
        settled = lookup.settle(table, make_adam("exact"), jnp.int32(12))
        assert settled.records.sharding.is_equivalent_to(step.table.records.sharding, 2)
    assert table.records.is_deleted()  # the new table uses its memory
    value, *state = settled.unpack()
    expected = np.asarray(value)[places(*tokens)].reshape(step.memory.shape)
    np.testing.assert_array_equal(step.memory, expected)
    assert not any(np.any(part) for part in state)
    assert np.abs(value - before).max() > 1e-3


@pytest.mark.usefixtures("optimized")
def test_settling_takes_less_than_64_MB_beside_the_table() -> None:
    mesh, layout = mesh_of("1"), RecordLayout(80)
    place = jax.NamedSharding(mesh, TABLE_RW)
    records = jax.ShapeDtypeStruct((1 << 22, layout.words), jnp.uint32, sharding=place)  # 4 GB
    with jax.set_mesh(mesh):
        settle = jax.jit(lookup.settle, donate_argnums=0)
        inputs = Table(records, layout, LAYER), make_adam("exact"), jnp.int32(12)
        memory = settle.lower(*inputs).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 64 << 20
    assert memory.alias_size_in_bytes == records.size * 4


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("form", ["exact", "lazy"])
def test_only_gathers_and_scatters_meet_the_whole_table(name: str, form: RowAdamForm) -> None:
    """In the compiled step, no operation visits all rows, and donated tables are updated in place.

    The exchange is an all-to-all. No all-reduce has the size of the memory.
    """
    mesh = mesh_of(name)
    with jax.set_mesh(mesh):
        step = make_step(form).__wrapped__
        jitted = jax.jit(lambda *inputs, adam: step(*inputs, adam=adam), donate_argnums=0)
        inputs = plan_step(mesh, *draw_step()), draw_cotangent(mesh), jnp.int32(3)
        compiled = jitted.lower(draw_table(mesh), *inputs, adam=make_adam(form)).compile()
    rows, text = ROWS // mesh.size, compiled.as_text()
    shape = rf"(\w+)\[{rows}[,\]]"
    allowed = r"parameter|get-tuple-element|tuple|scatter|gather|bitcast|while|fusion|call"
    for line in text.splitlines():
        if made := re.match(rf"\s*(?:ROOT )?%?[\w.-]+ = {shape}\S* (\w[\w-]*)\(", line):
            assert re.fullmatch(allowed, made.group(2)), line
    assert compiled.memory_analysis().alias_size_in_bytes == rows * LAYOUT.words * 4
    kinds = re.findall(
        r"= (.+?) (all-to-all|all-reduce|all-gather|collective-permute|reduce-scatter)\(", text
    )
    assert {"all-reduce"} <= {kind for _, kind in kinds} <= {"all-to-all", "all-reduce"}
    for shape, kind in kinds:
        assert kind == "all-to-all" or not re.search(r"\[\d", shape), (kind, shape)  # scalars


@pytest.mark.parametrize("form", ["exact", "lazy"])
def test_a_row_that_no_device_asks_for_stays_bit_for_bit(form: RowAdamForm) -> None:
    tokens, segments = draw_step()
    mesh = mesh_of("2x4")
    with jax.set_mesh(mesh):
        table = draw_table(mesh, used=True)
        plan = plan_step(mesh, tokens, segments)
        after = shared_step(form)(table, plan, draw_cotangent(mesh), 12)
    idle = np.setdiff1d(np.arange(ROWS), places(tokens, segments))
    for one, other in zip(jax.tree.leaves(table), jax.tree.leaves(after.table), strict=True):
        assert np.asarray(one)[idle].tobytes() == np.asarray(other)[idle].tobytes()


def test_nan_in_padding_reaches_no_row() -> None:
    mesh, adam = mesh_of("1"), make_adam("exact")

    @jax.jit
    def update(table: Table, plan: RowPlan, gradient: jax.Array) -> Table:
        step = jnp.int32(0)
        read = lookup.read_rows(table, plan, adam, step)
        own = lookup.send_gradients(table, plan, gradient)
        own = replace(own, square_norm=jnp.float32(1))
        return lookup.update_rows(table, plan, gradient, own, read.own, jnp.float32(1), adam, step)

    with jax.set_mesh(mesh):
        plan = plan_step(mesh, *draw_step()).rows[LAYER]
        gradient = np.full((1, plan.places.shape[1], WIDTH), np.nan, np.float32)
        gradient[:, : int(plan.distinct[0])] = 1.0
        new = update(draw_table(mesh), plan, put(mesh, gradient))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
