"""Kinds of model trained against each other on the shipped texts, three seeds of each.

    python -m benchmarks.comparison [default | 2m | 10m | 100m] [--steps N] [--folder PATH]

Measures throughput; trains and evaluates what is not there yet in runs/comparison/; prints the
table. "default" is the default model and OverEncoding against their dense twin, and that twin given
the wall-clock time that Engram takes: an hour or two on two CPU cores. A size of the small family
is its dense model, mixture of experts, OverEncoding and Engram. Prose are the sources vital_en and
austen.
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
    """Runs a program of this repository and stops if it fails."""
    subprocess.run([sys.executable, *words], check=True)


def train_and_evaluate(run: Path, config: str, seed: int, steps: int) -> dict[str, Any]:
    """What eval.py writes of a run, which is trained and evaluated if it is not there.

    Raises:
        InputError: the run that is there is of another configuration than this one is now.
    """
    if (run / "eval.json").exists():
        named, stored = load_named_config(config), load_config(run / "config.json")
        if stored != replace(named, train=stored.train):
            raise InputError(
                f"{run} is of another {config} than configs/ holds now; delete it, or give "
                "another --folder."
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
        family: the models: the default one with its twins, or a size of the small family.
        folder: where the runs lie, a folder per family.
        steps: optimizer steps; those of the configuration by default.
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
        lines.append(("dense twin, as long as Engram takes", dense, longer))

    print("| model | steps | held-out loss | less dense, by seed | tokens/s, of dense | minutes |")
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
        "\nNats per token of the prose sources, mean ± standard error over seeds; minutes of the "
        "steps alone, at the measured tokens/s."
    )


def mean_and_error(values: np.ndarray) -> str:
    """Of the seeds."""
    return f"{values.mean():.4f} ± {values.std(ddof=1) / np.sqrt(len(values)):.4f}"


if __name__ == "__main__":
    with one_sentence():
        tyro.cli(main)
