"""The command line of a run: a named configuration, and every field of it as a flag."""

import difflib
import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro

from engram_jax.config import Config
from engram_jax.errors import InputError


def named_configs() -> dict[str, str]:
    """The named runs in configs/, and one line about each.

    Raises:
        InputError: configs/ is not on Python's path, as outside the repository.
    """
    return {name: line for name, (line, _) in _registry().items()}


def load_named_config(name: str) -> Config:
    """The configuration of this name in configs/.

    Raises:
        InputError: there is none; the sentence lists those there are.
    """
    known = _registry()
    if name not in known:
        raise InputError(f"There is no configuration {name!r}; there are {', '.join(known)}.")
    return known[name][1]


def _registry() -> dict[str, tuple[str, Config]]:
    """Line and configuration by name: a file of configs/ holds `config`, or a `family` of them."""
    try:
        import configs
    except ModuleNotFoundError as error:
        raise InputError(
            "The named configurations lie in the folder configs/ of the repository; start this "
            "from the repository's root."
        ) from error

    found: dict[str, tuple[str, Config]] = {}
    for path in sorted(Path(configs.__path__[0]).glob("[!_]*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        line = (module.__doc__ or "").strip().splitlines()[0]
        found |= getattr(module, "family", None) or {path.stem: (line, module.config)}
    return found


def parse[Options](
    options: type[Options],
    description: str,
    args: Sequence[str] | None = None,
    *,
    program: str | None = None,
) -> tuple[Options, Config]:
    """Reads `[CONFIG] [--flag value …]`: options of the program, then fields of the config.

    Args:
        options: a dataclass whose fields become flags of their own name.
        description: what `--help` says first.
        args: the words after the program's name; None takes the process's.
        program: how the program is started; by default by the name of its file.

    Raises:
        InputError: an unknown configuration or flag; the sentence lists those there are, of flags
            those of its group.
        SystemExit: values that cannot work, after a message that names them; or `--help`.
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
    runs = "\n".join(f"  {name:<20}{line}" for name, line in named_configs().items())
    parsed, unknown = tyro.cli(
        command,
        default=command(options(), config),
        args=words,
        prog=f"{program or Path(sys.argv[0]).name} [CONFIG]",
        description=f"{description}\n\nConfigurations:\n{runs}\n\nShown below: {name}.",
        return_unknown_args=True,
        config=(tyro.conf.AvoidSubcommands,),  # which parts a model has, its named run says
    )
    if unknown:
        flags = [*_flags(parsed.options), *_flags(parsed.config)]
        near = difflib.get_close_matches(unknown[0], flags, n=3)
        raise InputError(
            f"There is no {unknown[0]!r} here"
            f"{', perhaps ' + ' or '.join(near) + ' is meant' if near else ''}. A configuration's "
            f"name comes first; the flags are {', '.join(_flags_near(unknown[0], flags))} (see "
            "--help)."
        )
    return parsed.options, parsed.config


def _flags_near(unknown: str, flags: Sequence[str]) -> list[str]:
    """The flags of the unknown one's group; if it has none, those of no group and the groups."""
    group = unknown.rpartition(".")[0]
    if group and (members := [flag for flag in flags if flag.startswith(f"{group}.")]):
        return members
    groups = dict.fromkeys(f"{flag.partition('.')[0]}.…" for flag in flags if "." in flag)
    return [*(flag for flag in flags if "." not in flag), *groups]


def _flags(options: Any, prefix: str = "--") -> Iterator[str]:
    """The flags of a dataclass and of those in it; a part that a model lacks has none."""
    for field in fields(options):
        name, value = prefix + field.name.replace("_", "-"), getattr(options, field.name)
        if is_dataclass(value):
            yield from _flags(value, f"{name}.")
        elif value is not None or not any(map(is_dataclass, get_args(field.type))):
            yield name
