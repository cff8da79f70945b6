"""Exports a run as safetensors files: `python -m engram_jax.export RUN FOLDER`.

FOLDER gets the weights, the configuration, the hash, the tokenizer and a model card; see
docs/use_elsewhere.md. `python -m engram_jax.import_run FOLDER RUN` is the way back.
"""

from engram_jax.beginning import begin

if __name__ == "__main__":
    begin()

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from engram_jax.command_line import parse_flags
from engram_jax.errors import InputError, one_sentence
from engram_jax.files import expand_home
from engram_jax.formats.export import export_run
from engram_jax.formats.quality import loss_change
from engram_jax.formats.quantize import TableType
from engram_jax.run import Run


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        run: the run folder that train.py wrote.
        folder: the folder to create.
        tables: storage type of the tables. float8 and int8 have a scale for each 32 numbers.
        step: step of the checkpoint; by default, the newest.
        tolerance: refuse to export if this type raises the held-out loss by more than this many
            nats; this reads the run's text. By default, nothing is scored.
        max_tokens: number of held-out tokens to score per source; by default, all.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    tables: TableType = "float32"
    step: int | None = None
    tolerance: float | None = None
    max_tokens: int | None = None


def main(args: Sequence[str] | None = None) -> None:
    """Parses the command line, checks the loss, exports.

    Raises:
        InputError: invalid options or run, or the loss rises too much.
    """
    program = "python -m engram_jax.export"
    options = parse_flags(ExportOptions, args=args, prog=program, description=__doc__ or "")
    folder, run_folder = expand_home(options.folder), expand_home(options.run)
    if not run_folder.is_dir():
        raise InputError(f"There is no run folder {options.run}; train.py creates runs/NAME.")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise InputError(f"--max-tokens is {options.max_tokens}; score at least 1 token.")
    if options.max_tokens is not None and options.tolerance is None:
        raise InputError("--max-tokens needs --tolerance: without it, no text is scored.")
    if options.tolerance is not None and not math.isfinite(options.tolerance):
        raise InputError(f"--tolerance is {options.tolerance}; give a finite number of nats.")
    if folder.is_dir() and any(folder.iterdir()):  # before an evaluation
        raise InputError(f"{folder} is not empty; name another folder.")
    run = Run.open(run_folder)
    weights = run.restore_weights(options.step)
    if options.tolerance is not None:
        before, change = loss_change(
            run, weights, options.tables, run.corpora(), options.max_tokens
        )
        error = f" ± {change.standard_error:.5f}" if change.standard_error is not None else ""
        print(
            f"Held-out loss {before.loss:.4f}; with tables in {options.tables} it changes by "
            f"{change.loss:+.5f}{error} nats ({before.tokens:,} tokens)."
        )
        if not change.loss <= options.tolerance:
            raise InputError(
                f"Tables in {options.tables} raise the held-out loss by {change.loss:.5f} nats, "
                f"more than --tolerance {options.tolerance:g}; choose another type for --tables."
            )
    export_run(run, weights, folder, options.tables)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    print(
        f"Written to {options.folder}: "
        + ", ".join(f"{name} ({size:,} bytes)" for name, size in sizes.items())
    )


if __name__ == "__main__":
    with one_sentence():
        main()
