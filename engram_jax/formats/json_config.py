"""Reads the `config.json` of a checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram_jax.errors import InputError


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file.

    Raises:
        InputError: the file is missing, or contains something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(
            f"Cannot read {path} ({error.strerror}); give the folder of a checkpoint."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object; download it again.")
    return content


def positive(config: Mapping[str, Any], name: str) -> int:
    """A field that must be an integer above 0.

    Raises:
        KeyError: it is missing.
        TypeError: it is something else.
    """
    value = config[name]
    if type(value) is not int or value < 1:
        raise TypeError(f"{name} is {value!r}")
    return value
