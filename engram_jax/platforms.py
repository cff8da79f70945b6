"""What depends on the platform: which kernels run there, and how many processes build batches."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engram_jax.config import Config

# The platform of each implementation that does not run on all platforms.
NEEDS = {"cudnn": "gpu", "splash": "tpu", "pallas_gpu": "gpu", "pallas_tpu": "tpu"}


def without_foreign_kernels(config: Config, platform: str) -> Config:
    """The configuration with implementations of other platforms replaced by None (automatic)."""
    for part in foreign_kernels(config, platform):
        *outer, name = part.split(".")
        config = _replaced(config, outer, {name: None})
    return config


def _replaced(node: Any, path: Sequence[str], change: dict[str, Any]) -> Any:
    """A copy of a dataclass with fields of the part at `path` replaced."""
    if not path:
        return replace(node, **change)
    return replace(node, **{path[0]: _replaced(getattr(node, path[0]), path[1:], change)})


def foreign_kernels(config: Config, platform: str) -> dict[str, str]:
    """The named implementations that do not run on a platform, by field."""
    chosen = {
        "memory.gather": config.memory.gather,
        "model.engram.implementation": config.model.engram.implementation,
        "model.attention.implementation": config.model.attention.implementation,
    }
    return {
        part: name
        for part, name in chosen.items()
        if name is not None and NEEDS.get(name, platform) != platform
    }


def default_workers(platform: str) -> int:
    """The default number of processes that build batches.

    0 on a CPU, because the step itself needs all cores. On an accelerator up to 4: an H200 needs
    2 ms for a step of the default model, and one thread needs 5 ms for a batch
    (docs/experiments.md).
    """
    if platform == "cpu":
        return 0
    if hasattr(os, "sched_getaffinity"):  # a task of a cluster may use a part of the cores
        return min(4, len(os.sched_getaffinity(0)) // 2)
    return min(4, (os.cpu_count() or 1) // 2)
