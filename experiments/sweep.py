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
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", ".cache/xla")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share a GPU

import jax
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configs.small import Kind, small_config
from engram_jax.command_line import load_named_config
from engram_jax.config import Config, MemoryConfig
from engram_jax.costs.accounting import account
from engram_jax.data.corpus import Corpus
from engram_jax.errors import InputError, one_sentence
from engram_jax.evaluation.health import HealthStudy, warn_of_inert
from engram_jax.evaluation.held_out import Scorer, evaluate_held_out, make_scorer, pool
from engram_jax.files import atomic_write, hold_lock
from engram_jax.hashing import NgramHash
from engram_jax.identity import CHANGEABLE
from engram_jax.metrics import read_metrics
from engram_jax.program import Program
from engram_jax.run import Run
from engram_jax.train_state import Weights
from engram_jax.trainer import Diverged, train
from experiments.results import Floats, Record, Results, standard_error

PROSE = ("vital_en", "austen")
OTHER_TOKENS = 16_384  # held-out tokens of a source that is not prose
CODE = ("engram_jax", "pallas_kernels", "configs", "experiments")
STYLE: dict[str, Any] = {"fmt": "o", "capsize": 3, "markersize": 6}

type Family = Callable[[Kind], Config]
type Measure = Callable[[Run, Weights], dict[str, Any]]


