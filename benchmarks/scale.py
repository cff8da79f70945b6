"""Compiles the paper's models for a TPU pod, and writes the table of docs/scale.md; needs no TPU.

    python -m benchmarks.scale [CONFIG …] [--topology v5p:4x8x8]

Compiles the training step of every configuration, and parts of it separately, for the topology. The
table has bytes per chip: state, temporaries, sent. A configuration takes from a few minutes to more
than half an hour on two CPU cores, and up to 20 GB of memory: run nothing else at the same time.
Rows of configurations that are not named are kept.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from engram_jax.command_line import load_named_config, parse_flags
from engram_jax.costs.accounting import account
from engram_jax.costs.ahead_of_time import compile_costs, topology_mesh
from engram_jax.errors import one_sentence
from engram_jax.program import Program

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
RESULTS = Path(__file__).parent / "results" / "scale.json"
NAMES = ("dense_4b", "moe_27b", "engram_27b", "engram_40b", "engram_v41_memory")
COLUMNS = (
    *("configuration", "mesh (data × fsdp × expert)", "parameters, of them in tables"),
    *("GFLOP per token, forward and backward", "state", "temporaries of a step"),
    *("of the optimizer", "of a lookup", "of the first state", "sent per step", "compiled in"),
    "commit",
)


@dataclass(frozen=True)
class Options:
    """What to compile.

    Attributes:
        names: named configurations.
        topology: TPU generation and shape; the configurations' meshes have 256 chips.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = NAMES
    topology: str = "v5p:4x8x8"


def measure(name: str, topology: str) -> dict[str, Any]:
    """Counts and compiles a configuration. Sizes are in bytes per chip."""
    code, config = read_version(), load_named_config(name)
    counted = account(config)
    program = Program.of_sizes(config, topology_mesh(topology, config.mesh))
    costs = dict(compile_costs(program))
    step = costs["training step"]
    vocabulary = 0 if config.model.tie_embeddings else counted.vocabulary  # of the head
    return {
        "code": code,
        "topology": topology,
        "mesh": list(program.mesh.shape.values()),
        "parameters": counted.total + vocabulary + counted.hyper_connections,
        "memory": counted.memory,
        "training_flops": counted.training_flops,
        "state": step.arguments,
        "temporaries": step.temporaries,
        "optimizer": costs["optimizer"].temporaries,
        "lookup": costs["lookup"].temporaries if "lookup" in costs else 0,
        "first_state": costs["first state"].temporaries,
        "sent": step.sent,
        "seconds": step.seconds,
    }


def read_version() -> str:
    """The commit of the code, with a + if the working tree differs from it."""
    code = ("engram_jax", "pallas_kernels", "configs")

    def git(*words: str) -> str:
        command = ("git", *words, "--", *code)
        done = subprocess.run(command, cwd=PAGE.parent.parent, capture_output=True, text=True)
        return done.stdout.strip()

    return git("log", "-1", "--format=%h") + ("+" if git("status", "--porcelain") else "")


def as_row(name: str, found: dict[str, Any]) -> str:
    """A line of the table, in GB."""
    parts = ("state", "temporaries", "optimizer", "lookup", "first_state", "sent")
    sizes = [f"{found[part] / 1e9:.2f}" if part in found else "–" for part in parts]
    cells = [
        name,
        " × ".join(map(str, found["mesh"])),
        f"{found['parameters'] / 1e9:.2f} B, {found['memory'] / 1e9:.2f} B",
        f"{found['training_flops'] / 1e9:.1f}",
        *sizes,
        f"{found['seconds']:.0f} s",
        found["code"],
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measures the named configurations, and writes results and page after each.

    Each configuration has its own process, because memory is not freed: in a single process, the
    third configuration exceeded 21 GB.
    """
    jax.config.update("jax_platforms", "cpu")
    options = parse_flags(Options, description=__doc__ or "")
    if len(options.names) != 1:
        for name in options.names:
            command = ["-m", "benchmarks.scale", name, "--topology", options.topology]
            subprocess.run([sys.executable, *command], check=True)
        return
    name = options.names[0]
    found = measure(name, options.topology)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = found
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_table([as_row(known, results[known]) for known in NAMES if known in results])
    print(as_row(name, results[name]))


def write_table(rows: list[str]) -> None:
    """Replaces the table in docs/scale.md."""
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    before, _, rest = PAGE.read_text().partition("| configuration ")
    after = rest[rest.index("\n\n") :]
    PAGE.write_text(before + "\n".join([*head, *rows]) + after)


if __name__ == "__main__":
    with one_sentence():
        main()
