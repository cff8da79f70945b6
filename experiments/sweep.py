"""The engine of the experiments: trains configurations × seeds, and keeps the results as data.

    python -m experiments.NAME [--size 2m] [--seeds 3] [--steps N] [--jobs N] [--plot-only]

A run is finished when its line is in docs/results/NAME.json, and is then never repeated, even if
its folder is gone. Runs that are not finished resume from their newest checkpoint, so a kill loses
at most a tenth of a run. All lines of seed 0 run first. Any number of processes can work on the
same experiment: a lock on each run divides them. After every run, the JSON file, the table
(NAME.md) and the plot (NAME.png) are written again, and the run's checkpoints are deleted.
"""

import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from configs.small import Kind, small_config
from engram_jax.command_line import load_named_config
from engram_jax.config import Config
from engram_jax.costs.accounting import account
from engram_jax.errors import InputError, one_sentence
from engram_jax.evaluation.health import warn_of_inert
from engram_jax.files import atomic_write, hold_lock
from engram_jax.metrics import read_metrics
from engram_jax.run import Run
from engram_jax.train_state import Weights
from engram_jax.trainer import Diverged, train
from experiments.measure import VERSION, measure
from experiments.report import Draw, write_report
from experiments.results import Record, Results, steps_of
from experiments.settings import settings

CODE = ("engram_jax", "pallas_kernels", "configs", "experiments")
SECONDS = "seconds.txt"  # in the folder of a run: the time of all its sessions

type Family = Callable[[Kind], Config]
type Measure = Callable[[Run, Weights], dict[str, Any]]


@dataclass(frozen=True)
class Arm:
    """One line of an experiment's table.

    Attributes:
        label: its name there.
        config: what is trained; the sweep sets the seed and the number of steps.
        same_time: two labels, of an arm with this configuration and of a slower or faster one. This
            arm trains for the time of the second: its number of steps follows from their tokens/s
            with seed 0.
        measure: more figures of a trained run, which are added to its record.
    """

    label: str
    config: Config
    same_time: tuple[str, str] | None = None
    measure: Measure | None = None


@dataclass(frozen=True)
class Experiment:
    """A figure of the paper.

    Attributes:
        name: of its file, and of its results.
        arms: the lines of its table; the argument gives the configurations of the chosen size.
        baseline: label of the arm that the others are compared with.
        draw: draws the results, and returns what is to be said below the table.
    """

    name: str
    arms: Callable[[Family], Sequence[Arm]]
    baseline: str
    draw: Draw


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        size: size of the small family; "default" is the default model, for `comparison` and
            `row_optimizers`.
        steps: optimizer steps of 2,048 tokens; by default 500, and 1,000 for the default model.
        seeds: runs of every configuration, with seeds 0, 1, …
        jobs: processes that train at the same time.
        only: labels to run; by default, all.
        keep: keep the checkpoints of finished runs.
        plot_only: write table and plot again from the JSON file, without training.
        runs: folder of the runs.
        results: folder of the results.
    """

    size: Literal["2m", "10m", "100m", "default"] = "2m"
    steps: int | None = None
    seeds: int = 3
    jobs: int = 1
    only: tuple[str, ...] = ()
    keep: bool = False
    plot_only: bool = False
    runs: Path = Path("runs/experiments")
    results: Path = Path("docs/results")

    def path(self, experiment: Experiment) -> Path:
        """The file of the results; its name tells a size or length other than the usual."""
        size = "" if self.size == "2m" else f"_{self.size}"
        steps = "" if self.steps is None else f"_{self.steps}_steps"
        return self.results / f"{experiment.name}{size}{steps}.json"

    def family(self, kind: Kind) -> Config:
        """The configuration of a kind of model in the chosen size."""
        if self.size == "default":
            return load_named_config("default" if kind == "engram" else kind)
        return small_config(kind, self.size)


@dataclass(frozen=True)
class Task:
    """One run of an arm.

    Attributes:
        arm: the arm.
        seed: its seed.
        steps: number of steps of arms without `same_time`.
    """

    arm: Arm
    seed: int
    steps: int

    def config(self, results: Results) -> Config | None:
        """The complete configuration; None: its number of steps is not known yet."""
        steps = self._steps(results)
        if steps is None:
            return None
        schedule = replace(
            self.arm.config.train,
            steps=steps,
            seed=self.seed,
            evaluate_every=0,
            evaluate_tokens=256,  # `measure` evaluates the trained model
            checkpoint_every=max(steps // 10, 1),
            keep_checkpoints=1,
        )
        return replace(self.arm.config, train=schedule)

    def _steps(self, results: Results) -> int | None:
        if self.arm.same_time is None:
            return self.steps
        if begun := results.of(self.arm.label):
            return steps_of(begun[0])
        own, other = (
            [record["measured"]["tokens_per_second"] for record in results.of(label)[:1]]
            for label in self.arm.same_time
        )
        if not (own and other and own[0] and other[0]):
            return None
        return max(round(self.steps * own[0] / other[0]), 1)

    def key(self, config: Config) -> str:
        """Hash of the configuration and of what is measured: version, and the arm's own figures."""
        measured = {
            "measure": getattr(self.arm.measure, "__name__", None),
            "measurement": VERSION,
        }
        return _hash(settings(config) | measured)

    def is_in(self, results: Results) -> bool:
        """Whether this run is finished."""
        config = self.config(results)
        return config is not None and any(
            (record["label"], record["key"]) == (self.arm.label, self.key(config))
            for record in results.records
        )


