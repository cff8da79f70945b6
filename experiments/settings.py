"""What distinguishes a configuration from the defaults."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from engram_jax.config import Config
from engram_jax.identity import CHANGEABLE


def settings(config: Config) -> dict[str, Any]:
    """The fields that differ from their defaults, by dotted name.

    Fields that change results by rounding only are left out. A field that is added later, with the
    earlier behavior as its default, does not change these settings.
    """
    if not config.memory.layers:
        config = config.without_memory()
    return {
        name: value
        for name, value in _differing(config, Config())
        if name != "name" and not name.startswith(CHANGEABLE)
    }


def _differing(part: Any, reference: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a part that differ from those of another object of its class, by name."""
    for item in fields(part):
        name = prefix + item.name
        value, default = getattr(part, item.name), getattr(reference, item.name)
        if value == default:
            continue
        if not is_dataclass(value):
            yield name, list(value) if isinstance(value, tuple) else value
            continue
        kind: Any = type(value)
        if kind is not type(default):
            yield name, kind.__name__
            default = kind()
        yield from _differing(value, default, f"{name}.")
