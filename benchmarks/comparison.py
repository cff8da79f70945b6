"""Trains and compares kinds of model on the shipped texts, with three seeds each.

    python -m benchmarks.comparison [default | 2m | 10m | 100m] [--steps N] [--folder PATH]

Measures throughput, trains and evaluates the runs that are not yet in runs/comparison/, and prints
a table. "default" compares the default model, OverEncoding and the dense twin (the default model
without memory), and the dense twin trained for the same wall-clock time as Engram. This takes one
to two hours on two CPU cores. A size of the small family compares its dense model, mixture of
experts, OverEncoding and Engram. Prose is the sources vital_en and austen.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from benchmarks.throughput import CONFIGS, measure
from engram_jax.command_line import load_named_config
from engram_jax.config import load_config
from engram_jax.errors import InputError, one_sentence

LABELS = {
    "dense": "dense twin",
    "moe": "mixture of experts",
    "over_encoding": "OverEncoding",
    "engram": "Engram",
    "default": "Engram",
}
SMALL = ("dense", "moe", "over_encoding", "engram")
SEEDS = (0, 1, 2)
PROSE = ("vital_en", "austen")


def call(*words: str) -> None:
    """Runs a program of this repository; raises if it fails."""
    subprocess.run([sys.executable, *words], check=True)


def train_and_evaluate(run: Path, config: str, seed: int, steps: int) -> dict[str, Any]:
    """Returns the content of a run's eval.json. Trains and evaluates the run if necessary.

    Raises:
        InputError: the existing run has another configuration than the named one.
    """
    if (run / "eval.json").exists():
        named, stored = load_named_config(config), load_config(run / "config.json")
        # The number of processes that build batches changes no result.
        named = replace(named, data=replace(named.data, workers=stored.data.workers))
        if stored != replace(named, train=stored.train):
            raise InputError(
                f"{run} was made with another version of the configuration {config}; delete it, "
                "or choose another --folder."
            )
    else:
        flags = ["--train.seed", str(seed), "--train.steps", str(steps)]
        flags += ["--train.evaluate-every", "0", "--train.keep-checkpoints", "1"]
        call("train.py", config, "--run", str(run), *flags)
        call("eval.py", str(run), "--no-statistics")
    written: dict[str, Any] = json.loads((run / "eval.json").read_text())
    return written


def prose_loss(written: dict[str, Any]) -> float:
    """Held-out nats per token over the prose sources."""
    scores = [written["held_out"][name] for name in PROSE]
    return float(np.average([s["loss"] for s in scores], weights=[s["tokens"] for s in scores]))


def main(
    family: Annotated[Literal["default", "2m", "10m", "100m"], tyro.conf.Positional] = "default",
    folder: Path = Path("runs/comparison"),
    steps: int | None = None,
    rounds: int = 15,
) -> None:
    """Measures, trains, evaluates, prints.

    Args:
        family: the models: the default model with its baselines, or a size of the small family.
        folder: folder of the runs; each family has a folder in it.
        steps: optimizer steps; by default, those of the configuration.
        rounds: rounds of the throughput measurement.
    """
    folder = folder / family
    folder.mkdir(parents=True, exist_ok=True)
    configs = CONFIGS if family == "default" else tuple(f"{kind}_{family}" for kind in SMALL)
    speeds = folder / "throughput.json"
    if not speeds.exists():
        measured = measure(configs, rounds, 4)
        speeds.write_text(json.dumps({name: list(rates) for name, rates in measured.items()}))
    rates = {name: np.array(values) for name, values in json.loads(speeds.read_text()).items()}
    dense = configs[0]
    relative = {name: float(np.median(own / rates[dense])) for name, own in rates.items()}
    dense_config = load_named_config(dense)
    steps = steps or dense_config.train.steps
    tokens_of_step = dense_config.data.batch_size * dense_config.data.sequence_length
    lines = [(LABELS[name.removesuffix(f"_{family}")], name, steps) for name in configs]
    if family == "default":
        longer = round(steps / relative["default"])
        lines.append(("dense twin, for Engram's wall-clock time", dense, longer))

    print(
        "| model | steps | held-out loss | minus dense, paired by seed "
        "| tokens/s relative to dense | minutes |"
    )
    print("|---|---|---|---|---|---|")
    baseline = np.zeros(len(SEEDS))
    for label, name, steps_of_line in lines:
        runs = [
            train_and_evaluate(folder / f"{name}-{steps_of_line}-{seed}", name, seed, steps_of_line)
            for seed in SEEDS
        ]
        losses, speed = np.array([prose_loss(run) for run in runs]), np.median(rates[name])
        if (name, steps_of_line) == (dense, steps):
            baseline = losses
        print(
            f"| {label} | {steps_of_line:,} | {mean_and_error(losses)} "
            f"| {mean_and_error(losses - baseline)} "
            f"| {relative[name]:.3f} ({speed:,.0f}) "
            f"| {steps_of_line * tokens_of_step / speed / 60:.1f} |",
            flush=True,
        )
    print(
        "\nNats per token of the prose sources, mean ± standard error over seeds. Minutes are only "
        "for the steps, at the measured tokens/s."
    )


def mean_and_error(values: np.ndarray) -> str:
    """Mean ± standard error over seeds."""
    return f"{values.mean():.4f} ± {values.std(ddof=1) / np.sqrt(len(values)):.4f}"


if __name__ == "__main__":
    with one_sentence():
        tyro.cli(main)
