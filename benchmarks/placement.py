"""The cost of tables in host memory or in a file, compared with tables on the device.

    python -m benchmarks.placement [--config default] [--rounds 30] [--decode | --times 25 | --read]

All placements train alternately in this process, from equal states, and each round times a few
steps of each. Printed: the median and the quartiles of wall time and of CPU time of the process,
relative to the device. `--decode` times generation instead, and `--times` compares a table in a
file with one of so many times as many rows, which may be larger than memory. `--read` reads random
rows of a finished table from the file of a checkpoint.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np

from engram_jax.command_line import load_named_config, parse_flags
from engram_jax.config import Config, MemoryConfig
from engram_jax.data.pipeline import prefetch_to_device
from engram_jax.decoding.generate import Generator
from engram_jax.decoding.settings import GenerationSettings
from engram_jax.errors import one_sentence
from engram_jax.memory.row_feed import RowFeed
from engram_jax.memory.row_file import map_rows, save_rows
from engram_jax.memory.store import Placement, RowStore, TableInfo
from engram_jax.placement import fill_from_tables, open_feed, open_stores
from engram_jax.run import Run
from engram_jax.train_step import make_train_step

PLACEMENTS: tuple[Placement, ...] = ("device", "host", "file")


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        config: name of a configuration.
        rounds: number of rounds.
        steps: training steps of a round.
        decode: measure generation instead of training.
        batch: with `decode`, number of sequences.
        read: measure the reading of a file instead.
        times: compare tables in files, one with this many times the rows of the other.
    """

    config: str = "default"
    rounds: int = 30
    steps: int = 2
    decode: bool = False
    batch: int = 1
    read: bool = False
    times: int | None = None


class _Training:
    """A run of one placement, which goes on with every round."""

    def __init__(self, config: Config, folder: Path, stack: ExitStack) -> None:
        start = time.perf_counter()
        run = Run.start(config, folder)
        self.program = run.program
        self.feed: RowFeed | None = stack.enter_context(open_feed(run.program, folder))
        self.opened = time.perf_counter() - start
        self._state = run.program.initial_state()
        self._step = make_train_step(run.program)
        batches = stack.enter_context(run.batches())
        self._batches = pairwise(prefetch_to_device(batches, run.program.send))

    def run(self, steps: int) -> None:
        """Trains, and waits for the last step."""
        for _ in range(steps):
            sent, following = next(self._batches)
            if self.feed:
                tables = self.feed.load(self._state.tables, sent.buffers, following.buffers)
                self._state = replace(self._state, tables=tables)
            self._state, metrics = self._step(self._state, sent.batch, self.program.row_adam)
        jax.block_until_ready(metrics)

    def thread_alone(self, rounds: int) -> list[float]:
        """Milliseconds of the feed's thread for a step, while nothing else runs. Ends the run."""
        assert self.feed
        sent, following = next(self._batches)
        jax.block_until_ready(self._state.tables)
        self.feed.flush(self._state.tables)
        tables = self.feed.load(self._state.tables, sent.buffers, following.buffers)
        jax.block_until_ready(tables)
        self.feed.flush(tables)
        taken = []
        for _ in range(rounds):
            start = time.perf_counter()
            self.feed._work(following.buffers, sent.buffers, sent.buffers, tables)
            taken.append(1000 * (time.perf_counter() - start))
        return taken


def training(options: Options, stack: ExitStack) -> dict[str, Callable[[], object]]:
    """Functions that train the steps of a round, by placement."""
    config = load_named_config(options.config)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    timed: dict[str, Callable[[], object]] = {}
    for name, memory in _memories(config.memory, options.times).items():
        placed = _Training(replace(config, memory=memory), folder / name, stack)
        with placed.program.use_mesh():
            placed.run(3)  # compiles
        timed[name] = _in_mesh(placed, options.steps)
        size = sum(
            4 * table.rows * table.layout.words for table in placed.program.tables().values()
        )
        print(f"{name}: {size / 1e9:.1f} GB of tables, opened in {placed.opened:.2f} s")
        stack.callback(_print_feed, name, placed, options.rounds)
    return timed


def _memories(memory: MemoryConfig, times: int | None) -> dict[str, MemoryConfig]:
    """What is compared; the first is the reference."""
    if times is None:
        return {placement: replace(memory, placement=placement) for placement in PLACEMENTS}
    in_file = replace(memory, placement="file")
    rows = tuple(times * rows for rows in memory.rows_per_head)
    return {"file": in_file, f"{times} times": replace(in_file, rows_per_head=rows)}


