"""Lazy Adam against a float64 row-by-row reference, and what its compiled form costs."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array

from engram_jax.memory.layout import Table, init_table
from engram_jax.memory.lookup import gather_rows
from engram_jax.memory.row_adam import RowAdam, update_rows
from engram_jax.sharding import TABLE_RF, WHOLE, MeshConfig, make_mesh

ROWS, WIDTH, BOUND = 40, 3, 16
ADAM = RowAdam(factor=5.0, b1=0.9, b2=0.99, eps=1e-8)


def step(
    table: Table, rows: Array, gradient: Array, learning_rate: float, adam: RowAdam = ADAM
) -> Table:
    gathered = gather_rows(table.rows, rows)
    return update_rows(table, rows, gathered, gradient, jnp.float32(learning_rate), adam)


def pad_rows(touched: np.ndarray, total: int = ROWS, bound: int = BOUND) -> Array:
    return jnp.asarray(
        np.concatenate([touched, total + np.arange(bound - len(touched))]), jnp.int32
    )


def random_table(seed: int = 0) -> Table:
    return init_table(jax.random.key(seed), ROWS, WIDTH, 0.5)


def bits(table: Table) -> dict[str, np.ndarray]:
    return {name: np.asarray(column) for name, column in vars(table).items()}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.95, 0.95)]))
def test_every_row_is_an_adam_that_sees_only_its_own_steps(
    seed: int, betas: tuple[float, float]
) -> None:
    generator = np.random.default_rng(seed)
    adam = replace(ADAM, b1=betas[0], b2=betas[1])
    jitted = jax.jit(step, static_argnums=4)
    table = random_table()
    rows, mean, square, count = (column.astype(np.float64) for column in bits(table).values())
    for learning_rate in (0.01, 0.1, 0.05, 0.02):
        touched = np.sort(generator.choice(ROWS, generator.integers(0, BOUND + 1), False))
        gradient = generator.normal(size=(BOUND, WIDTH)).astype(np.float32)
        gradient *= 10.0 ** generator.integers(-4, 1)
        table = jitted(table, pad_rows(touched), jnp.asarray(gradient), learning_rate, adam)
        for row, g in zip(touched, gradient.astype(np.float64), strict=False):
            count[row] += 1
            mean[row] = adam.b1 * mean[row] + (1 - adam.b1) * g
            square[row] = adam.b2 * square[row] + (1 - adam.b2) * g * g
            mean_hat = mean[row] / (1 - adam.b1 ** count[row])
            root = np.sqrt(square[row] / (1 - adam.b2 ** count[row]))
            rows[row] -= adam.factor * learning_rate * mean_hat / (root + adam.eps)
    np.testing.assert_array_equal(table.count, count)
    # Values stay below 2.5 and steps below 0.5: a few roundings of 2⁻²³ each.
    np.testing.assert_allclose(table.rows, rows, atol=1e-6)
    np.testing.assert_allclose(table.mean, mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(table.square, square, rtol=1e-5, atol=1e-12)


def test_a_row_touched_at_every_step_is_an_optax_adam() -> None:
    touched, learning_rate = np.arange(5, 5 + BOUND), 0.02
    table = random_table()
    optimizer = optax.adam(ADAM.factor * learning_rate, ADAM.b1, ADAM.b2, ADAM.eps)
    values = table.rows[touched]
    state = optimizer.init(values)
    for number in range(20):
        gradient = jax.random.normal(jax.random.key(number), (BOUND, WIDTH))
        table = step(table, pad_rows(touched), gradient, learning_rate)
        updates, state = optimizer.update(gradient, state)
        values = optax.apply_updates(values, updates)
    np.testing.assert_allclose(table.rows[touched], values, rtol=1e-5, atol=1e-5)


def test_the_first_step_moves_by_the_learning_rate_whatever_the_gradient() -> None:
    """Bias correction is of the row's own count: a rare row's first step is as large as any."""
    table = replace(random_table(), rows=jnp.zeros((ROWS, WIDTH)))
    often, rare = np.array([3]), np.array([3, 20])
    for _ in range(50):
        table = step(table, pad_rows(often), jnp.full((BOUND, WIDTH), 1e-3), 0.01)
    table = step(table, pad_rows(rare), jnp.full((BOUND, WIDTH), -1e-3), 0.01)
    np.testing.assert_allclose(table.rows[20], 0.01 * ADAM.factor, rtol=2e-5)  # ε is 1e-5 of it
    assert table.count[jnp.array([3, 20])].tolist() == [51, 1]


def test_untouched_rows_and_their_state_stay_bit_for_bit() -> None:
    table = random_table()
    for number in range(3):
        gradient = jax.random.normal(jax.random.key(number), (BOUND, WIDTH))
        table = step(table, pad_rows(np.arange(0, ROWS, 4)), gradient, 0.1)
    before = bits(table)
    touched = np.array([0, 1, 7, ROWS - 1])
    after = bits(jax.jit(step)(table, pad_rows(touched), jnp.ones((BOUND, WIDTH)), 0.1))
    idle = np.setdiff1d(np.arange(ROWS), touched)
    for name in before:
        assert before[name][idle].tobytes() == after[name][idle].tobytes(), name
        assert (before[name][touched] != after[name][touched]).any(), name


def test_padding_changes_nothing_even_with_a_gradient() -> None:
    table = random_table()
    after = jax.jit(step)(
        table, pad_rows(np.array([], int)), jnp.full((BOUND, WIDTH), jnp.nan), 0.1
    )
    for name, column in bits(table).items():
        assert column.tobytes() == bits(after)[name].tobytes(), name


def test_a_zero_gradient_still_counts_as_a_touch() -> None:
    table = step(random_table(), pad_rows(np.array([4])), jnp.ones((BOUND, WIDTH)), 0.1)
    after = step(table, pad_rows(np.array([4])), jnp.zeros((BOUND, WIDTH)), 0.1)
    assert after.count[4] == 2
    np.testing.assert_allclose(after.mean[4], 0.9 * table.mean[4], rtol=1e-6)
    assert (after.rows[4] < table.rows[4]).all()  # momentum of its first step


@pytest.mark.parametrize("shape", [(2, 4), (8, 1)])
def test_eight_devices_update_what_one_updates(shape: tuple[int, int]) -> None:
    total = 4096
    table = init_table(jax.random.key(0), total, WIDTH, 0.5)
    touched = np.array([0, 1, 511, 512, 513, 2047, 2048, 3000, 4095])
    rows, gradient = pad_rows(touched, total), jax.random.normal(jax.random.key(1), (BOUND, WIDTH))
    expected = bits(jax.jit(step)(jax.jit(step)(table, rows, gradient, 0.1), rows, gradient, 0.1))
    mesh = make_mesh(MeshConfig(*shape))
    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, TABLE_RF)
        table, rows, gradient = (
            jax.device_put(table, place),
            jax.device_put(rows, WHOLE),
            jax.device_put(gradient, WHOLE),
        )
        for _ in range(2):
            table = jax.jit(step, donate_argnums=0)(table, rows, gradient, 0.1)
    for name, column in vars(table).items():
        assert column.sharding.spec[0] == ("data", "fsdp"), name
        np.testing.assert_allclose(column, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("width", [8, 80, 128])
def test_the_compiled_update_is_in_place(width: int) -> None:
    """A donated table is aliased whole, no R-sized copy is made, and temporaries know no R."""

    def compiled(total: int) -> jax.stages.Compiled:
        table = jax.eval_shape(lambda: init_table(jax.random.key(0), total, width, 0.0))
        rows = jax.ShapeDtypeStruct((64,), jnp.int32)
        gradient = jax.ShapeDtypeStruct((64, width), jnp.float32)
        return jax.jit(step, donate_argnums=0).lower(table, rows, gradient, 0.1).compile()

    small, large = 4096, 16 * 4096
    programs = {total: compiled(total) for total in (small, large)}
    memory = {total: program.memory_analysis() for total, program in programs.items()}
    assert memory[large].temp_size_in_bytes == memory[small].temp_size_in_bytes
    assert memory[large].alias_size_in_bytes == 4 * large * (3 * width + 1)
    text = programs[large].as_text()
    assert not re.search(rf"\[{large}[\],].* (copy|broadcast|select|transpose|convert)\(", text)
    # The four columns, each written by one scatter.
    results = re.findall(rf"^  (?:ROOT )?%\S+ = \w+\[{large}[\],]\S* (\S+)\(", text, re.MULTILINE)
    written = [name for name in results if name not in ("parameter", "get-tuple-element")]
    assert len(written) <= 8, results
