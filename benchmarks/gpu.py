"""Checks one GPU in 12 minutes: tests, kernels compared with XLA, training throughput. `make gpu`

    python -m benchmarks.gpu [--minutes M]

Runs the most important parts first. Each part has a time limit, and all of them end after
`minutes`. A part that fails or exceeds its limit does not stop the others. Writes the results to
benchmarks/results/, in a file with the device's name. The kernels' results are in a separate file
(see `benchmarks.kernels`).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from engram_jax.command_line import run_function

ROOT = Path(__file__).parent.parent
TWINS = (("dense", "default"), ("dense_10m", "engram_10m"), ("dense_100m", "engram_100m"))


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: its name in the results.
        words: the arguments of Python.
        seconds: its time limit.
        figures: the JSON file that it writes; None: it writes none.
    """

    name: str
    words: list[str] = field(repr=False)
    seconds: float
    figures: Path | None = None


def parts(folder: Path) -> list[Part]:
    """All parts, the most important ones first. They write their figures to `folder`."""
    pytest = ["-m", "pytest", "-q", "--numprocesses", "0"]
    planned = [
        Part("tests at real sizes", [*pytest, "tests/test_gpu.py"], 150),
        Part("kernels compared with XLA", ["-m", "benchmarks.kernels", "--rounds", "9"], 150),
    ]
    for dense, engram in TWINS:
        for workers in (0, 4):
            figures = folder / f"{engram}-{workers}.json"
            words = ["-m", "benchmarks.throughput", "--configs", dense, engram]
            words += ["--rounds", "9", "--steps", "20", "--workers", str(workers)]
            name = f"tokens/s of {dense} and {engram}, {workers} workers"
            planned.append(Part(name, [*words, "--json-file", str(figures)], 90, figures))
    kernels = [*pytest, "-k", "pallas_gpu", "tests/pallas_kernels"]
    return [*planned, Part("tests of the kernels", kernels, 150)]


def run(part: Part, seconds: float) -> dict[str, Any]:
    """Runs a part with its output shown, and returns its outcome."""
    print(f"== {part.name} (at most {min(seconds, part.seconds):.0f} s)", flush=True)
    start, limit = time.perf_counter(), min(seconds, part.seconds)
    try:
        status: int | None = subprocess.run(
            [sys.executable, *part.words], cwd=ROOT, timeout=limit, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        status = None
    outcome: dict[str, Any] = {
        "seconds": round(time.perf_counter() - start, 1),
        "outcome": {0: "done", None: "out of time"}.get(status, f"failed ({status})"),
    }
    if part.figures is not None and part.figures.exists():
        outcome["tokens_per_second"] = json.loads(part.figures.read_text())
    return outcome


def main(minutes: float = 12.0) -> None:
    """Runs the parts, prints their outcomes and writes them.

    Args:
        minutes: time for all of them.
    """
    end = time.monotonic() + 60 * minutes
    # In another process, because a process that uses JAX takes most of a GPU's memory.
    name = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    results: dict[str, Any] = {"device": name, "jax": jax.__version__, "parts": {}}
    path = ROOT / "benchmarks" / "results"
    path.mkdir(exist_ok=True)
    path /= f"gpu_{re.sub('[^a-z0-9]+', '_', name.lower())}.json"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        for part in parts(Path(folder)):
            left = end - time.monotonic()
            if left < 20:
                results["parts"][part.name] = {"outcome": "not started: out of time"}
            else:
                results["parts"][part.name] = run(part, left)
            path.write_text(json.dumps(results, indent=1) + "\n")  # after every part
    for title, outcome in results["parts"].items():
        print(f"{outcome['outcome']:<24}{title}")
    print(f"Written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    run_function(main)
