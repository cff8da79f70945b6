"""Continues prompts with a trained run: `python -m engram_jax.generate RUN ["PROMPT" …]`.

Without prompts, on a terminal, it asks for them; otherwise each line of the input is a prompt.
Ctrl-C ends a continuation. Texts go to the standard output, everything else to the error output.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", ".cache/xla")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import tyro

from engram_jax.command_line import parse_flags
from engram_jax.decoding.generate import Generator, Settings, Speed
from engram_jax.errors import InputError, one_sentence
from engram_jax.files import parse_json
from engram_jax.run import Run


@dataclass(frozen=True)
class GenerateOptions:
    """Options of a generation.

    Attributes:
        run: the run folder that train.py wrote.
        prompts: texts to continue.
        prompts_file: JSON Lines with a field "prompt".
        step: step of the checkpoint; by default, the newest.
        tokens: maximum number of tokens to add to a prompt.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: draw from this many most likely tokens; by default, from all.
        top_p: draw from the fewest tokens that have this probability together.
        min_p: draw from tokens with at least this probability, relative to the most likely one.
        stop: strings that end a continuation.
        seed: seed of the first prompt; prompt n has seed + n.
        capacity: maximum number of tokens of prompt and continuation; by default, as many as
            needed.
        compare_without_memory: also continue with the same seeds without the memory.
        json: print one JSON object per prompt.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    prompts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PROMPT")] = ()
    prompts_file: Path | None = None
    step: int | None = None
    tokens: int = 100
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    capacity: int | None = None
    compare_without_memory: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    @property
    def settings(self) -> Settings:
        """How prompts are continued."""
        names = Settings.__dataclass_fields__
        return Settings(**{name: getattr(self, name) for name in names})


def main(args: Sequence[str] | None = None) -> None:
    """Parses the command line, continues the prompts, prints.

    Raises:
        InputError: invalid options, prompts or run.
    """
    program = "python -m engram_jax.generate"
    options = parse_flags(GenerateOptions, args=args, prog=program, description=__doc__ or "")
    settings = options.settings
    prompts = _given_prompts(options)
    if not options.run.expanduser().is_dir():
        raise InputError(f"There is no run folder {options.run}; train.py creates runs/NAME.")
    run = Run.open(options.run.expanduser())
    weights = run.restore_weights(options.step)
    generators = {"": Generator(run.program, run.tokenizer, weights)}
    if options.compare_without_memory:
        if not run.config.memory.layers:
            raise InputError(
                f"The model in {options.run} has no memory; leave out --compare-without-memory."
            )
        generators["without memory"] = Generator(run.program, run.tokenizer, weights, memory=False)
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
        if sys.stdin.isatty():
            return None
        prompts = [line.rstrip("\n") for line in sys.stdin]
        name = "The standard input"
    elif options.prompts:
        raise InputError("Give prompts or --prompts-file, not both.")
    else:
        name = f"--prompts-file {options.prompts_file}"
        prompts = list(_read_prompts(options.prompts_file))
    if not prompts:
        raise InputError(f"{name} has no prompts; give at least one.")
    return prompts


def _read_prompts(path: Path) -> Iterator[str]:
    try:
        lines = path.expanduser().read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"--prompts-file {path} is not UTF-8; convert it.") from error
    except OSError as error:
        raise InputError(f"Cannot read --prompts-file {path}: {error.strerror}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = parse_json(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise InputError(
                f'Line {number} of --prompts-file {path} is not like {{"prompt": "a text"}}.'
            )
        yield prompt


def _asked_prompts() -> Iterator[str]:
    """Prompts that a person types."""
    print("Type the start of a text. Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\nCtrl-D ends.", file=sys.stderr)


def _continue(
    generators: dict[str, Generator], prompts: list[str], settings: Settings, *, as_json: bool
) -> None:
    """Continues the prompts with every generator, and prints."""
    streams = len(prompts) == 1 and not as_json
    results: list[dict[str, object]] = [{"prompt": prompt} for prompt in prompts]
    for label, generator in generators.items():
        shown = _Stream(f"{f'[{label}] ' if label else ''}{prompts[0]}|") if streams else None
        found = generator.generate(prompts, settings, show=shown or (lambda number, text: None))
        for result, continuation in zip(results, found, strict=True):
            fields = asdict(continuation)
            result |= {label.replace(" ", "_"): fields} if label else fields
            if shown:
                print()
            elif not as_json:
                print(f"{f'[{label}] ' if label else ''}{result['prompt']}|{continuation.text}")
        _print_speed(generator.speed)
    if as_json:
        for result in results:
            print(json.dumps(result, ensure_ascii=False))


@dataclass
class _Stream:
    """Prints a continuation while it grows, after a beginning that waits for its first part."""

    waiting: str

    def __call__(self, _: int, text: str) -> None:
        print(self.waiting + text, end="", flush=True)
        self.waiting = ""


def _print_speed(speed: Speed) -> None:
    print(
        f"Prompt: {speed.prompt_tokens:,} tokens, {speed.prompt_rate:,.0f} tokens/s. "
        f"Continuation: {speed.tokens:,} tokens, {speed.rate:,.0f} tokens/s.",
        file=sys.stderr,
    )


if __name__ == "__main__":
    with one_sentence():
        main()
