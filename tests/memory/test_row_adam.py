"""Exact and lazy row Adam, compared with float64 references."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_jax.errors import InputError
from engram_jax.memory.layout import RowState
from engram_jax.memory.momentum_tail import make_momentum_tail
from engram_jax.memory.row_adam import RowAdam, RowAdamConfig, make_row_adam

COUNT, WIDTH = 12, 3


def constant(rate: float):
    return lambda done: jnp.full(jnp.shape(done), rate, jnp.float32)


def untouched(seed: int = 0, scale: float = 0.5) -> RowState:
    values = scale * np.random.default_rng(seed).normal(size=(COUNT, WIDTH)).astype(np.float32)
    nothing = jnp.zeros((COUNT, WIDTH))
    return RowState(jnp.asarray(values), nothing, nothing, jnp.zeros(COUNT, jnp.int32))


@jax.jit
def run(adam: RowAdam, rows: RowState, gradients: np.ndarray, touched: np.ndarray) -> RowState:
    """Updates the touched rows, step by step; gradients [steps, n, F], touched [steps, n]."""

    def step(rows: RowState, numbered):
        number, gradient, touched = numbered
        new = adam.update(rows, gradient, number)
        pick = jax.tree.map(lambda a: touched.reshape(-1, *[1] * (a.ndim - 1)), rows)
        return jax.tree.map(jnp.where, pick, new, rows), None

    numbers = jnp.arange(len(gradients))
    return jax.lax.scan(step, rows, (numbers, jnp.asarray(gradients), jnp.asarray(touched)))[0]


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.95, 0.95)]))
def test_a_lazy_row_is_an_adam_that_sees_only_its_own_steps(
    seed: int, betas: tuple[float, float]
) -> None:
    generator = np.random.default_rng(seed)
    b1, b2 = betas
    config = RowAdamConfig(form="lazy", b1=b1, b2=b2)
    rates = np.array([0.01, 0.1, 0.05, 0.02], np.float32)
    adam = make_row_adam(config, lambda done: jnp.asarray(rates)[done], 4)
    touched = generator.random((4, COUNT)) < 0.5
    gradients = generator.normal(size=(4, COUNT, WIDTH)) * 10.0 ** generator.integers(-4, 1)
    gradients = gradients.astype(np.float32)
    found = run(adam, untouched(), gradients, touched)

    value, mean, square = (np.asarray(part, np.float64) for part in untouched()[:3])
    count = np.zeros(COUNT)
    for rate, of_step, gradient in zip(rates, touched, gradients.astype(np.float64), strict=True):
        for row in np.flatnonzero(of_step):
            count[row] += 1
            mean[row] = b1 * mean[row] + (1 - b1) * gradient[row]
            square[row] = b2 * square[row] + (1 - b2) * gradient[row] ** 2
            root = np.sqrt(square[row] / (1 - b2 ** count[row]))
            movement = mean[row] / (1 - b1 ** count[row]) / (root + config.eps)
            value[row] -= config.factor * float(rate) * movement
    np.testing.assert_array_equal(found.clock, count)
    # Values stay below 2.5 and steps below 0.5: a few roundings of 2⁻²³ each.
    np.testing.assert_allclose(found.value, value, atol=1e-6)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.square, square, rtol=1e-5, atol=1e-12)


@st.composite
def histories(draw: st.DrawFn):
    """Betas, a schedule, steps, which rows each step touches, and gradients to below epsilon."""
    b1, b2 = draw(st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.8, 0.99), (0.5, 0.9), (0.0, 0.9)]))
    steps = draw(st.sampled_from([1, 3, 40, 400]))
    warmup, decay_from = draw(st.integers(0, 50)), draw(st.integers(0, 400))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    often = draw(st.sampled_from([1.0, 0.3, 0.02]))
    touched = generator.random((steps, COUNT)) < often * generator.random(COUNT)
    decades = draw(st.sampled_from([(-1, 0), (-6, -2), (-12, -6)]))
    scale = 10.0 ** generator.uniform(*decades, (1, COUNT, 1))
    gradients = generator.normal(size=(steps, COUNT, WIDTH)) * scale * touched[..., None]
    return (b1, b2), (warmup, decay_from), touched, gradients.astype(np.float32)


@settings(max_examples=60)
@given(histories())
def test_an_exact_row_is_where_dense_adam_has_it(history) -> None:
    """In float64, every row at every step, from zero, so that small updates are visible."""
    (b1, b2), (warmup, decay_from), touched, gradients = history
    config = RowAdamConfig(form="exact", factor=2.0, b1=b1, b2=b2)

    def schedule(done):
        rate = 1e-2 * jnp.minimum(1.0, (done + 1) / (warmup + 1))
        return jnp.where(done < decay_from, rate, 0.1 * rate)

    steps = len(gradients)
    adam = make_row_adam(config, schedule, steps)
    found = run(adam, untouched(scale=0.0), gradients, touched)
    read = np.asarray(adam.current(found, jnp.int32(steps)), np.float64)

    value = np.asarray(untouched(scale=0.0).value, np.float64)
    mean, square, moved = np.zeros_like(value), np.zeros_like(value), np.zeros_like(value)
    for step, gradient in enumerate(gradients.astype(np.float64), 1):
        mean = b1 * mean + (1 - b1) * gradient
        square = b2 * square + (1 - b2) * gradient**2
        root = np.sqrt(square / (1 - b2**step)) + config.eps
        movement = config.factor * float(schedule(step - 1)) * mean / (1 - b1**step) / root
        value -= movement
        moved += np.abs(movement)
    allowed = np.maximum(3e-5 * moved, 4 * np.spacing(np.abs(read).astype(np.float32)))
    # A square below the normal range of float32 is lost, as in dense Adam in float32.
    representable = (square > 1e-36) | (square == 0)
    excess = (np.abs(read - value) / allowed)[representable]
    assert excess.max(initial=0) <= 1
    last = np.where(touched.any(0), steps - np.argmax(touched[::-1], 0), 0)
    np.testing.assert_array_equal(found.clock, last)


def test_reading_at_the_step_after_the_last_write_has_nothing_pending() -> None:
    adam = make_row_adam(RowAdamConfig(form="exact"), constant(0.1), 9)
    rows = run(adam, untouched(), np.ones((5, COUNT, WIDTH), np.float32), np.ones((5, COUNT), bool))
    np.testing.assert_array_equal(adam.current(rows, jnp.int32(5)), rows.value)
    assert (adam.current(rows, jnp.int32(6)) < rows.value).all()


def test_one_late_gradient_moves_a_row_as_far_as_the_two_optimizers_say() -> None:
    """31.8 learning rates under dense Adam (5.8 for 0.95), 1 under lazy Adam."""
    for form, b2, expected in (("exact", 0.999, 31.8), ("exact", 0.95, 5.8), ("lazy", 0.999, 1.0)):
        adam = make_row_adam(RowAdamConfig(form=form, b2=b2, factor=1.0), constant(1.0), 20_000)
        after = adam.update(untouched(), jnp.ones((COUNT, WIDTH)), jnp.int32(10_000))
        at_rest = adam.current(after, jnp.int32(12_000))
        moved = np.asarray(untouched().value - at_rest)
        np.testing.assert_allclose(moved, expected, atol=0.05)


def test_a_row_touched_at_every_step_is_an_optax_adam() -> None:
    gradients = np.random.default_rng(0).normal(size=(20, COUNT, WIDTH)).astype(np.float32)
    optimizer = optax.adam(5 * 0.02)
    values = untouched().value
    state = optimizer.init(values)
    for gradient in gradients:
        updates, state = optimizer.update(jnp.asarray(gradient), state)
        values = optax.apply_updates(values, updates)
    for form in ("exact", "lazy"):
        adam = make_row_adam(RowAdamConfig(form=form), constant(0.02), 20)
        found = run(adam, untouched(), gradients, np.ones((20, COUNT), bool))
        np.testing.assert_allclose(found.value, values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["exact", "lazy"])
def test_one_second_moment_a_row_is_that_of_the_mean_square(form: str) -> None:
    """Compared with float64 Adam over all steps (exact), or over steps that read the row (lazy)."""
    steps, generator = 12, np.random.default_rng(3)
    gradients = generator.normal(size=(steps, COUNT, WIDTH)).astype(np.float32)
    touched = generator.random((steps, COUNT)) < 0.4
    adam = make_row_adam(RowAdamConfig(form=form), constant(0.02), steps)
    rows = untouched()._replace(square=jnp.zeros((COUNT, 1)))
    found = run(adam, rows, gradients, touched)
    value = np.asarray(rows.value, np.float64)
    mean, square, count = np.zeros_like(value), np.zeros((COUNT, 1)), np.zeros((COUNT, 1))
    for gradient, hit in zip(gradients.astype(np.float64), touched[..., None], strict=True):
        moves = hit if form == "lazy" else np.ones_like(hit)
        gradient = gradient * hit
        count += moves
        mean = np.where(moves, 0.9 * mean + 0.1 * gradient, mean)
        mean_square = np.mean(gradient**2, axis=1, keepdims=True)
        square = np.where(moves, 0.999 * square + 0.001 * mean_square, square)
        seen = np.maximum(count, 1)
        movement = (mean / (1 - 0.9**seen)) / (np.sqrt(square / (1 - 0.999**seen)) + 1e-8)
        value = value - moves * 5 * 0.02 * movement
    current = adam.current(found, jnp.int32(steps))
    np.testing.assert_allclose(current, value, rtol=1e-4, atol=1e-5)
    assert found.square.shape == (COUNT, 1)


def test_the_momentum_tail_is_the_sum_over_all_later_steps() -> None:
    """Compared with the sum in float64, at early and late steps, for small and large ε/√v."""
    b1, b2, eps = 0.9, 0.95, 1e-8
    rates = lambda done: 1e-3 * np.minimum(1, (done + 1) / 30)  # noqa: E731
    tail = make_momentum_tail(rates, 500, b1, b2)
    for last in (0, 1, 2, 10, 100, 500):
        for root in (1e-12, 1e-9, 1e-8, 1e-6, 1.0):
            after = np.arange(1, 2000)
            step = last + after
            terms = rates(step - 1) * b1**after / (1 - b1**step)
            terms /= np.sqrt(b2**after * root**2 / (1 - b2**step)) + eps
            found = np.sum(tail.weights[last] / (tail.nodes[last] * root + eps))
            assert math.isclose(found, terms.sum(), rel_tol=3e-7), (last, root)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"b1": 1.0}, "below 1"),
        ({"b2": -0.1}, "at least 0"),
        ({"eps": 0.0}, "eps"),
        ({"form": "exact", "b1": 0.99, "b2": 0.9}, "never stop moving"),
    ],
)
def test_impossible_hyperparameters_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RowAdamConfig(**fields)


@pytest.mark.parametrize(("b1", "b2"), [(0.99, 0.9802), (0.5, 0.26), (0.1, 0.011)])
def test_momentum_that_decays_too_slowly_is_refused(b1: float, b2: float) -> None:
    config = RowAdamConfig(form="exact", b1=b1, b2=b2)
    with pytest.raises(InputError, match="lazy"):
        make_row_adam(config, constant(0.1), 3)
