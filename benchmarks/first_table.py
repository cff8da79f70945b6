"""The first table of the README: dense twin, OverEncoding and Engram, three seeds each.

    python -m benchmarks.first_table [--steps N]

Trains and evaluates what is not there yet in runs/first_table/ (about 80 minutes on two CPU cores)
and prints the table. Same backbone, tokens and steps; prose are the sources vital_en and austen.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import tyro

from engram_jax.metrics import read_metrics

CONFIGS = {"dense": "dense twin", "over_encoding": "OverEncoding", "default": "Engram"}
SEEDS = (0, 1, 2)
FOLDER = Path("runs/first_table")
PROSE = ("vital_en", "austen")


def call(*words: str) -> None:
    """Runs a program of this repository and stops if it fails."""
    subprocess.run([sys.executable, *words], check=True)


def prose_loss(run: Path) -> float:
    """Held-out nats per token over the prose sources, from the run's eval.json."""
    scores = json.loads((run / "eval.json").read_text())["held_out"]
    tokens = [scores[name]["tokens"] for name in PROSE]
    return float(np.average([scores[name]["loss"] for name in PROSE], weights=tokens))


def main(steps: int = 1000, train: bool = True) -> None:
    """Trains, evaluates, prints.

    Args:
        steps: optimizer steps of every run.
        train: False prints the table of what is there.
    """
    losses: dict[str, list[float]] = {name: [] for name in CONFIGS}
    curves: dict[str, list[list[float]]] = {name: [] for name in CONFIGS}
    for seed in SEEDS:
        for name in CONFIGS:
            run = FOLDER / f"{name}-{seed}"
            if train:
                flags = ["--train.seed", str(seed), "--train.steps", str(steps)]
                flags += ["--train.evaluate-every", "100", "--train.evaluate-tokens", "8192"]
                flags += ["--train.checkpoint-every", "500", "--train.keep-checkpoints", "1"]
                call("train.py", name, "--run", str(run), *flags)
            if not (run / "eval.json").exists():
                call("eval.py", str(run))
            losses[name].append(prose_loss(run))
            lines = read_metrics(run, kind="held_out")
            curves[name].append([np.mean([line[f"loss/{s}"] for s in PROSE]) for line in lines])

    dense = np.array(losses["dense"])
    print("| model | held-out prose loss (nats) ± s.e. over seeds | minus dense, paired by seed |")
    print("|---|---|---|")
    for name, label in CONFIGS.items():
        own = np.array(losses[name])
        gain, error = own - dense, (own - dense).std(ddof=1) / np.sqrt(len(SEEDS))
        print(
            f"| {label} | {own.mean():.4f} ± {own.std(ddof=1) / np.sqrt(len(SEEDS)):.4f} "
            f"| {gain.mean():+.4f} ± {error:.4f} |"
        )
    print("\nheld-out prose loss while training (mean over seeds):")
    for name, label in CONFIGS.items():
        print(f"{label:<14}" + " ".join(f"{x:.3f}" for x in np.mean(curves[name], axis=0)))


if __name__ == "__main__":
    tyro.cli(main)
