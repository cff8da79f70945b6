"""Reads the `config.json` of a checkpoint."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram_jax.errors import InputError
from engram_jax.files import parse_json, read_regular


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file.

    Raises:
        InputError: the file is missing, or contains something else.
    """
    try:
        content = parse_json(read_regular(path, MOST_BYTES))
    except OSError as error:
        raise InputError(
            f"Cannot read {path} ({error.strerror}); give the folder of an export, or of a "
            "released checkpoint."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); export or download it again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object; export or download it again.")
    return content


MOST_BYTES = 1 << 28  # of a JSON file
MOST = 2**31 - 1
MOST_ORDERS = 64  # the largest n-gram order, so that a wrong number does not fill the memory


def natural(config: Mapping[str, Any], name: str, *, least: int = 0, most: int = MOST) -> int:
    """A field that must be an integer from `least` to `most`.

    Raises:
        KeyError: it is missing.
        TypeError: it is something else.
    """
    return _natural(config[name], name, least, most)


def positive(config: Mapping[str, Any], name: str) -> int:
    """A field that must be an integer from 1 to 2³¹ − 1; errors as for `natural`."""
    return natural(config, name, least=1)


def naturals(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """A field that must be a list of integers from 0 to 2³¹ − 1; errors as for `natural`."""
    if not isinstance(config[name], list):
        raise TypeError(f"{name} is {config[name]!r}")
    return tuple(_natural(value, name) for value in config[name])


def positive_number(config: Mapping[str, Any], name: str) -> float:
    """A field that must be a finite number above 0; errors as for `natural`."""
    value = config[name]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise TypeError(f"{name} is {value!r}")
    return float(value)


def _natural(value: Any, name: str, least: int = 0, most: int = MOST) -> int:
    if type(value) is not int or not least <= value <= most:
        raise TypeError(f"{name} is {value!r}")
    return value
