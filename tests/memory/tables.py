"""Small tables, plans and steps on a mesh, for the tests of lookup and row Adam."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from engram_jax.compression import VocabularyProjection
from engram_jax.hashing import HashSpec, NgramHash
from engram_jax.memory import lookup
from engram_jax.memory.layout import RecordLayout, RowState, Table
from engram_jax.memory.places import stored_places
from engram_jax.memory.plan import MemoryPlan, Planner, RowPlan, SlotPlan
from engram_jax.memory.row_adam import RowAdam, RowAdamConfig, RowAdamForm, make_row_adam
from engram_jax.sharding import BATCH_ABT, ROWS_SU, TABLE_RW, MeshConfig, make_mesh
from engram_jax.typing import PyTree

LAYER, WIDTH = 1, 6
LAYOUT = RecordLayout(WIDTH)
SPEC = HashSpec(layers=(LAYER,), max_order=3, heads=3, rows_per_head=(997, 1009))
NGRAM_HASH = NgramHash.build(SPEC, VocabularyProjection.identity(20))
ROWS = NGRAM_HASH.padded_rows[0]

# Lookup uses the flattened mesh, so one mesh of several devices is enough.
MESHES = {"1": (1, 1), "2x4": (2, 4)}


def mesh_of(name: str) -> jax.sharding.Mesh:
    data, fsdp = MESHES[name]
    return make_mesh(MeshConfig(data, fsdp), jax.devices()[: data * fsdp])


def draw_step(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [2, 8, 12] with dead positions, and their segments."""
    generator = np.random.default_rng(seed)
    tokens = np.minimum(generator.geometric(0.3, (2, 8, 12)) - 1, 19).astype(np.int32)
    tokens[generator.random(tokens.shape) < 0.05] = -1
    return tokens, np.cumsum(generator.random(tokens.shape) < 0.15, axis=-1, dtype=np.int32)


def places(tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Places [A, B, T, H] of every token's rows."""
    return stored_places(NGRAM_HASH.hash_tokens(LAYER, tokens, segments), ROWS)


def plan_step(mesh: jax.sharding.Mesh, tokens: np.ndarray, segments: np.ndarray) -> MemoryPlan:
    return put_plan(mesh, Planner(NGRAM_HASH, shards=mesh.size)(tokens, segments))


def put_plan(mesh: jax.sharding.Mesh, plan: MemoryPlan) -> MemoryPlan:
    return MemoryPlan(put(mesh, plan.rows, ROWS_SU), put(mesh, plan.slots, BATCH_ABT))


def put(mesh: jax.sharding.Mesh, tree: PyTree, spec: jax.P = TABLE_RW) -> PyTree:
    return jax.device_put(tree, jax.NamedSharding(mesh, spec))


class Step(NamedTuple):
    """The results of a step."""

    memory: Array  # [A, B, T, E]
    norm: Array  # of the gradients of all rows
    table: Table


@cache
def make_adam(form: RowAdamForm) -> RowAdam:
    return make_row_adam(RowAdamConfig(form=form), lambda _: jnp.float32(1e-2), 20)


def make_step(form: RowAdamForm) -> Callable[..., Step]:
    """A jitted (table, plan, cotangent of the memory, steps done, scale) → `Step`."""

    def step(
        table: Table,
        plan: MemoryPlan,
        cotangent: Array,
        done: int,
        scale: float = 1.0,
        adam: RowAdam = make_adam(form),  # noqa: B008  (cached)
    ) -> Step:
        rows_plan: RowPlan = plan.rows[LAYER]
        slots: SlotPlan = plan.slots[LAYER]
        done, scale = jnp.int32(done), jnp.float32(scale)
        read = lookup.read_rows(table, rows_plan, adam, done)
        memory, pullback = jax.vjp(
            lambda rows: jax.lax.map(lambda part: lookup.expand(rows, part), slots), read.values
        )
        (gradient,) = pullback(cotangent)
        own = lookup.send_gradients(table, rows_plan, gradient)
        new = lookup.update_rows(table, rows_plan, gradient, own, read.own, scale, adam, done)
        return Step(memory, jnp.sqrt(own.square_norm), new)

    return jax.jit(step)


# Compiled once for all tests of a mesh and a layout.
shared_step = cache(make_step)


def draw_cotangent(mesh: jax.sharding.Mesh, seed: int = 1) -> Array:
    shape = (2, 8, 12, NGRAM_HASH.columns * WIDTH)
    drawn = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return put(mesh, drawn, BATCH_ABT)


def draw_table(
    mesh: jax.sharding.Mesh, *, used: bool = False, layout: RecordLayout = LAYOUT
) -> Table:
    """A table of random rows; `used`: with moments and clocks, as after nine steps."""
    return put(mesh, Table(_draw_records(used, layout), layout, LAYER))


@cache
def _draw_records(used: bool, layout: RecordLayout) -> np.ndarray:
    generator = np.random.default_rng(0)
    value, mean, square = generator.normal(size=(3, ROWS, WIDTH)).astype(np.float32)
    clock = generator.integers(0, 10 if used else 1, ROWS, dtype=np.int32)
    touched = (clock > 0)[:, None]
    square = square[:, :1] if layout.storage.second_moment == "row" else square
    rows = RowState(value, mean * touched, square**2 * touched, clock)
    return np.asarray(layout.pack(jax.tree.map(jnp.asarray, rows)))
