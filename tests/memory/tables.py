"""Small tables, plans and steps on a mesh, for the tests of lookup and row Adam."""

from collections.abc import Callable
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
from engram_jax.memory.row_adam import RowAdam
from engram_jax.sharding import BATCH_ABT, ROWS_SU, TABLE_RW, MeshConfig, make_mesh
from engram_jax.typing import PyTree

LAYER, WIDTH = 1, 6
LAYOUT = RecordLayout(WIDTH)
SPEC = HashSpec(layers=(LAYER,), max_order=3, heads=3, rows_per_head=(997, 1009))
NGRAM_HASH = NgramHash.build(SPEC, VocabularyProjection.identity(20))
ROWS = NGRAM_HASH.padded_rows[0]

MESHES = {"1": (1, 1), "1x8": (1, 8), "2x4": (2, 4), "8x1": (8, 1)}


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
    """[A, B, T, H]: where every token's rows stand."""
    return stored_places(NGRAM_HASH.hash_tokens(LAYER, tokens, segments), ROWS)


def plan_step(mesh: jax.sharding.Mesh, tokens: np.ndarray, segments: np.ndarray) -> MemoryPlan:
    return put_plan(mesh, Planner(NGRAM_HASH, shards=mesh.size)(tokens, segments))


def put_plan(mesh: jax.sharding.Mesh, plan: MemoryPlan) -> MemoryPlan:
    return MemoryPlan(put(mesh, plan.rows, ROWS_SU), put(mesh, plan.slots, BATCH_ABT))


def put(mesh: jax.sharding.Mesh, tree: PyTree, spec: jax.P = TABLE_RW) -> PyTree:
    return jax.device_put(tree, jax.NamedSharding(mesh, spec))


class Step(NamedTuple):
    """What a step made."""

    memory: Array  # [A, B, T, E]
    norm: Array  # of all rows' gradients
    table: Table


def make_step(adam: RowAdam, scale: float = 1.0) -> Callable[..., Step]:
    """A jitted (table, plan, cotangent of the memory, steps done) → `Step`."""

    def step(table: Table, plan: MemoryPlan, cotangent: Array, done: Array) -> Step:
        rows_plan: RowPlan = plan.rows[LAYER]
        slots: SlotPlan = plan.slots[LAYER]
        read = lookup.read_rows(table, rows_plan, adam, done)
        memory, pullback = jax.vjp(
            lambda rows: jax.lax.map(lambda part: lookup.expand(rows, part), slots), read.values
        )
        (gradient,) = pullback(cotangent)
        own = lookup.own_gradients(table, rows_plan, gradient)
        new = lookup.update_rows(
            *(table, rows_plan, gradient, own, read.own), jnp.float32(scale), adam, done
        )
        return Step(memory, jnp.sqrt(own.square_norm), new)

    return jax.jit(step)


def draw_cotangent(mesh: jax.sharding.Mesh, seed: int = 1) -> Array:
    shape = (2, 8, 12, NGRAM_HASH.columns * WIDTH)
    return put(mesh, jax.random.normal(jax.random.key(seed), shape), BATCH_ABT)


def draw_table(
    mesh: jax.sharding.Mesh, *, used: bool = False, layout: RecordLayout = LAYOUT
) -> Table:
    """A table of random rows; `used`: with moments and clocks, as after nine steps."""
    keys = jax.random.split(jax.random.key(0), 4)
    rows = jax.random.normal(keys[0], (ROWS, WIDTH))
    mean, square, clock = jnp.zeros_like(rows), jnp.zeros_like(rows), jnp.zeros(ROWS, jnp.int32)
    if used:
        clock = jax.random.randint(keys[1], (ROWS,), 0, 10)
        touched = (clock > 0)[:, None]
        mean = jnp.where(touched, jax.random.normal(keys[2], rows.shape), 0)
        square = jnp.where(touched, jax.random.uniform(keys[3], rows.shape), 0)
    if layout.storage.second_moment == "row":
        square = square[:, :1]
    return put(mesh, Table(layout.pack(RowState(rows, mean, square, clock)), layout, LAYER))
