"""The time to read and update rows under exact row Adam, compared with lazy row Adam.

    python -m benchmarks.row_forms

Both read and update the same 32,768 distinct random rows of a table, in one process, alternating.
Tables have 2¹⁸ rows of width 80, and 2¹⁹ rows of width 24. Prints medians, and the ratio of
read + update with its quartiles. The ratio should be at most 1.5.
"""

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.table_update import MESH, fill_table, put
from engram_jax.command_line import run_function
from engram_jax.memory import lookup
from engram_jax.memory.layout import RecordLayout, Table
from engram_jax.memory.plan import RowPlan
from engram_jax.memory.row_adam import RowAdam, RowAdamConfig, RowAdamForm, make_row_adam

TOUCHED = 32_768
SIZES = ((80, 1 << 18), (24, 1 << 19))  # row width, rows

type Step = Callable[[int], tuple[float, float]]


def make_step(form: RowAdamForm, width: int, rows: int) -> Step:
    """A function that runs the step of a number, and returns the seconds of read and update."""
    adam = make_row_adam(RowAdamConfig(form=form), lambda done: 1e-3 + 0.0 * done, 2000)
    adam = jax.device_put(adam, jax.NamedSharding(MESH, jax.P()))
    generator = np.random.default_rng(0)
    plans = []
    for _ in range(4):
        places = np.sort(generator.choice(rows, TOUCHED, replace=False)).astype(np.int32)
        plans.append(
            put(RowPlan(places[None], np.ones(1, np.int32), np.full(1, TOUCHED, np.int32)))
        )
    gradient = put(jnp.asarray(generator.normal(size=(1, TOUCHED, width)), jnp.float32))
    table = put(fill_table(rows, RecordLayout(width)))
    read = jax.jit(lookup.read_rows)

    @partial(jax.jit, donate_argnums=0)
    def update(
        table: Table, plan: RowPlan, values: jax.Array | None, adam: RowAdam, step: jax.Array
    ) -> Table:
        own = lookup.send_gradients(table, plan, gradient)
        scale = jnp.minimum(1, jax.lax.rsqrt(own.square_norm))
        return lookup.update_rows(table, plan, gradient, own, values, scale, adam, step)

    def run(number: int) -> tuple[float, float]:
        nonlocal table
        plan, step = plans[number % len(plans)], jnp.int32(1000 + number)
        with jax.set_mesh(MESH):
            start = time.perf_counter()
            found = jax.block_until_ready(read(table, plan, adam, step))
            middle = time.perf_counter()
            table = jax.block_until_ready(update(table, plan, found.own, adam, step))
        return middle - start, time.perf_counter() - middle

    return run


def main(rounds: int = 15) -> None:
    """Measures and prints.

    Args:
        rounds: measurements of each form, alternating.
    """
    for width, rows in SIZES:
        forms: tuple[RowAdamForm, ...] = ("exact", "lazy")
        steps = [make_step(form, width, rows) for form in forms]
        for number in range(2):
            for step in steps:
                step(number)
        seconds = np.array([[step(number) for step in steps] for number in range(2, rounds + 2)])
        for index, form in enumerate(forms):
            reading, updating = 1e3 * np.median(seconds[:, index], axis=0)
            print(f"width {width}, {form:<5}: read {reading:5.1f} ms, update {updating:5.1f} ms")
        exact, lazy = seconds.sum(axis=2).T
        low, middle, high = np.percentile(exact / lazy, [25, 50, 75])
        print(f"width {width}, exact / lazy: ×{middle:.2f} (quartiles {low:.2f} … {high:.2f})")


if __name__ == "__main__":
    run_function(main)
