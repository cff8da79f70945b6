"""The engine of the experiments: trains configurations × seeds, and keeps the results as data.

    python -m experiments.NAME [--size 2m] [--seeds 3] [--steps N] [--jobs N] [--plot-only]

A run is finished when its line is in docs/results/NAME.json, and is then never repeated, even if
its folder is gone. Runs that are not finished resume from their newest checkpoint, so a kill loses
at most a tenth of a run. All lines of seed 0 run first. Any number of processes can work on the
same experiment: a lock on each run divides them. After every run and at the end, the JSON file, the
table (NAME.md) and the plot (NAME.png) are written again. The run's checkpoints are deleted.
"""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from configs.small import Kind, small_config
from engram_jax.command_line import load_named_config, parse_flags
from engram_jax.config import Config
from engram_jax.data.packing import ORDER
from engram_jax.errors import InputError, one_sentence
from engram_jax.files import atomic_write, hold_lock
from engram_jax.training_progress import Diverged
from experiments.measure import VERSION
from experiments.one_run import SECONDS, Measure, relative_speed, train_and_measure
from experiments.report import Draw, write_report
from experiments.results import Record, Results, order_of
from experiments.settings import settings

type Family = Callable[[Kind], Config]


@dataclass(frozen=True)
class Arm:
    """One line of an experiment's table.

    Attributes:
        label: its name there.
        config: what is trained; the sweep sets the seed and the number of steps.
        same_time: a configuration of another speed. This arm's number of steps is multiplied by
            its tokens/s relative to that configuration (`relative_speed`), so that both train for
            about the same time. None: the usual number of steps.
        measure: more figures of a trained run, which are added to its record.
    """

    label: str
    config: Config
    same_time: Config | None = None
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

    def config(self, speed: float | None) -> Config:
        """The complete configuration.

        Args:
            speed: of an arm with `same_time`, relative to that configuration; None: another arm.
        """
        steps = self.steps if speed is None else max(round(self.steps * speed), 1)
        train = replace(
            self.arm.config.train,
            steps=steps,
            seed=self.seed,
            evaluate_every=0,
            evaluate_tokens=256,  # `measure` evaluates the trained model
            checkpoint_every=max(steps // 10, 1),
            keep_checkpoints=1,
        )
        return replace(self.arm.config, train=train)

    def key(self, config: Config, order: int = ORDER) -> str:
        """Hash of the configuration, of what is measured, and of the order of the documents.

        Args:
            config: the configuration.
            order: version of the order (`packing.ORDER`); the first one is not in the hash.
        """
        measured = {
            "measure": getattr(self.arm.measure, "__name__", None),
            "measurement": VERSION,
        }
        return _hash(settings(config) | measured | ({"order": order} if order > 1 else {}))

    def is_in(self, results: Results) -> bool:
        """Whether this run is finished."""
        speed = results.relative_speed(self.arm.label)
        if self.arm.same_time is not None and speed is None:
            return False
        config = self.config(speed)
        return any(
            record["key"] == self.key(config, order_of(record))
            for record in results.of(self.arm.label)
        )


def _hash(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def make_tasks(arms: Sequence[Arm], options: Options) -> list[Task]:
    """The runs of the arms in `options.only` (by default, of all), those of seed 0 first.

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
    worker.run(tasks)  # what a helper has left
    results = worker.report()
    if left := [task for task in tasks if not task.is_in(results)]:
        names = ", ".join(f"{task.arm.label} (seed {task.seed})" for task in left)
        print(f"Not finished: {names}.", file=sys.stderr)
    return results


@contextmanager
def _helpers(experiment: Experiment, count: int) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """More processes with the same command, which end before this one.

    Ctrl-C in a terminal does not reach them: a second signal would kill them while they save.
    """
    words = [sys.executable, "-m", f"experiments.{experiment.name}", *sys.argv[1:], "--jobs", "1"]
    helpers = [subprocess.Popen(words, start_new_session=True) for _ in range(count)]
    try:
        yield helpers
    finally:
        for helper in helpers:
            helper.terminate()
        for helper in helpers:
            helper.wait()


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
        self._lock = self._folder / "results.lock"
        self._start, self._trained = time.monotonic(), 0

    def run(self, tasks: Sequence[Task]) -> None:
        """Runs the tasks that are neither finished nor locked by another process."""
        for task in tasks:
            results = Results.read(self._path)
            if task.is_in(results):
                continue
            if results.orders(task.seed) - {ORDER}:
                print(
                    f"{task.arm.label}, seed {task.seed}: is not trained, because other runs of "
                    "this seed read the documents in an earlier order.",
                    file=sys.stderr,
                )
                continue
            speed = self._speed(task.arm, results)
            config = task.config(speed)
            name = f"{task.key(config)}-{task.seed}"
            with ExitStack() as stack:
                try:
                    stack.enter_context(hold_lock(self._folder / f"{name}.lock", wait=False))
                except BlockingIOError:
                    continue
                if not task.is_in(Results.read(self._path)):
                    record = self._record(task, config, self._folder / name)
                    if record is not None:
                        self._save(record | {"relative_speed": speed}, self._folder / name, tasks)

    def _speed(self, arm: Arm, results: Results) -> float | None:
        """The speed of an arm relative to its `same_time`, measured once for all its seeds.

        It is kept in a file: a killed run goes on with as many steps.
        """
        if arm.same_time is None:
            return None
        if (known := results.relative_speed(arm.label)) is not None:
            return known
        pair = _hash({"own": settings(arm.config), "other": settings(arm.same_time)})
        path = self._folder / f"{pair}.speed"
        with hold_lock(path.with_suffix(".lock")):
            if not path.exists():
                print(f"{arm.label}: measures the speed.", flush=True)
                speed = relative_speed(arm.config, arm.same_time)
                with atomic_write(path) as partial:
                    partial.write_text(f"{speed}\n")
            return float(path.read_text())

    def _record(self, task: Task, config: Config, folder: Path) -> Record | None:
        """A run's record; trains it if no experiment has it. None: it has diverged."""
        record, name = self._known(task, config), f"{task.arm.label}, seed {task.seed}"
        if record is None:
            print(f"{name}:", flush=True)
            try:
                more = task.arm.measure
                record = train_and_measure(config, folder, jobs=self._options.jobs, more=more)
            except Diverged as error:
                print(f"{name}: {error}", file=sys.stderr)
                return None
            self._trained += 1
        return record | {"label": task.arm.label, "key": task.key(config), "order": ORDER}

    def _save(self, record: Record, folder: Path, tasks: Sequence[Task]) -> None:
        """Adds a record to the results, and deletes the run's checkpoints."""
        with hold_lock(self._lock):
            results = Results.read(self._path).add(record, self._labels)
            results.write(self._path)
            self._report(results)
        if not self._options.keep:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            (folder / SECONDS).unlink(missing_ok=True)
        left = sum(not other.is_in(results) for other in tasks)
        seconds = (time.monotonic() - self._start) / max(self._trained, 1)
        print(
            f"{record['label']}, seed {record['seed']}: {record['loss']['prose']:.4f}. "
            f"{len(tasks) - left} of {len(tasks)} runs are finished, about "
            f"{seconds * left / self._options.jobs / 60:.0f} minutes left.",
            flush=True,
        )

    def report(self) -> Results:
        """Writes table and plot of all results, if there are any, and returns them.

        A process that was killed may have written a run without them.
        """
        with hold_lock(self._lock):
            results = Results.read(self._path)
            if results.records:
                self._report(results)
        return results

    def _report(self, results: Results) -> None:
        write_report(results, self._path, self._experiment.baseline, self._experiment.draw)

    def _known(self, task: Task, config: Config) -> Record | None:
        """The record of an equal run of any experiment, with this task's label."""
        for path in sorted(self._options.results.glob("*.json")):
            for record in Results.read(path).records:
                if record.get("key") == task.key(config):
                    return record
        return None


def main(experiment: Experiment) -> None:
    """Parses the command line, runs the experiment, and prints its table."""
    with one_sentence():
        # During training, the trainer handles SIGTERM. At other times, this exit ends the helpers.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        options = parse_flags(
            Options,
            description=f"Trains what is missing of the experiment {experiment.name}.",
            prog=f"experiments.{experiment.name}",
        )
        if run_experiment(experiment, options).records:
            print(options.path(experiment).with_suffix(".md").read_text("utf-8"))
