"""Exact row Adam compared with dense Adam in float64, over many steps of Zipf rows."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from engram_jax.memory.layout import RowState
from engram_jax.memory.row_adam import RowAdam, RowAdamConfig, make_row_adam

ROWS, WIDTH, STEPS = 300, 4, 2000


def schedule(done):
    """Warm-up, then the paper's step decay."""
    decay = jnp.where(done < 0.8 * STEPS, 1.0, jnp.where(done < 0.9 * STEPS, 0.316, 0.1))
    return 1e-3 * jnp.minimum((done + 1) / 100, 1.0) * decay


def draw_gradients(seed: int, clip_norm: float = 1.0) -> np.ndarray:
    """[STEPS, ROWS, WIDTH], zero where a row is not touched: Zipf rows, four decades, clipped."""
    generator = np.random.default_rng(seed)
    often = np.minimum(20.0 / np.arange(1, ROWS + 1), 1.0)
    touched = generator.random((STEPS, ROWS)) < often
    gradient = generator.normal(size=(STEPS, ROWS, WIDTH)) * touched[..., None]
    gradient *= 10.0 ** generator.uniform(-4, 0, (1, ROWS, 1))
    norm = np.sqrt((gradient**2).sum(axis=(1, 2), keepdims=True))
    return (gradient * np.minimum(1, clip_norm / np.maximum(norm, 1e-30))).astype(np.float32)


def in_float64(
    start: np.ndarray, gradients: np.ndarray, config: RowAdamConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Dense Adam's values, and the sum of the absolute updates of every element."""
    rates = config.factor * np.asarray(jax.vmap(schedule)(np.arange(len(gradients))), np.float64)
    values, moved = start.astype(np.float64), np.zeros(start.shape)
    mean, square = np.zeros(start.shape), np.zeros(start.shape)
    for step, gradient in enumerate(gradients.astype(np.float64), 1):
        mean = config.b1 * mean + (1 - config.b1) * gradient
        square = config.b2 * square + (1 - config.b2) * gradient**2
        root = np.sqrt(square / (1 - config.b2**step)) + config.eps
        movement = rates[step - 1] * mean / (1 - config.b1**step) / root
        values -= movement
        moved += np.abs(movement)
    return values, moved


@partial(jax.jit, static_argnums=2)
def densely(start: jax.Array, gradients: jax.Array, config: RowAdamConfig) -> jax.Array:
    """optax.adam in float32 on every row."""
    optimizer = optax.adam(
        lambda done: config.factor * schedule(done), config.b1, config.b2, config.eps
    )

    def step(carry, gradient):
        values, state = carry
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(values, updates), state), None

    return jax.lax.scan(step, (start, optimizer.init(start)), gradients)[0][0]


@cache
def by_row(config: RowAdamConfig, steps: int):
    """A jitted (start, gradients) → values: only rows whose gradient is not zero are written."""
    adam: RowAdam = make_row_adam(config, schedule, steps)

    def run(start: jax.Array, gradients: jax.Array) -> jax.Array:
        def step(table: RowState, numbered):
            number, gradient = numbered
            new = adam.update(table, gradient, number)
            touched = jnp.any(gradient != 0, axis=1)
            pick = lambda new, old: jnp.where(  # noqa: E731
                touched.reshape(-1, *[1] * (new.ndim - 1)), new, old
            )
            return jax.tree.map(pick, new, table), None

        nothing = jnp.zeros_like(start)
        table = RowState(start, nothing, nothing, jnp.zeros(len(start), jnp.int32))
        table, _ = jax.lax.scan(step, table, (jnp.arange(len(gradients)), gradients))
        return adam.current(table, jnp.int32(len(gradients)))

    return jax.jit(run)


@pytest.mark.parametrize("b2", [0.999, 0.95])
@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(10), marks=pytest.mark.slow)])
def test_two_thousand_steps_give_dense_adams_answer(b2: float, seeds: range) -> None:
    """Error below 3e-5 of the summed updates or 4 ulp, and not above float32 dense Adam's."""
    config = RowAdamConfig(form="exact", b2=b2)
    ours, dense = [], []
    for seed in seeds:
        gradients = draw_gradients(seed)
        start = np.random.default_rng(seed).normal(0, 0.02, (ROWS, WIDTH)).astype(np.float32)
        expected, moved = in_float64(start, gradients, config)
        values = np.asarray(by_row(config, STEPS)(start, gradients), np.float64)
        error = np.abs(values - expected)
        allowed = np.maximum(3e-5 * moved, 4 * np.spacing(np.abs(values).astype(np.float32)))
        assert (error <= allowed).all(), (seed, (error / allowed).max())
        ours.append(error / moved)
        dense.append(np.abs(np.asarray(densely(start, gradients, config)) - expected) / moved)
    worst, bound = (np.quantile(np.concatenate(e), 0.999) for e in (ours, dense))
    print(f"b2 {b2}: 99.9th percentile {worst:.2e}, float32 dense Adam {bound:.2e}")
    assert worst <= 1.2 * bound
