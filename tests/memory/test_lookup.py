"""Lookup through the plan against a plain gather of the table, on one device and on eight."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from engram_jax.compression import VocabularyProjection
from engram_jax.hashing import HashSpec, NgramHash
from engram_jax.memory.lookup import expand, gather_rows
from engram_jax.memory.plan import MemoryPlan, Planner
from engram_jax.sharding import BATCH_ABT, PLAN_AOBT, TABLE_RF, WHOLE, MeshConfig, make_mesh

LAYER, WIDTH = 1, 6
SPEC = HashSpec(layers=(LAYER,), max_order=3, heads=3, rows_per_head=(97, 101))
NGRAM_HASH = NgramHash.build(SPEC, VocabularyProjection.identity(20))
ROWS = NGRAM_HASH.padded_rows[0]


@pytest.fixture
def step() -> tuple[np.ndarray, np.ndarray]:
    """Tokens [2, 8, 12] with dead positions, and their segments."""
    generator = np.random.default_rng(0)
    tokens = np.minimum(generator.geometric(0.3, (2, 8, 12)) - 1, 19).astype(np.int32)
    tokens[generator.random(tokens.shape) < 0.05] = -1
    return tokens, np.cumsum(generator.random(tokens.shape) < 0.15, axis=-1, dtype=np.int32)


@pytest.fixture
def table() -> Array:
    return jax.random.normal(jax.random.key(0), (ROWS, WIDTH))


def put(plan: MemoryPlan, mesh: jax.sharding.Mesh | None) -> MemoryPlan:
    if mesh is None:
        return jax.tree.map(jnp.asarray, plan)
    place = {spec: jax.NamedSharding(mesh, spec) for spec in (PLAN_AOBT, WHOLE)}
    tokens = jax.device_put(plan.tokens, place[PLAN_AOBT])
    return jax.device_put(plan._replace(tokens=None), place[WHOLE])._replace(tokens=tokens)


def look_up(gathered: Array, plan: MemoryPlan) -> Array:
    """Memory [A, B, T, E] of all micro-batches."""
    return jax.lax.map(lambda part: expand(gathered, plan.layers[LAYER], part), plan.tokens)


def memory_and_gradient(
    table: Array, plan: MemoryPlan, cotangent: Array
) -> tuple[Array, Array, Array]:
    """The gathered rows, the memory, and the gradient of the gathered rows."""
    gathered = gather_rows(table, plan.layers[LAYER].rows)
    memory, pullback = jax.vjp(partial(look_up, plan=plan), gathered)
    return gathered, memory, pullback(cotangent)[0]


def draw_cotangent(tokens: np.ndarray) -> Array:
    return jax.random.normal(jax.random.key(1), (*tokens.shape, NGRAM_HASH.columns * WIDTH))


def test_memory_is_the_hashed_rows_bit_for_bit(step: tuple, table: Array) -> None:
    plan = Planner(NGRAM_HASH)(*step)
    _, memory, _ = jax.jit(memory_and_gradient)(table, put(plan, None), draw_cotangent(step[0]))
    expected = np.asarray(table)[NGRAM_HASH.hash_tokens(LAYER, *step)]
    np.testing.assert_array_equal(memory, expected.reshape(memory.shape))


def test_gradient_is_that_of_a_plain_gather_at_the_touched_rows(step: tuple, table: Array) -> None:
    plan, cotangent = Planner(NGRAM_HASH)(*step), draw_cotangent(step[0])
    _, _, by_row = jax.jit(memory_and_gradient)(table, put(plan, None), cotangent)
    hashed = NGRAM_HASH.hash_tokens(LAYER, *step)

    def plain(table: Array) -> Array:
        return jnp.sum(table[hashed].reshape(cotangent.shape) * cotangent)

    dense = np.asarray(jax.grad(plain)(table))
    touched = np.unique(hashed)
    assert len(touched) < hashed.size / 3  # many duplicates, or this tests little
    np.testing.assert_allclose(by_row[: len(touched)], dense[touched], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(by_row[len(touched) :], 0)
    assert np.abs(dense).sum() == np.abs(dense[touched]).sum()


@pytest.mark.parametrize("shape", [(2, 4), (8, 1), (1, 8)])
def test_eight_devices_read_what_one_reads(step: tuple, table: Array, shape: tuple) -> None:
    cotangent = draw_cotangent(step[0])
    expected = jax.jit(memory_and_gradient)(table, put(Planner(NGRAM_HASH)(*step), None), cotangent)
    mesh = make_mesh(MeshConfig(*shape))
    with jax.set_mesh(mesh):
        plan = put(Planner(NGRAM_HASH, batch_shards=8)(*step), mesh)
        sharded = jax.device_put(table, jax.NamedSharding(mesh, TABLE_RF))
        assert sharded.addressable_shards[0].data.shape == (ROWS // 8, WIDTH)
        abt = jax.device_put(cotangent, jax.NamedSharding(mesh, BATCH_ABT))
        gathered, memory, gradient = jax.jit(memory_and_gradient)(sharded, plan, abt)
    np.testing.assert_array_equal(gathered, expected[0])
    np.testing.assert_array_equal(memory, expected[1])
    np.testing.assert_allclose(gradient, expected[2], rtol=1e-5, atol=1e-5)
    # Every device holds the whole, equal gradient, and its own tokens' memory.
    assert gradient.sharding.is_fully_replicated
    copies = [np.asarray(shard.data) for shard in gradient.addressable_shards]
    assert all((copy == copies[0]).all() for copy in copies)
    assert memory.sharding.spec[1] == ("data", "fsdp")


def test_padding_reads_zero_and_not_the_last_row(table: Array) -> None:
    rows = jnp.array([0, ROWS - 1, ROWS, ROWS + 1], jnp.int32)
    read = gather_rows(table, rows)
    np.testing.assert_array_equal(read[:2], table[jnp.array([0, -1])])
    np.testing.assert_array_equal(read[2:], 0)
    counts = gather_rows(jnp.arange(ROWS), rows)
    assert counts.tolist() == [0, ROWS - 1, 0, 0]


def test_no_gradient_of_the_tables_size_exists(step: tuple, table: Array) -> None:
    """DESIGN rule 1. The tables enter by one gather and nothing of R rows is computed."""
    plan = put(Planner(NGRAM_HASH)(*step), None)
    lowered = jax.jit(memory_and_gradient).lower(table, plan, draw_cotangent(step[0]))
    made = [
        line
        for line in lowered.compile().as_text().splitlines()
        if re.search(rf"= f32\[{ROWS},", line) and "parameter(" not in line
    ]
    assert not made
