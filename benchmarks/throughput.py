"""Training throughput of Engram and OverEncoding relative to their dense twin, in one process.

    python -m benchmarks.throughput [--configs NAME …] [--rounds N]

Prints the median tokens/s of each config, and the ratio to the first one's. Batches are built at
the same time, as in training.
"""

import json
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from engram_jax.command_line import load_named_config, run_function
from engram_jax.config import Config
from engram_jax.data.pipeline import prefetch_to_device
from engram_jax.run import Run
from engram_jax.train_step import make_train_step

CONFIGS = ("dense", "over_encoding", "default")


class Training:
    """A training loop without logging, evaluation and checkpoints; `stack` closes its pipeline."""

    def __init__(self, config: Config, folder: Path, stack: ExitStack) -> None:
        run = Run.start(config, folder)
        stack.enter_context(run.program.use_mesh())
        batches = stack.enter_context(run.batches())
        self._batches = prefetch_to_device(batches, run.program.put)
        self._row_adam = run.program.row_adam
        self._step = make_train_step(run.program)
        self._state = run.program.initial_state()
        self.tokens = config.data.batch_size * config.data.sequence_length

    def advance(self, steps: int) -> float:
        """Trains for some steps, and returns the seconds they took."""
        start = time.perf_counter()
        for _ in range(steps):
            self._state, metrics = self._step(self._state, next(self._batches), self._row_adam)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - start


def measure(configs: Mapping[str, Config], rounds: int, steps: int) -> dict[str, np.ndarray]:
    """Tokens per second of every config in every round; the configs alternate."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        trainings = {
            name: Training(config, Path(folder) / name, stack) for name, config in configs.items()
        }
        for training in trainings.values():  # compiles
            training.advance(2)
        rates = [
            [training.tokens * steps / training.advance(steps) for training in trainings.values()]
            for _ in range(rounds)
        ]
    return dict(zip(configs, np.transpose(rates), strict=True))


def main(
    configs: tuple[str, ...] = CONFIGS,
    rounds: int = 15,
    steps: int = 4,
    workers: int | None = None,
    json_file: Path | None = None,
) -> None:
    """Measures tokens/s of training, and prints medians and ratios to the first configuration.

    Args:
        configs: names of configurations; the others are compared with the first.
        rounds: how often each configuration is timed; they take turns.
        steps: training steps of one such measurement.
        workers: `data.workers` of every configuration; None: chosen by platform, as in training.
        json_file: file for the tokens per second of every round, by configuration.
    """
    named = {name: load_named_config(name) for name in configs}
    named = {
        name: replace(config, data=replace(config.data, workers=workers))
        for name, config in named.items()
    }
    rates = measure(named, rounds, steps)
    print(f"{jax.devices()[0].device_kind}, {rounds} rounds of {steps} steps")
    for name, own in rates.items():
        low, middle, high = np.quantile(own / rates[configs[0]], [0.25, 0.5, 0.75])
        print(
            f"{name:<14} {np.median(own):8,.0f} tokens/s  ×{middle:.3f} of {configs[0]} "
            f"(quartiles {low:.3f} … {high:.3f})"
        )
    if json_file is not None:
        json_file.write_text(json.dumps({name: list(own) for name, own in rates.items()}))


if __name__ == "__main__":
    run_function(main)
