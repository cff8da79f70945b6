"""Continues prompts with a trained run: `python -m engram_jax.generate RUN ["PROMPT" …]`.

Without prompts, on a terminal, it asks for them; otherwise each line of the input is a prompt.
Ctrl-C ends a continuation. Texts go to the standard output, everything else to the error output.
Many prompts are continued in batches of similar length, the longest first, and printed after each
batch.
"""

import json
import os
import sys
import tempfile

from engram_jax.beginning import begin

if __name__ == "__main__":
    begin()

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np
import tyro
from jaxtyping import Int32

from engram_jax.command_line import parse_flags
from engram_jax.decoding.batches import make_batches
from engram_jax.decoding.generate import Generator, Speed
from engram_jax.decoding.hot_rows import hot_rows
from engram_jax.decoding.settings import GenerationSettings
from engram_jax.decoding.text import Continuation, Reason
from engram_jax.errors import InputError, one_sentence
from engram_jax.files import expand_home, has_name_twice, parse_json
from engram_jax.memory.store import Placement
from engram_jax.placement import open_stores
from engram_jax.run import Run

_ENDS: dict[Reason, str] = {
    "end": "The text ended.",
    "stop": "It ended before a stop string.",
    "length": "It has all --tokens.",
}
MOST_BYTES = 1 << 28  # of the standard input, or of a file of prompts


@dataclass(frozen=True)
class GenerateOptions:
    """Options of a generation.

    Attributes:
        run: the run folder that train.py wrote.
        prompts: texts to continue.
        prompts_file: JSON Lines with a field "prompt"; at most 256 MiB.
        step: step of the checkpoint; by default, the newest.
        tokens: maximum number of tokens to add to a prompt.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: draw from this many most likely tokens; by default, from all.
        top_p: draw from the fewest tokens that have this probability together.
        min_p: draw from tokens with at least this probability, relative to the most likely one.
        stop: strings that end a continuation; write them after RUN and the prompts.
        seed: seed of the first prompt; prompt n has seed + n.
        capacity: maximum number of tokens of prompt and continuation; by default, as many as
            needed.
        tables: where the tables are: on the "device", in "host" memory, or read in a "file". The
            texts are the same.
        hot_rows: with tables outside the device: also keep this many rows of each table on the
            device, those that are most frequent in the training text, which is read for this. It
            can be faster on GPUs, where the host otherwise reads rows for every token.
        verify_rows: with tables outside the device: compare all rows that programs read with the
            tables' own. Slower.
        compare_without_memory: also continue with the same seeds without the memory.
        json: print one JSON object per prompt, with its number, from 1.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    prompts: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[PROMPT …]")
    ] = ()
    prompts_file: Path | None = None
    step: int | None = None
    tokens: int = 100
    temperature: float = GenerationSettings.temperature
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    capacity: int | None = None
    tables: Placement = "device"
    hot_rows: int | None = None
    verify_rows: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    compare_without_memory: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    @property
    def settings(self) -> GenerationSettings:
        """How prompts are continued."""
        names = GenerationSettings.__dataclass_fields__
        return GenerationSettings(**{name: getattr(self, name) for name in names})


def main(args: Sequence[str] | None = None) -> None:
    """Parses the command line, continues the prompts, prints.

    Raises:
        InputError: invalid options, prompts or run.
    """
    program = "python -m engram_jax.generate"
    options = parse_flags(GenerateOptions, args=args, prog=program, description=__doc__ or "")
    settings = options.settings
    prompts = _given_prompts(options)
    if not expand_home(options.run).is_dir():
        raise InputError(f"There is no run folder {options.run}; train.py creates runs/NAME.")
    run = Run.open(expand_home(options.run))
    if options.compare_without_memory and not run.config.memory.layers:
        raise InputError(
            f"The model in {options.run} has no memory; leave out --compare-without-memory."
        )
    _check_tables(options)
    # Errors in prompts and settings are found before the checkpoint is read.
    make_batches(run.config, run.tokenizer, prompts or [], settings, run.program.mesh.size)
    hot = _count_hot_rows(run, options.hot_rows)
    with open_stores(run.program, _scratch(run.folder), options.tables) as stores:
        weights = run.restore_weights(options.step, stores)
        parts = run.program, run.tokenizer, weights, stores
        generators = {"": Generator(*parts, verify_rows=options.verify_rows, hot_rows=hot)}
        if options.compare_without_memory:
            generators["without memory"] = Generator(*parts, memory=False)
        _answer(generators, prompts, options)
        if options.verify_rows:
            rows = sum(store.compared for store in stores.values())
            print(f"{rows:,} rows that programs read equal the tables' own.", file=sys.stderr)


def _check_tables(options: GenerateOptions) -> None:
    """Checks the options for tables outside the device."""
    if options.hot_rows is not None and options.hot_rows < 1:
        raise InputError(f"--hot-rows is {options.hot_rows}; give a positive number.")
    for name, given in (("hot-rows", options.hot_rows), ("verify-rows", options.verify_rows)):
        if given and options.tables == "device":
            raise InputError(f"--{name} needs --tables host or --tables file.")


def _count_hot_rows(run: Run, count: int | None) -> dict[int, Int32[np.ndarray, "C"]] | None:
    """The places of the rows that are copied to the device, by layer id; None: no copies."""
    if count is None:
        return None
    if run.program.ngram_hash is None:
        raise InputError(f"The model in {run.folder} has no memory; leave out --hot-rows.")
    try:
        views = [corpus.train for corpus in run.corpora()]
        found = hot_rows(views, run.program.ngram_hash, count)
    except InputError as error:
        raise InputError(
            f"--hot-rows counts rows in the training text. {error} Or leave out --hot-rows."
        ) from error
    for layer, places in found.items():
        print(f"{len(places):,} rows of layer {layer} are copied to the device.", file=sys.stderr)
    return found


def _scratch(folder: Path) -> Path:
    """Where a file can be created: in the run folder, if it is not an archive."""
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())


def _answer(
    generators: dict[str, Generator], prompts: list[str] | None, options: GenerateOptions
) -> None:
    """Continues the given prompts, or those that a person types."""
    settings = options.settings
    if prompts is not None:
        _continue(generators, prompts, settings, as_json=options.json)
        return
    for prompt in _asked_prompts():
        try:
            _continue(generators, [prompt], settings, as_json=options.json)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)


def _given_prompts(options: GenerateOptions) -> list[str] | None:
    """The prompts of the command line, the file or the piped input; None: to be asked for."""
    if options.prompts_file is None:
        if options.prompts:
            return list(options.prompts)
        name = "The standard input"
        if sys.stdin is None:  # it is closed
            raise InputError(f"{name} is closed; give a prompt.")
        if sys.stdin.isatty():
            return None
        prompts = [line for _, line in _read_lines(name, sys.stdin.buffer)]
    elif options.prompts:
        raise InputError("Give prompts or --prompts-file, not both.")
    else:
        name = f"--prompts-file {options.prompts_file}"
        prompts = list(_read_prompts(options.prompts_file))
    if not prompts:
        hint = " (--stop takes all words after it, so write it last)" * bool(options.stop)
        raise InputError(f"{name} has no prompts; give at least one{hint}.")
    return prompts


def _read_prompts(path: Path) -> Iterator[str]:
    try:
        with expand_home(path).open("rb") as file:
            lines = _read_lines(f"--prompts-file {path}", file)
    except OSError as error:
        raise InputError(f"Cannot read --prompts-file {path}: {error.strerror}.") from error
    for number, line in lines:
        try:
            prompt = parse_json(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or has_name_twice(line, "prompt"):
            raise InputError(
                f'Line {number} of --prompts-file {path} is not like {{"prompt": "a text"}}.'
            )
        yield prompt


def _read_lines(name: str, file: BinaryIO | BufferedIOBase) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1.

    (`str.splitlines` would also split at characters that a text may have, such as U+2028.)
    """
    content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:  # or it never ends
        raise InputError(
            f"{name} has more than {MOST_BYTES >> 20} MiB; give fewer prompts at a time."
        )
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8; convert it.") from error
    return [(n, line.removesuffix("\r")) for n, line in enumerate(lines, 1) if line.strip()]


