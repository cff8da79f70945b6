"""Training throughput: Engram and OverEncoding against their dense twin, in one process.

    python -m benchmarks.throughput [--rounds N]

Prints the median step time of each config, and the ratio of its tokens/s to the dense twin's.
"""

import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from engram_jax.command_line import load_named_config
from engram_jax.data.pipeline import make_batches
from engram_jax.run import Run
from engram_jax.trainer import make_train_step

BASELINE = "dense"
BATCHES = 6


def prepare(name: str, folder: Path) -> tuple[Any, Any, list[Any]]:
    """A compiled train step, a state, and batches on the device."""
    config = load_named_config(name)
    data = config.data
    run = Run.start(config, folder / name)
    with make_batches(
        run.corpora(),
        sequence_length=data.sequence_length,
        batch_size=data.batch_size,
        planner=run.planner(),
    ) as stream:
        batches = [run.put(batch) for batch in islice(stream, BATCHES)]
    with jax.set_mesh(run.mesh):
        step = make_train_step(run)
        state, metrics = step(run.initial_state(), batches[0])
        jax.block_until_ready(metrics)
    return step, state, batches


def main(rounds: int = 15) -> None:
    """Measures.

    Args:
        rounds: steps of every config; they take turns.
    """
    names = [BASELINE, "over_encoding", "default"]
    config = load_named_config(BASELINE)
    tokens = config.data.batch_size * config.data.sequence_length
    with tempfile.TemporaryDirectory() as folder:
        prepared = {name: prepare(name, Path(folder)) for name in names}
        mesh = Run.start(config, Path(folder) / "mesh").mesh
        seconds: dict[str, list[float]] = {name: [] for name in names}
        with jax.set_mesh(mesh):
            for number in range(rounds):
                for name, (step, state, batches) in prepared.items():
                    start = time.perf_counter()
                    state, metrics = step(state, batches[number % BATCHES])
                    jax.block_until_ready(metrics)
                    seconds[name].append(time.perf_counter() - start)
                    prepared[name] = step, state, batches
    print(f"{jax.devices()[0].device_kind}, {tokens} tokens a step, {rounds} rounds")
    baseline = np.array(seconds[BASELINE])
    for name in names:
        own = np.array(seconds[name])
        ratios = baseline / own
        print(
            f"{name:<14} {np.median(own) * 1e3:7.1f} ms  {tokens / np.median(own):8,.0f} tokens/s  "
            f"×{np.median(ratios):.3f} of {BASELINE} "
            f"(quartiles {np.quantile(ratios, 0.25):.3f} … {np.quantile(ratios, 0.75):.3f})"
        )


if __name__ == "__main__":
    tyro.cli(main)
