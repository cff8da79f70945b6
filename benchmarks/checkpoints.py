"""Counts the bytes of checkpoints, and the time that they cost, for a pod; writes nothing.

    python -m benchmarks.checkpoints [CONFIG …] [--copy 20 --write 1 --read 2]

Nothing is measured. The state of each configuration is counted on its mesh. With b bytes a host and
one checkpoint every 1,000 steps, the devices wait for

- b/copy if it is saved in the background;
- b/copy + b/write + b/read if not;
- b/copy + b/write + (bytes of all hosts)/read if the leader alone reads the files back.

The last one was so until commit b9afd66.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from engram_jax.command_line import load_named_config, parse_flags
from engram_jax.errors import one_sentence
from engram_jax.program import Program
from engram_jax.sharding import make_abstract_mesh
from engram_jax.train_state import array_bytes

NAMES = ("dense_4b", "moe_27b", "engram_27b", "engram_40b", "engram_v41_memory")
COLUMNS = (
    *("configuration", "bytes (GB)", "a chip (GB)", "a host (GB)"),
    *("copied in (s)", "written in (s)", "read back in (s)"),
    *("lost: in the background (s)", "all processes read (s)", "the leader reads (s)"),
)


@dataclass(frozen=True)
class Options:
    """What to count.

    Attributes:
        names: named configurations.
        chips: chips of a host; a v5p host has 4.
        copy: assumed GB/s from the devices to the memory of a host.
        write: assumed GB/s of a host to the file system, all hosts writing.
        read: assumed GB/s of a host from the file system, all hosts reading.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = NAMES
    chips: int = 4
    copy: float = 20.0
    write: float = 1.0
    read: float = 2.0


def count(name: str, options: Options) -> list[str]:
    """The cells of a configuration's row."""
    config = load_named_config(name)
    mesh = make_abstract_mesh(config.mesh)
    total = array_bytes(Program.of_sizes(config, mesh).abstract_state()) / 1e9
    host = total * options.chips / mesh.size
    copy, write, read = (host / speed for speed in (options.copy, options.write, options.read))
    lost = copy, copy + write + read, copy + write + total / options.read
    numbers = (total, total / mesh.size, host, copy, write, read, *lost)
    return [name, *(f"{number:,.{1 if number >= 10 else 2}f}" for number in numbers)]


def main() -> None:
    """Parses the command line and prints a table."""
    options = parse_flags(Options, description=__doc__ or "")
    for cells in (COLUMNS, ["---"] * len(COLUMNS)):
        print("|", " | ".join(cells), "|")
    for name in options.names:
        print("|", " | ".join(count(name, options)), "|", flush=True)


if __name__ == "__main__":
    with one_sentence():
        main()