def _print_feed(name: str, placed: _Training, rounds: int) -> None:
    feed = placed.feed
    if feed is None:
        return
    with placed.program.use_mesh():
        low, middle, high = np.percentile(placed.thread_alone(rounds), (25, 50, 75))
    rows = sum(int(plan.distinct.sum()) for plan in (feed._running or {}).values())
    print(f"{name}: the thread alone takes {middle:.1f} ms ({low:.1f} to {high:.1f}), {rows} rows")
    touched = sum(store.bytes for store in feed.stores.values())
    status = Path("/proc/self/status").read_text()
    anonymous = status.partition("RssAnon:")[2].split()[0] if "RssAnon:" in status else "?"
    print(
        f"{name}: {touched / 1e9:.2f} GB of written rows; steps waited {feed.waited:.2f} s for the "
        f"thread; the process has {anonymous} kB of anonymous memory"
    )


def _in_mesh(placed: _Training, steps: int) -> Callable[[], object]:
    def run() -> None:
        with placed.program.use_mesh():
            placed.run(steps)

    return run


def decoding(options: Options, stack: ExitStack) -> dict[str, Callable[[], object]]:
    """Functions that continue prompts with random weights, by placement."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    run = Run.start(load_named_config(options.config), folder / "run")
    weights = run.program.initial_state().weights
    prompts, settings = ["The"] * options.batch, GenerationSettings(tokens=64, temperature=1.0)
    timed: dict[str, Callable[[], object]] = {}
    for placement in PLACEMENTS:
        stores = stack.enter_context(open_stores(run.program, folder, placement))
        tables = weights.tables
        if stores:
            for store in stores.values():  # every row has a slot, as after a long training
                store.table = replace(store.table, seed=store.table.seed + 1)
            fill_from_tables(stores, tables)
            tables = {}
        generator = Generator(run.program, run.tokenizer, replace(weights, tables=tables), stores)
        generator.generate(prompts, settings)  # compiles
        timed[placement] = _generates(generator, prompts, settings)
    return timed


def _generates(
    generator: Generator, prompts: Sequence[str], settings: GenerationSettings
) -> Callable[[], object]:
    return lambda: generator.generate(prompts, settings)


def rounds(timed: dict[str, Callable[[], object]], count: int) -> Iterator[dict[str, Any]]:
    """Wall and CPU seconds of every placement, in turn; each round begins with another."""
    names = list(timed)
    for number in range(count):
        seconds = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            timed[name]()
            seconds[name] = time.perf_counter() - wall, time.process_time() - cpu
        yield seconds


def print_reading(options: Options) -> None:
    """Rows/s of reading a table in a checkpoint's file, warm and cold, with both kinds of advice.

    Cold: the system drops the pages of the file before every read, as far as it follows advice.
    """
    config, generator = load_named_config(options.config), np.random.default_rng(0)
    rows = -(-config.memory.heads * sum(config.memory.rows_per_head) // 4096) * 4096
    table = TableInfo(1, rows, config.memory.layout, 0, config.memory.init_scale, "")
    with tempfile.TemporaryDirectory() as folder:
        path, written = Path(folder) / "rows", RowStore(table, 0, rows)
        for start in range(0, rows, 1 << 16):
            places = np.arange(start, min(start + (1 << 16), rows), dtype=np.int32)
            written.write(places, table.initial_records(places))
        save_rows(written, path)
        for random in (True, False):
            for count in (16, 256, 8192, 65_536):
                out = np.empty((count, table.layout.words), np.uint32)
                rates: dict[str, list[float]] = {"cold": [], "warm": []}
                for _ in range(options.rounds):
                    with path.open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    store = RowStore(table, 0, rows)
                    store.adopt(path, map_rows(path, random=random)[1])
                    places = generator.integers(0, rows, count, dtype=np.int32)
                    for name in rates:
                        start_time = time.perf_counter()
                        store.read(places, out)
                        rates[name].append(count / (time.perf_counter() - start_time))
                    store.close()
                    del store
                cold, warm = (statistics.median(rates[name]) for name in rates)
                print(
                    f"{count} rows, {'random' if random else 'usual'} advice: {warm:,.0f} rows/s "
                    f"warm, {cold:,.0f} rows/s cold"
                )


def main() -> None:
    """Measures and prints."""
    options = parse_flags(Options, prog="benchmarks.placement", description=__doc__ or "")
    if options.read:
        print_reading(options)
        return
    with ExitStack() as stack:
        timed = (decoding if options.decode else training)(options, stack)
        taken = list(rounds(timed, options.rounds))
    first, *others = timed
    reference = np.array([one[first] for one in taken])
    print(f"{first}: {1000 * statistics.median(reference[:, 0]):.1f} ms a round")
    for name in others:
        ratios = np.array([one[name] for one in taken]) / reference
        for column, what in enumerate(("wall", "CPU")):
            low, middle, high = np.percentile(ratios[:, column], (25, 50, 75))
            print(f"{name}, {what}: {middle:.3f} ({low:.3f} to {high:.3f}) of the time of {first}")


if __name__ == "__main__":
    with one_sentence():
        main()
