"""The time of a step as the table grows, compared with a dense optax Adam.

    python -m benchmarks.table_update [--most-rows 67_108_864]

Three measurements in one process; the two sides of each alternate:

1. Only the memory part (lookup, expansion to tokens, gradients back to rows, exact row update), for
   8,192 tokens of 16 columns with random rows of width 16, and tables of random values. It is
   compared with a plain gather, its dense gradient and `optax.adam`.
2. Each of these two on larger tables, as far as memory allows, compared with 2²⁰ rows.
3. The complete training step of the default run, with a table of 1/16 and of 4 times its size.

Writes `docs/table_update.png`.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from benchmarks.throughput import Training
from engram_jax.command_line import load_named_config, run_function
from engram_jax.memory import lookup
from engram_jax.memory.layout import RecordLayout, RowState, Table
from engram_jax.memory.plan import RowPlan, SlotPlan, plan_places
from engram_jax.memory.row_adam import RowAdam, RowAdamConfig, make_row_adam
from engram_jax.sharding import ROWS_SU, TOKENS_BT, MeshConfig, make_mesh

TOKENS, COLUMNS, WIDTH = 8192, 16, 16
LAYOUT = RecordLayout(WIDTH)
PLANS = 6
CHUNK = 1 << 18
PICTURE = Path("docs/table_update.png")
MESH = make_mesh(MeshConfig(), jax.devices()[:1])

type Advance = Callable[[int], float]


def draw_places(rows: int, seed: int) -> np.ndarray:
    """Random places [tokens, columns], uniform over the table."""
    return np.random.default_rng(seed).integers(0, rows, (TOKENS, COLUMNS), dtype=np.int32)


def fill_table(rows: int, layout: RecordLayout = LAYOUT) -> Table:
    """A table of random rows, moments and clocks, filled in parts."""
    chunk = min(CHUNK, rows)

    @partial(jax.jit, donate_argnums=0)
    def fill(records: jax.Array, number: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), number), 4)
        part = RowState(
            value=jax.random.normal(keys[0], (chunk, layout.width)),
            mean=1e-3 * jax.random.normal(keys[1], (chunk, layout.width)),
            square=1e-6 * jax.random.uniform(keys[2], (chunk, layout.width)),
            clock=jax.random.randint(keys[3], (chunk,), 1, 1000),
        )
        start = (number * chunk, jnp.int32(0))
        return jax.lax.dynamic_update_slice(records, layout.pack(part), start)

    records = jnp.zeros((rows, layout.words), jnp.uint32)
    for number in range(rows // chunk):
        records = fill(records, jnp.int32(number))
    return Table(records, layout, layer=0)


def put[Tree](tree: Tree, spec: jax.P = ROWS_SU) -> Tree:
    """Puts arrays on the mesh of one device, without a copy."""
    return jax.device_put(tree, jax.NamedSharding(MESH, spec), donate=True)


def touched_rows(rows: int) -> Advance:
    """A function that runs a number of steps, and returns the seconds per step."""
    adam = make_row_adam(RowAdamConfig(form="exact"), lambda done: 1e-3 + 0.0 * done, 2000)
    adam = jax.device_put(adam, jax.NamedSharding(MESH, jax.P()))
    plans = []
    for seed in range(PLANS):
        row_plan, slot_plan = plan_places(draw_places(rows, seed)[None, None], rows)
        slots = SlotPlan(*(part[0] for part in slot_plan))
        plans.append((put(row_plan), put(slots, TOKENS_BT)))

    @partial(jax.jit, donate_argnums=0)
    def step(table: Table, plan: tuple[RowPlan, SlotPlan], adam: RowAdam, done: jax.Array) -> Table:
        row_plan, slots = plan
        read = lookup.read_rows(table, row_plan, adam, done)
        memory, pullback = jax.vjp(lambda rows: lookup.expand(rows, slots), read.values)
        (gradient,) = pullback(memory)  # the gradient of half the sum of squares
        own = lookup.send_gradients(table, row_plan, gradient)
        scale = jnp.minimum(1, jax.lax.rsqrt(own.square_norm))
        return lookup.update_rows(table, row_plan, gradient, own, read.own, scale, adam, done)

    table, done = put(fill_table(rows)), 1000

    def advance(steps: int) -> float:
        nonlocal table, done
        start = time.perf_counter()
        for _ in range(steps):
            with jax.set_mesh(MESH):
                table = step(table, plans[done % PLANS], adam, jnp.int32(done))
            done += 1
        jax.block_until_ready(table)
        return (time.perf_counter() - start) / steps

    return advance


def densely(rows: int) -> Advance:
    """Like `touched_rows`, with a dense gradient and optax.adam on the complete table."""
    optimizer = optax.adam(1e-3)
    places = [jnp.asarray(draw_places(rows, seed)) for seed in range(PLANS)]

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(table: jax.Array, state: optax.OptState, places: jax.Array) -> tuple:
        gradient = jax.grad(lambda table: 0.5 * jnp.sum(table[places] ** 2))(table)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(table, updates), state

    table = jax.random.normal(jax.random.key(0), (rows, WIDTH))
    state, done = optimizer.init(table), 0

    def advance(steps: int) -> float:
        nonlocal table, state, done
        start = time.perf_counter()
        for _ in range(steps):
            table, state = step(table, state, places[done % PLANS])
            done += 1
        jax.block_until_ready(table)
        return (time.perf_counter() - start) / steps

    return advance


def compare(base: Advance, other: Advance, rounds: int, steps: int) -> tuple[float, ...]:
    """Median seconds per step of both; median and quartiles of the ratio of `other` to `base`."""
    for advance in (base, other):
        advance(2)
    pairs = [(base(steps), other(steps)) for _ in range(rounds)]
    ratios = [second / first for first, second in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return (*medians, middle, low, high)


def compare_with_dense(rounds: int) -> None:
    """Prints the time of the memory part and of a dense step, on the same table sizes."""
    for rows in (1 << 16, 1 << 18, 1 << 20):
        dense, touched, ratio, low, high = compare(densely(rows), touched_rows(rows), rounds, 4)
        print(
            f"{rows:>11,} rows: dense optax.adam {dense * 1e3:8.1f} ms, touched rows "
            f"{touched * 1e3:8.1f} ms, ×{ratio:.2f} (quartiles {low:.2f} … {high:.2f})"
        )


def memory_part(most_rows: int, most_dense: int, rounds: int) -> dict[str, dict[int, float]]:
    """Prints and returns the seconds per step by number of rows, for both methods."""
    seconds: dict[str, dict[int, float]] = {"touched rows": {}, "dense optax.adam": {}}
    for name, make, most in (
        ("touched rows", touched_rows, most_rows),
        ("dense optax.adam", densely, most_dense),
    ):
        smallest = make(1 << 20)
        for rows in (1 << 22, 1 << 24, 1 << 26):
            if rows > most:
                break
            small, large, ratio, low, high = compare(smallest, make(rows), rounds, 4)
            seconds[name] |= {1 << 20: small, rows: large}
            print(
                f"{name:<17} {1 << 20:>11,} → {rows:>11,} rows: {small * 1e3:8.1f} → "
                f"{large * 1e3:8.1f} ms, ×{ratio:.2f} (quartiles {low:.2f} … {high:.2f})"
            )
    return seconds


def complete_step(rounds: int) -> None:
    """Prints the time of the default run's step, and the ratio for a table of 64 times the size."""
    config = load_named_config("default")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        trainings = []
        for factor in (1 / 16, 4):  # the larger table needs 6.6 GB, and twice that while filled
            rows = tuple(round(count * factor) for count in config.memory.rows_per_head)
            sized = replace(config, memory=replace(config.memory, rows_per_head=rows))
            trainings.append(Training(sized, Path(folder) / str(factor), stack))
        one, other = trainings
        small, large, ratio, low, high = compare(
            lambda steps: one.advance(steps) / steps,
            lambda steps: other.advance(steps) / steps,
            rounds,
            4,
        )
    print(
        f"complete default step, table × 64: {small * 1e3:.1f} → {large * 1e3:.1f} ms, "
        f"×{ratio:.3f} (quartiles {low:.3f} … {high:.3f})"
    )


def draw(seconds: dict[str, dict[int, float]]) -> None:
    """Writes the picture."""
    figure = Figure(figsize=(5.2, 3.4), dpi=160, layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    axes.set(xlabel="rows of the table", ylabel="milliseconds of a step")
    for (name, by_rows), color in zip(seconds.items(), ("#c2402f", "#4a5568"), strict=True):
        milliseconds = [1e3 * value for value in by_rows.values()]
        axes.plot(list(by_rows), milliseconds, "o-", color=color, label=name)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE)


def main(most_rows: int = 1 << 26, most_dense: int = 1 << 24, rounds: int = 9) -> None:
    """Measures, prints, draws.

    Args:
        most_rows: rows of the largest table; 2²⁶ rows need 17 GB.
        most_dense: rows of the largest table with dense optax.adam; 2²⁴ rows need 5 GB.
        rounds: measurements of each pair of tables, alternating.
    """
    compare_with_dense(rounds)
    draw(memory_part(most_rows, most_dense, rounds))
    complete_step(rounds)


if __name__ == "__main__":
    run_function(main)
