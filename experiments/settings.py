"""What distinguishes a configuration from the defaults."""

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any

from engram_jax.config import Config, MemoryConfig
from engram_jax.identity import CHANGEABLE


def settings(config: Config) -> dict[str, Any]:
    """The fields that differ from their defaults, by dotted name.

    Fields that change results by rounding only are left out. A field that is added later, with the
    earlier behavior as its default, does not change these settings.
    """
    if not config.memory.layers:
        config = without_memory(config)
    return {
        name: value
        for name, value in _differing(config)
        if name != "name" and not name.startswith(CHANGEABLE)
    }


def without_memory(config: Config) -> Config:
    """The same backbone without memory."""
    return replace(config, memory=MemoryConfig(layers=()))


def _differing(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for item in fields(part):
        value, name = getattr(part, item.name), prefix + item.name
        default = item.default
        if item.default_factory is not MISSING:
            default = item.default_factory()
        if value == default:
            continue
        if not is_dataclass(value):
            yield name, list(value) if isinstance(value, tuple) else value
            continue
        if type(value) is not type(default):
            yield name, type(value).__name__
        yield from _differing(value, f"{name}.")
