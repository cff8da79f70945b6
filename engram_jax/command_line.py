"""The command line of a run: a named configuration, and every field of it as a flag."""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from engram_jax.config import Config
from engram_jax.errors import InputError


def named_configs() -> dict[str, str]:
    """The named runs in configs/ and the first line of what each says of itself."""
    import configs

    folder = Path(configs.__path__[0])
    names = sorted(path.stem for path in folder.glob("[!_]*.py"))
    return {name: _module(name).__doc__.strip().splitlines()[0] for name in names}


def load_named_config(name: str) -> Config:
    """The configuration that configs/NAME.py defines.

    Raises:
        InputError: there is no such file; the sentence lists those there are.
    """
    known = named_configs()
    if name not in known:
        raise InputError(f"There is no configuration {name!r}; there are {', '.join(known)}.")
    return _module(name).config


def parse[Options](
    options: type[Options], description: str, args: Sequence[str] | None = None
) -> tuple[Options, Config]:
    """Reads `[CONFIG] [--flag value …]`: options of the program, then fields of the config.

    Args:
        options: a dataclass whose fields become flags of their own name.
        description: what `--help` says first.
        args: the words after the program's name; None takes the process's.

    Raises:
        InputError: an unknown configuration, or values that cannot work.
        SystemExit: an unknown flag, after a message that names the near ones; or `--help`.
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
    runs = "\n".join(f"  {name:<16}{line}" for name, line in named_configs().items())
    parsed: Any = tyro.cli(
        command,
        default=command(options(), config),
        args=words,
        prog=f"{Path(sys.argv[0]).name} [CONFIG]",
        description=f"{description}\n\nConfigurations:\n{runs}\n\nShown below: {name}.",
    )
    return parsed.options, parsed.config


def _module(name: str) -> Any:
    return importlib.import_module(f"configs.{name}")