def _hash(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def make_tasks(arms: Sequence[Arm], options: Options) -> list[Task]:
    """All runs, those of seed 0 first.

    Raises:
        InputError: an unknown label in `only`.
    """
    labels = [arm.label for arm in arms]
    if unknown := sorted(set(options.only) - set(labels)):
        raise InputError(f"There is no arm {', '.join(unknown)}; choose from {', '.join(labels)}.")
    steps = options.steps or (1000 if options.size == "default" else 500)
    return [
        Task(arm, seed, steps)
        for seed in range(options.seeds)
        for arm in arms
        if not options.only or arm.label in options.only
    ]


def run_experiment(
    experiment: Experiment, options: Options, family: Family | None = None
) -> Results:
    """Trains what is missing, with `options.jobs` processes, and returns all results.

    Args:
        experiment: the experiment.
        options: what to run.
        family: configurations by kind; by default, those of `options.size`.

    Raises:
        InputError: invalid options, or runs that cannot start.
    """
    path = options.path(experiment)
    if options.plot_only:
        results = Results.read(path)
        write_report(results, path, experiment.baseline, experiment.draw)
        return results
    arms = experiment.arms(family or options.family)
    tasks = make_tasks(arms, options)
    worker = _Worker(experiment, options, [arm.label for arm in arms])
    with _helpers(experiment, options.jobs - 1) as helpers:
        worker.run(tasks)
        for helper in helpers:
            helper.wait()
    results = worker.run(tasks)  # what a helper has left, and arms that waited for other arms
    if left := [task for task in tasks if not task.is_in(results)]:
        names = ", ".join(f"{task.arm.label} (seed {task.seed})" for task in left)
        print(f"Not finished: {names}.", file=sys.stderr)
    return results


@contextmanager
def _helpers(experiment: Experiment, count: int) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """More processes with the same command; they end with this one."""
    words = [sys.executable, "-m", f"experiments.{experiment.name}", *sys.argv[1:], "--jobs", "1"]
    helpers = [subprocess.Popen(words) for _ in range(count)]
    try:
        yield helpers
    finally:
        for helper in helpers:
            helper.terminate()


class _Worker:
    """One of the processes that work on an experiment.

    Args:
        experiment: the experiment.
        options: what to run.
        labels: of all arms, in their order.
    """

    def __init__(self, experiment: Experiment, options: Options, labels: Sequence[str]) -> None:
        self._experiment, self._options, self._labels = experiment, options, labels
        self._path = options.path(experiment)
        self._folder = options.runs / self._path.stem
        self._folder.mkdir(parents=True, exist_ok=True)
        self._start, self._trained = time.monotonic(), 0

    def run(self, tasks: Sequence[Task]) -> Results:
        """Runs the tasks that are neither finished nor locked by another process."""
        for task in tasks:
            results = Results.read(self._path)
            config = task.config(results)
            if config is None or task.is_in(results):
                continue
            name = f"{task.key(config)}-{task.seed}"
            with ExitStack() as stack:
                try:
                    stack.enter_context(hold_lock(self._folder / f"{name}.lock", wait=False))
                except BlockingIOError:
                    continue
                if not task.is_in(Results.read(self._path)):
                    self._finish(task, config, self._folder / name, tasks)
        return Results.read(self._path)

    def _finish(self, task: Task, config: Config, folder: Path, tasks: Sequence[Task]) -> None:
        """Adds a run's record to the results; trains it if no experiment has it."""
        record, name = self._known(task, config), f"{task.arm.label}, seed {task.seed}"
        if record is None:
            print(f"{name}:", flush=True)
            try:
                record = _train_and_measure(task, config, folder, self._options.jobs)
            except Diverged as error:
                print(f"{name}: {error}", file=sys.stderr)
                return
            self._trained += 1
        with hold_lock(self._folder / "results.lock"):
            results = Results.read(self._path).add(record, self._labels)
            results.write(self._path)
            write_report(results, self._path, self._experiment.baseline, self._experiment.draw)
        if not self._options.keep:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            (folder / SECONDS).unlink(missing_ok=True)
        left = sum(not other.is_in(results) for other in tasks)
        seconds = (time.monotonic() - self._start) / max(self._trained, 1)
        print(
            f"{name}: {record['loss']['prose']:.4f}. {len(tasks) - left} of {len(tasks)} runs are "
            f"finished, about {seconds * left / self._options.jobs / 60:.0f} minutes left.",
            flush=True,
        )

    def _known(self, task: Task, config: Config) -> Record | None:
        """The record of an equal run of any experiment, with this task's label."""
        for path in sorted(self._options.results.glob("*.json")):
            for record in Results.read(path).records:
                if record.get("key") == task.key(config):
                    return record | {"label": task.arm.label}
        return None


def _train_and_measure(task: Task, config: Config, folder: Path, jobs: int) -> Record:
    """Trains and evaluates a run.

    Raises:
        SystemExit: SIGINT or SIGTERM stopped the training; a checkpoint is saved.
    """
    run = Run.start(config, folder)
    with _stopwatch(folder / SECONDS) as seconds:
        state = train(run)
        if int(state.step) < config.train.steps:
            sys.exit(f"Stopped at step {int(state.step)} of {config.train.steps} in {folder}.")
        figures = measure(run, state.weights)
        for warning in warn_of_inert(figures.get("health", {})):
            print(f"{task.arm.label}: {warning}", file=sys.stderr)
        if task.arm.measure is not None:
            figures |= task.arm.measure(run, state.weights)
        taken = seconds()
    lines = read_metrics(folder)
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    counted = account(replace(config, train=replace(config.train, seed=0)))
    del state, run
    jax.clear_caches()
    gc.collect()
    return {
        "label": task.arm.label,
        "seed": config.train.seed,
        "key": task.key(config),
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
            "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
            "commit": COMMIT,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }


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


def main(experiment: Experiment) -> None:
    """Parses the command line, runs the experiment, and prints its table."""
    with one_sentence():
        # Outside of training, where the trainer handles it: ends the helpers, too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        options = tyro.cli(Options, prog=f"experiments.{experiment.name}")
        run_experiment(experiment, options)
        print(options.path(experiment).with_suffix(".md").read_text("utf-8"))
