"""The command line of a run: a named configuration, and a flag for every field of it."""

import difflib
import importlib
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass, make_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro

from engram_jax.config import Config
from engram_jax.errors import InputError, one_sentence

_LEAST_COLUMNS = 40  # of a terminal; in four columns, Tyro takes minutes for the help


def named_configs() -> dict[str, str]:
    """The named configurations in configs/, with one line of description each.

    Raises:
        InputError: configs/ is not on Python's path; it is only in the repository's root.
    """
    return {name: line for name, (line, _) in _registry().items()}


def load_named_config(name: str) -> Config:
    """The configuration of this name in configs/.

    Raises:
        InputError: there is none; the message lists the known names.
    """
    known = _registry()
    if name not in known:
        raise InputError(f"There is no configuration {name!r}; choose from {', '.join(known)}.")
    return known[name][1]


def _registry() -> dict[str, tuple[str, Config]]:
    """Line and configuration by name: a file of configs/ holds `config`, or a `family` of them."""
    try:
        import configs
    except ModuleNotFoundError as error:
        raise InputError(
            "The folder configs/ with the named configurations is not here; run this command in "
            "the repository's root."
        ) from error

    found: dict[str, tuple[str, Config]] = {}
    for path in sorted(Path(configs.__path__[0]).glob("[!_]*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        line = (module.__doc__ or "").strip().partition("\n")[0]
        found |= getattr(module, "family", None) or {path.stem: (line, module.config)}
    return found


def parse[Options](
    options: type[Options],
    description: str,
    args: Sequence[str] | None = None,
    *,
    program: str | None = None,
) -> tuple[Options, Config]:
    """Parses `[CONFIG] [--flag value …]`. Flags are the options and the fields of the config.

    Args:
        options: a dataclass; each field becomes a flag of the same name.
        description: first part of the `--help` text.
        args: the words after the program's name; None: those of the process.
        program: the command that starts the program; default: the name of its file.

    Raises:
        InputError: an unknown configuration or flag, and then the message lists the configurations
            or the flags of the same group; or an invalid value.
        SystemExit: `--help`.
    """
    words = list(sys.argv[1:] if args is None else args)
    name = words.pop(0) if words and not words[0].startswith("-") else "default"
    config = load_named_config(name)
    command = make_dataclass(
        "command",
        [
            ("options", Annotated[options, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]),
            ("config", Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]),
        ],
    )
    runs = "\n".join(
        textwrap.fill(line, 78, initial_indent=f"  {name:<20}", subsequent_indent=" " * 22)
        for name, line in named_configs().items()
    )
    parsed, unknown = parse_flags(
        command,
        default=command(options(), config),
        args=words,
        prog=f"{program or Path(sys.argv[0]).name} [CONFIG]",
        description=f"{description}\n\nConfigurations:\n{runs}\n\n"
        f"The defaults below are those of {name}.",
        return_unknown_args=True,
        config=(tyro.conf.AvoidSubcommands,),  # the named configuration decides a model's parts
    )
    if unknown:
        _check_part(unknown[0], name, config)
        flags = [*_flags(parsed.options), *_flags(parsed.config)]
        near = difflib.get_close_matches(unknown[0], flags, n=3)
        raise InputError(
            f"Unknown argument {unknown[0]!r}"
            f"{'; did you mean ' + ' or '.join(near) + '?' if near else '.'} The name of a "
            "configuration must come first. Flags here are "
            f"{', '.join(_flags_near(unknown[0], flags))} (see --help)."
        )
    return parsed.options, parsed.config


def parse_flags(options: Any, *, description: str, **settings: Any) -> Any:
    """`tyro.cli`, with one sentence instead of a box if a value is invalid.

    The description is printed after the flags, because Tyro would join its lines.

    Raises:
        InputError: an invalid value.
        SystemExit: `--help`.
    """
    words = sys.argv[1:] if settings.get("args") is None else settings["args"]
    if {"-h", "--help"} & set(words):
        if shutil.get_terminal_size().columns < _LEAST_COLUMNS:
            os.environ["COLUMNS"] = str(_LEAST_COLUMNS)
        try:
            return tyro.cli(options, description="", **settings)
        finally:
            print(f"\n{description}")
    # On a terminal, or with another encoding than UTF-8, Tyro draws its boxes in other ways.
    drawn, errors = _Utf8(), _Utf8()
    try:
        with redirect_stdout(drawn), redirect_stderr(errors):
            return tyro.cli(options, description="", **settings)
    except SystemExit:
        pass
    text = re.split(r"─{3,} ", errors.getvalue().partition("╮")[2])[0]
    sentence = " ".join(re.sub(r"[│╰─╯]", " ", text).split())
    # Tyro names a section by its place in the code.
    sentence = re.sub(r"^Error parsing (config\.)?", "", sentence)
    raise InputError(f"{sentence.rstrip('.') or errors.getvalue()}. See --help.")


def run_function(
    function: Callable[..., object], args: Sequence[str] | None = None, prog: str | None = None
) -> None:
    """Calls a function with the arguments of the command line, which are flags of the same names.

    On an invalid value or another error that the user can correct, it ends the program with one
    sentence and status 2.
    """

    @wraps(function)
    def bind(*values: Any, **named: Any) -> Callable[[], object]:
        return partial(function, *values, **named)

    description = (function.__doc__ or "").partition("Args:")[0].strip()
    with one_sentence():
        parse_flags(bind, description=description, args=args, prog=prog)()


class _Utf8(io.StringIO):
    encoding = "utf-8"


def _check_part(flag: str, name: str, config: Config) -> None:
    """Checks that an unknown flag is not of a part that the configuration does not have.

    Raises:
        InputError: it is of such a part.
    """
    part: Any = config
    path = flag.removeprefix("--").replace("-", "_").split(".")
    for count, field in enumerate(path[:-1], 1):
        part = getattr(part, field, part)
        if part is None:
            raise InputError(
                f"The configuration {name} has no {'.'.join(path[:count])}, so {flag} has no "
                "effect; give the name of a configuration that has it first."
            )


def _flags_near(unknown: str, flags: Sequence[str]) -> list[str]:
    """The flags in the group of an unknown flag; without such a group, all ungrouped flags and the
    names of the groups.
    """
    group = unknown.rpartition(".")[0]
    if group and (members := [flag for flag in flags if flag.startswith(f"{group}.")]):
        return members
    groups = dict.fromkeys(f"{flag.partition('.')[0]}.…" for flag in flags if "." in flag)
    return [*(flag for flag in flags if "." not in flag), *groups]


def _flags(options: Any, prefix: str = "--") -> Iterator[str]:
    """The flags of a dataclass and of nested ones; a field that is None has no nested flags."""
    for field in fields(options):
        name, value = prefix + field.name.replace("_", "-"), getattr(options, field.name)
        if is_dataclass(value):
            yield from _flags(value, f"{name}.")
        elif value is not None or not any(map(is_dataclass, get_args(field.type))):
            yield name