def _asked_prompts() -> Iterator[str]:
    """Prompts that a person types."""
    print("Type the start of a text. Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            if prompt := input("> "):
                yield prompt
        except UnicodeDecodeError:
            print("error: The prompt is not in the terminal's encoding.", file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\nCtrl-D ends.", file=sys.stderr)


def _continue(
    generators: dict[str, Generator],
    prompts: list[str],
    settings: GenerationSettings,
    *,
    as_json: bool,
) -> None:
    """Continues the prompts with every generator, and prints the results of each batch."""
    if len(prompts) == 1 and not as_json:
        for label, generator in generators.items():
            shown = _Stream(f"{_in_brackets(label)}{prompts[0]}|")
            [continuation] = generator.generate(prompts, settings, show=shown)
            print()
            end = _ENDS[continuation.reason]
            if continuation.reason == "length" and len(continuation.tokens) < settings.tokens:
                end = "It reached --capacity."
            _print_speed(generator.speed, f" {end}")
        return
    together = (generator.generate_batches(prompts, settings) for generator in generators.values())
    for found in zip(*together, strict=True):  # all generators make the same batches
        by_label = dict(zip(generators, found, strict=True))
        if as_json:
            _print_json(prompts, by_label)
        else:
            for label, batch in by_label.items():
                for number, continuation in batch.items():
                    print(f"{_in_brackets(label)}{prompts[number]}|{continuation.text}")
        sys.stdout.flush()
    for generator in generators.values():
        _print_speed(generator.speed)


def _in_brackets(label: str) -> str:
    return f"[{label}] " if label else ""


def _print_json(prompts: list[str], by_label: dict[str, dict[int, Continuation]]) -> None:
    """Prints a line per prompt of a batch, with the continuations of all generators."""
    for number in by_label[""]:
        result: dict[str, object] = {"number": number + 1, "prompt": prompts[number]}
        for label, batch in by_label.items():
            fields = asdict(batch[number])
            result |= {label.replace(" ", "_"): fields} if label else fields
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))


@dataclass
class _Stream:
    """Prints a continuation while it grows, after a beginning that waits for its first part."""

    waiting: str

    def __call__(self, _: int, text: str) -> None:
        print(self.waiting + text, end="", flush=True)
        self.waiting = ""


def _print_speed(speed: Speed, end: str = "") -> None:
    print(
        f"Prompt: {speed.prompt_tokens:,} tokens, {speed.prompt_rate:,.0f} tokens/s. "
        f"Continuation: {speed.tokens:,} tokens, {speed.rate:,.0f} tokens/s.{end}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    with one_sentence():
        main()
