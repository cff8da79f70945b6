"""Allocation and memory law at size 10m on one GPU, in 14 minutes. `make gpu-experiments`

    python -m experiments.gpu [--minutes M] [--jobs N]

Several processes share the GPU, because a step of these models does not fill it. At the end of the
time, runs that are not finished are stopped; the results of the others are in docs/results/.
"""

import subprocess
import sys
import time

import tyro

from experiments.allocation import SHARES

# Without the allocation's runs for equal time, because processes that share a GPU slow each other.
COMMANDS = {
    "allocation": ["--only", *(f"ρ {share}" for share in SHARES)],
    "memory_law": [],
}


def main(minutes: float = 14.0, jobs: int = 6) -> None:
    """Runs both experiments, one after the other.

    Args:
        minutes: time for both.
        jobs: processes that train at the same time.
    """
    end = time.monotonic() + 60 * minutes
    for name, flags in COMMANDS.items():
        words = ["-m", f"experiments.{name}", "--size", "10m", "--jobs", str(jobs), *flags]
        experiment = subprocess.Popen([sys.executable, *words])
        try:
            experiment.wait(timeout=max(end - time.monotonic() - 20, 1))
        except subprocess.TimeoutExpired:
            experiment.terminate()
            experiment.wait()


if __name__ == "__main__":
    tyro.cli(main)
