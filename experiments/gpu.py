"""Allocation and memory law at size 10m on one GPU, in 14 minutes. `make gpu-experiments`

    python -m experiments.gpu [--minutes M] [--jobs N]

Several processes share the GPU, because a step of these models does not fill it. At the end of the
time, runs that are not finished are stopped; the results of the others are in docs/results/.
"""

import subprocess
import sys
import time

from engram_jax.command_line import run_function
from experiments.allocation import SHARES

SAVING = 20.0  # seconds in which stopped runs save their checkpoints

# Without the allocation's runs for equal time, because processes that share a GPU slow each other.
COMMANDS = {
    "allocation": ["--only", *(f"ρ {share}" for share in SHARES)],
    "memory_law": [],
}


def main(minutes: float = 14.0, jobs: int = 6) -> None:
    """Runs both experiments, one after the other, each for its share of the time.

    Args:
        minutes: time for both.
        jobs: processes that train at the same time.
    """
    end = time.monotonic() + 60 * minutes
    for left, (name, flags) in zip(range(len(COMMANDS), 0, -1), COMMANDS.items(), strict=True):
        words = ["-m", f"experiments.{name}", "--size", "10m", "--jobs", str(jobs), *flags]
        experiment = subprocess.Popen([sys.executable, *words])
        try:
            experiment.wait(timeout=max((end - time.monotonic()) / left - SAVING, 1))
        except subprocess.TimeoutExpired:
            experiment.terminate()
            experiment.wait()


if __name__ == "__main__":
    run_function(main)
