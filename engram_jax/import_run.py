"""Creates a run folder from an export: `python -m engram_jax.import_run FOLDER RUN`.

The run can be evaluated, continued as text, and exported again; another run can start with its
weights (`train.py --start-from RUN`).
"""

from engram_jax.beginning import begin

if __name__ == "__main__":
    begin(caches=False)

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from engram_jax.command_line import parse_flags
from engram_jax.errors import one_sentence
from engram_jax.files import expand_home
from engram_jax.formats.export import import_run


@dataclass(frozen=True)
class ImportOptions:
    """Options of an import.

    Attributes:
        folder: the folder that `python -m engram_jax.export` wrote.
        run: the run folder to create.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]


def main(args: Sequence[str] | None = None) -> None:
    """Parses the command line, imports.

    Raises:
        InputError: the export is damaged, or the run folder is not empty.
    """
    program = "python -m engram_jax.import_run"
    options = parse_flags(ImportOptions, args=args, prog=program, description=__doc__ or "")
    import_run(expand_home(options.folder), expand_home(options.run))
    print(f"Created the run {options.run}.")


if __name__ == "__main__":
    with one_sentence():
        main()
