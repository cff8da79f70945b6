"""One run of an experiment, trained and measured; and the relative speed of two configurations."""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import throughput
from engram_jax.config import Config
from engram_jax.costs.accounting import account
from engram_jax.evaluation.health import warn_of_inert
from engram_jax.files import atomic_write
from engram_jax.metrics import read_metrics
from engram_jax.run import Run
from engram_jax.train_state import Weights
from engram_jax.trainer import train
from experiments.measure import VERSION, measure
from experiments.results import Record
from experiments.settings import settings

CODE = ("engram_jax", "pallas_kernels", "configs", "experiments")
SECONDS = "seconds.txt"  # in the folder of a run: the time of all its sessions
ROUNDS, STEPS = 7, 20  # of a measurement of speed

type Measure = Callable[[Run, Weights], dict[str, Any]]


def train_and_measure(
    config: Config, folder: Path, *, jobs: int, more: Measure | None = None
) -> Record:
    """Trains and evaluates a run, and returns its record, without label and key.

    Args:
        config: what is trained.
        folder: its folder; a run in it is resumed.
        jobs: number of processes that train at the same time.
        more: other figures of the trained run, which are added.

    Raises:
        Diverged: the loss or the gradient is not finite.
        SystemExit: SIGINT or SIGTERM stopped the training; a checkpoint is saved.
    """
    run = Run.start(config, folder)
    with _stopwatch(folder / SECONDS) as seconds:
        state = train(run)
        if int(state.step) < config.train.steps:
            sys.exit(f"Stopped at step {int(state.step)} of {config.train.steps} in {folder}.")
        figures = measure(run, state.weights)
        for warning in warn_of_inert(figures.get("health", {})):
            print(f"{config.name}, seed {config.train.seed}: {warning}", file=sys.stderr)
        if more is not None:
            figures |= more(run, state.weights)
        taken = seconds()
    lines = read_metrics(folder)
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    counted = account(replace(config, train=replace(config.train, seed=0)))
    del state, run
    jax.clear_caches()
    gc.collect()
    return {
        "seed": config.train.seed,
        "measurement": VERSION,
        **figures,
        "account": {
            "total": counted.total,
            "activated": counted.activated,
            "memory": counted.memory,
            "rows": counted.memory // config.memory.row_width,
            "training_flops": counted.training_flops,
        },
        "settings": settings(config),
        "measured": {
            "tokens_per_second": float(np.median(speeds)) if speeds else None,
            "seconds": round(taken, 1),
            "jobs": jobs,
            "device": f"{jax.devices()[0].device_kind}, {_cores()} cores",
            "commit": COMMIT,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }


def relative_speed(config: Config, other: Config) -> float:
    """Tokens/s of a configuration relative to another: the median ratio of several rounds.

    Both train alternately in this process, because tokens/s of different hours differ by more.
    """
    rates = throughput.measure({"own": config, "other": other}, ROUNDS, STEPS)
    jax.clear_caches()
    gc.collect()
    return float(np.median(rates["own"] / rates["other"]))


def _cores() -> int | None:
    """The number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count()


@contextmanager
def _stopwatch(path: Path) -> Iterator[Callable[[], float]]:
    """Seconds in this block, added to those of earlier sessions, which a file keeps."""
    before = float(path.read_text()) if path.exists() else 0.0
    start = time.monotonic()

    def seconds() -> float:
        return before + time.monotonic() - start

    try:
        yield seconds
    finally:
        with atomic_write(path) as partial:
            partial.write_text(f"{seconds():.3f}\n")


def _read_commit(folder: Path) -> str:
    """The commit of the code, with "+changes" if files of the code differ from it."""
    git = ["git", "-C", str(folder)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
        changed = subprocess.run(
            # From the root of the repository, of which `folder` is a part.
            [*git, "status", "--porcelain", "--", *(f":/{name}" for name in CODE)],
            check=True,
            capture_output=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + "+changes" * bool(changed)


COMMIT = _read_commit(
    Path(__file__).parent
)  # when the code is imported: the files may change while runs train