@dataclass(frozen=True)
class Arm:
    """One line of an experiment's table.

    Attributes:
        label: its name there.
        config: what is trained; the sweep sets the seed and the number of steps.
        steps: training steps relative to those of the other arms.
        measure: more figures of a trained run, which are added to its record.
    """

    label: str
    config: Config
    steps: float = 1.0
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
    draw: Callable[[Results, Figure], str]


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        size: size of the small family; "default" is the default model, for `comparison` alone.
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
        config: its complete configuration.
    """

    arm: Arm
    config: Config

    @property
    def key(self) -> str:
        """Hash of the configuration (and of the name of the arm's own figures)."""
        facts = settings(self.config) | {"measure": getattr(self.arm.measure, "__name__", None)}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def is_in(self, results: Results) -> bool:
        """Whether this run is finished."""
        return any(
            (record["label"], record["key"]) == (self.arm.label, self.key)
            for record in results.records
        )


def settings(config: Config) -> dict[str, Any]:
    """The fields that differ from their defaults, by dotted name.

    Fields that change results by rounding only are left out. A field that is added later, with the
    earlier behavior as its default, does not change these settings.
    """
    if not config.memory.layers:
        config = without_memory(config)
    return {
        name: value
        for name, value in _differing(config)
        if name != "name" and not name.startswith(CHANGEABLE)
    }


def without_memory(config: Config) -> Config:
    """The same backbone without memory."""
    return replace(config, memory=MemoryConfig(layers=()))


def _differing(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for item in fields(part):
        value, name = getattr(part, item.name), prefix + item.name
        default = item.default
        if item.default_factory is not MISSING:
            default = item.default_factory()
        if value == default:
            continue
        if not is_dataclass(value):
            yield name, list(value) if isinstance(value, tuple) else value
            continue
        if type(value) is not type(default):
            yield name, type(value).__name__
        yield from _differing(value, f"{name}.")


def make_tasks(experiment: Experiment, options: Options, family: Family) -> list[Task]:
    """All runs, those of seed 0 first.

    Raises:
        InputError: an unknown label in `only`.
    """
    arms = experiment.arms(family)
    labels = [arm.label for arm in arms]
    if unknown := sorted(set(options.only) - set(labels)):
        raise InputError(f"There is no arm {', '.join(unknown)}; choose from {', '.join(labels)}.")
    tasks = []
    for seed in range(options.seeds):
        for arm in arms:
            if options.only and arm.label not in options.only:
                continue
            usual = options.steps or (1000 if options.size == "default" else 500)
            steps = max(round(usual * arm.steps), 1)
            schedule = replace(
                arm.config.train,
                steps=steps,
                seed=seed,
                evaluate_every=0,
                evaluate_tokens=256,  # `measure` evaluates the trained model
                checkpoint_every=max(steps // 10, 1),
                keep_checkpoints=1,
            )
            tasks.append(Task(arm, replace(arm.config, train=schedule)))
    return tasks


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
        write_report(experiment, Results.read(path), path)
        return Results.read(path)
    tasks = make_tasks(experiment, options, family or options.family)
    with _helpers(experiment, options.jobs - 1) as helpers:
        _work(experiment, options, tasks)
        for helper in helpers:
            helper.wait()
    if options.jobs > 1:
        _work(experiment, options, tasks)  # what a helper has left
    return Results.read(path)


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


def _work(experiment: Experiment, options: Options, tasks: Sequence[Task]) -> None:
    """Runs the tasks that are neither finished nor locked by another process."""
    path = options.path(experiment)
    folder = options.runs / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    labels = [arm.label for arm in dict.fromkeys(task.arm for task in tasks)]
    start, done = time.monotonic(), 0
    for task in tasks:
        if task.is_in(Results.read(path)):
            continue
        name = f"{task.key}-{task.config.train.seed}"
        with ExitStack() as stack:
            try:
                stack.enter_context(hold_lock(folder / f"{name}.lock", wait=False))
            except BlockingIOError:
                continue
            if task.is_in(Results.read(path)):
                continue
            record = _finished_elsewhere(task, options.results)
            if record is None:
                print(f"{task.arm.label}, seed {task.config.train.seed}:", flush=True)
                try:
                    record = _train_and_measure(task, folder / name, options.jobs)
                except Diverged as error:
                    print(f"{task.arm.label}: {error}", file=sys.stderr)
                    continue
                done += 1
            with hold_lock(folder / "results.lock"):
                results = Results.read(path).add(record, labels)
                results.write(path)
                write_report(experiment, results, path)
            if not options.keep:
                shutil.rmtree(folder / name / "checkpoints", ignore_errors=True)
        left = sum(not other.is_in(results) for other in tasks)
        seconds = (time.monotonic() - start) / max(done, 1) * left / options.jobs
        print(
            f"{len(tasks) - left} of {len(tasks)} runs are finished, {task.arm.label} (seed "
            f"{task.config.train.seed}) with {record['loss']['prose']:.4f}; about "
            f"{seconds / 60:.0f} minutes left.",
            flush=True,
        )


def _finished_elsewhere(task: Task, folder: Path) -> Record | None:
    """The record of an equal run of any experiment, with this task's label."""
    for path in sorted(folder.glob("*.json")):
        for record in Results.read(path).records:
            if record["key"] == task.key:
                return record | {"label": task.arm.label}
    return None


def _train_and_measure(task: Task, folder: Path, jobs: int) -> Record:
    """Trains and evaluates a run.

    Raises:
        SystemExit: SIGINT or SIGTERM stopped the training; a checkpoint is saved.
    """
    start, config = time.monotonic(), task.config
    run = Run.start(config, folder)
    state = train(run)
    if int(state.step) < config.train.steps:
        sys.exit(f"Stopped at step {int(state.step)} of {config.train.steps} in {folder}.")
    figures = measure(run, state.weights)
    for warning in warn_of_inert(figures.get("health", {})):
        print(f"{task.arm.label}: {warning}", file=sys.stderr)
    if task.arm.measure is not None:
        figures |= task.arm.measure(run, state.weights)
    lines = read_metrics(folder)
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    counted = account(replace(config, train=replace(config.train, seed=0)))
    del state, run
    jax.clear_caches()
    gc.collect()
    return {
        "label": task.arm.label,
        "seed": config.train.seed,
        "key": task.key,
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
            "seconds": round(time.monotonic() - start, 1),
            "jobs": jobs,
            "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
            "commit": _commit(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }


def measure(run: Run, weights: Weights) -> dict[str, Any]:
    """The figures of a trained run: held-out losses, and what the memory does.

    - loss: nats per token by source, and of all prose ("prose"); standard_error of the latter, over
      documents.
    - dropped: increase of the prose loss without the memory's output.
    - other_hash: increase of the prose loss if rows are looked up with other hash multipliers.
    - health: by layer id (`HealthStudy`).
    """
    corpora = run.corpora()
    prose = prose_of(corpora)
    rest = [corpus for corpus in corpora if corpus not in prose]
    program, study = run.program, HealthStudy()
    scorer = make_scorer(program)

    def prose_loss(program: Program, scorer: Scorer) -> float:
        return pool(list(evaluate_held_out(program, scorer, weights, prose).values())).loss

    with program.use_mesh():
        scores = evaluate_held_out(program, scorer, weights, prose, watch=study)
        pooled = pool(list(scores.values()))
        scores |= evaluate_held_out(program, scorer, weights, rest, max_tokens=OTHER_TOKENS)
        losses = {name: score.loss for name, score in scores.items()} | {"prose": pooled.loss}
        figures: dict[str, Any] = {"loss": losses, "standard_error": pooled.standard_error}
        if program.ngram_hash is not None:
            spec, projection = program.ngram_hash.spec, program.ngram_hash.projection
            other = NgramHash.build(replace(spec, seed=spec.seed + 1), projection)
            rehashed = prose_loss(replace(program, ngram_hash=other), scorer)
            dropped = prose_loss(program, make_scorer(program, "output"))
            figures |= {"dropped": dropped - pooled.loss, "other_hash": rehashed - pooled.loss}
        if health := study.report():
            figures["health"] = health
    return figures


def prose_of(corpora: Sequence[Corpus]) -> list[Corpus]:
    """The corpora of prose; all, if there is none."""
    return [corpus for corpus in corpora if corpus.name in PROSE] or list(corpora)


@cache
def _commit() -> str:
    """The commit of the code, with "+changes" if files of the code differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", *CODE], check=True, capture_output=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + "+changes" * bool(changed)


def write_report(experiment: Experiment, results: Results, path: Path) -> None:
    """Writes table and plot beside the JSON file, from the results alone.

    Raises:
        InputError: there are no results.
    """
    if not results.records:
        raise InputError(f"There are no results in {path}; run the experiment first.")
    figure = Figure(figsize=(8, 4.5), dpi=160, facecolor="white", layout="constrained")
    remarks = experiment.draw(results, figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
    with atomic_write(path.with_suffix(".png")) as partial:
        figure.savefig(partial, metadata={"Software": None})
    table = "\n\n".join(part for part in (results.table(experiment.baseline), remarks) if part)
    with atomic_write(path.with_suffix(".md")) as partial:
        partial.write_text(f"{table}\n", "utf-8")


def draw_differences(results: Results, figure: Figure, baseline: str) -> str:
    """A dot per label: its loss minus that of the baseline, with one standard error and all seeds.

    As an experiment's `draw`, it has nothing to add to the table.
    """
    axes = figure.subplots()
    labels = [label for label in results.labels() if label != baseline]
    for place, label in enumerate(labels):
        values = results.differences(label, baseline, "loss", "prose")
        if len(values):
            axes.plot(values, [place] * len(values), "o", color="#bbb", markersize=3.5)
            error = standard_error(values)
            axes.errorbar(values.mean(), place, xerr=error, color="#3b6fd4", **STYLE)
    axes.axvline(0, color="#222", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"held-out loss minus that of “{baseline}”, nats per token of prose")
    return ""


def draw_points(axes: Axes, x: Floats, values: Sequence[Floats], color: str, label: str) -> None:
    """Means over seeds with one standard error, and behind them the values of all seeds."""
    for place, of_place in zip(x, values, strict=True):
        axes.plot([place] * len(of_place), of_place, "o", color=color, alpha=0.3, markersize=3.5)
    means = [np.mean(of_place) for of_place in values]
    errors = [standard_error(of_place) for of_place in values]
    axes.errorbar(x, means, yerr=errors, color=color, label=label, **STYLE)


def main(experiment: Experiment) -> None:
    """Parses the command line, runs the experiment, and prints its table."""
    with one_sentence():
        # Outside of training, where the trainer handles it: ends the helpers, too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        options = tyro.cli(Options, prog=f"experiments.{experiment.name}")
        run_experiment(experiment, options)
        print(options.path(experiment).with_suffix(".md").read_text("utf-8"))
