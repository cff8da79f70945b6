"""The first table of the README: dense twin, OverEncoding and Engram, three seeds each.

    python -m benchmarks.first_table [--flags …]

Measures throughput; trains and evaluates what is not there yet in runs/first_table/ (an hour or
two on two CPU cores); prints the table. The three models share backbone, tokens and steps; a fourth
line is the dense twin given the wall-clock time that Engram takes. Prose are the sources vital_en
and austen.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.throughput import measure
from engram_jax.command_line import load_named_config

LABELS = {
    "dense": "dense twin",
    "over_encoding": "OverEncoding",
    "default": "Engram",
    "dense_longer": "dense twin, as long as Engram takes",
}
SEEDS = (0, 1, 2)
PROSE = ("vital_en", "austen")


def call(*words: str) -> None:
    """Runs a program of this repository and stops if it fails."""
    subprocess.run([sys.executable, *words], check=True)


def train_and_evaluate(run: Path, config: str, seed: int, steps: int) -> dict[str, Any]:
    """What eval.py writes of a run, which is trained and evaluated if it is not there."""
    if not (run / "eval.json").exists():
        flags = ["--train.seed", str(seed), "--train.steps", str(steps)]
        flags += ["--train.evaluate-every", "0", "--train.keep-checkpoints", "1"]
        call("train.py", config, "--run", str(run), *flags)
        call("eval.py", str(run))
    written: dict[str, Any] = json.loads((run / "eval.json").read_text())
    return written


def prose_loss(written: dict[str, Any]) -> float:
    """Held-out nats per token over the prose sources."""
    scores = [written["held_out"][name] for name in PROSE]
    return float(np.average([s["loss"] for s in scores], weights=[s["tokens"] for s in scores]))


def main(folder: Path = Path("runs/first_table"), rounds: int = 15) -> None:
    """Measures, trains, evaluates, prints.

    Args:
        folder: where the runs lie.
        rounds: rounds of the throughput measurement.
    """
    folder.mkdir(parents=True, exist_ok=True)
    speeds = folder / "throughput.json"
    if not speeds.exists():
        speeds.write_text(json.dumps({k: list(v) for k, v in measure(rounds, 4).items()}))
    rates = {name: np.array(values) for name, values in json.loads(speeds.read_text()).items()}
    relative = {name: float(np.median(own / rates["dense"])) for name, own in rates.items()}
    steps = dict.fromkeys(LABELS, load_named_config("default").train.steps)
    steps["dense_longer"] = round(steps["dense"] / relative["default"])
    relative["dense_longer"], rates["dense_longer"] = 1.0, rates["dense"]

    losses = {
        name: [
            prose_loss(
                train_and_evaluate(
                    folder / f"{name}-{seed}",
                    "dense" if name == "dense_longer" else name,
                    seed,
                    steps[name],
                )
            )
            for seed in SEEDS
        ]
        for name in LABELS
    }
    print("| model | steps | held-out loss | minus dense, paired by seed | tokens/s, of dense |")
    print("|---|---|---|---|---|")
    for name, label in LABELS.items():
        own = np.array(losses[name])
        gain = own - losses["dense"]
        print(
            f"| {label} | {steps[name]:,} | {mean_and_error(own)} | {mean_and_error(gain)} "
            f"| {relative[name]:.3f} ({np.median(rates[name]):,.0f}) |"
        )
    print("\nNats per token of the prose sources: mean ± standard error over seeds.")


def mean_and_error(values: np.ndarray) -> str:
    """Of the seeds."""
    return f"{values.mean():.4f} ± {values.std(ddof=1) / np.sqrt(len(values)):.4f}"


if __name__ == "__main__":
    tyro.cli(main)
