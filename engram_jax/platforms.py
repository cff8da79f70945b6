"""What depends on the platform or the mesh: kernels, sizes that divide, and data workers."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax

from engram_jax.config import Config
from engram_jax.errors import InputError
from engram_jax.hashing import NgramHash
from engram_jax.memory.layout import LANES
from engram_jax.sharding import AnyMesh, platform_of, row_parts

if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":  # JAX sets this where it finds no TPU
    # Then an installed libtpu complains at every start that it does not know these.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")

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


# Options of JAX for debugging, and the values with which programs work.
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "jax_disable_jit": (False,),
    "jax_numpy_dtype_promotion": ("standard",),
    "jax_transfer_guard": (None, "allow", "log", "log_explicit"),
}


def check_devices(config: Config, ngram_hash: NgramHash | None, mesh: AnyMesh) -> None:
    """Checks that the devices of a mesh can run a configuration.

    Raises:
        InputError: the mesh does not divide the tables, its devices do not support the named
            implementations, or an unsupported option of JAX is set.
    """
    if jax.config.read("jax_enable_x64"):
        raise InputError(
            "64-bit types of JAX are enabled, so parameters would be float64; unset JAX_ENABLE_X64."
        )
    for option, works in _OPTIONS.items():
        if (value := getattr(jax.config, option)) not in works:
            raise InputError(
                f"JAX is set to {option} = {value}, which this project does not support; "
                f"unset {option.upper()}."
            )
    if ngram_hash is not None and any(rows % mesh.size for rows in ngram_hash.padded_rows):
        raise InputError(
            f"The rows of a table, a multiple of 4,096, cannot be split over {mesh.size} "
            "devices; use a number of devices that is a power of two."
        )
    words, platform = config.memory.layout.words, platform_of(mesh)
    if ngram_hash is not None and platform == "tpu" and words % LANES:
        raise InputError(
            f"memory.row_width {config.memory.row_width} gives records of {words} words, which "
            f"are not a multiple of a TPU's {LANES} lanes: a TPU would copy the tables at "
            "every step. Raise memory.row_width; in float32 the minimum is 22, and 42, 85 and "
            "127 waste the least space."
        )
    for part, chosen in foreign_kernels(config, platform).items():
        raise InputError(
            f"--{part} {chosen} needs a {NEEDS[chosen].upper()}, and this runs on {platform}; "
            "leave the flag out."
        )
    if ngram_hash is not None and config.memory.gather in NEEDS and words % LANES:
        raise InputError(
            f"--memory.gather {config.memory.gather} reads lines of {LANES} words, and "
            f"memory.row_width {config.memory.row_width} gives records of {words} words; leave "
            "the flag out, or raise memory.row_width (in float32, to at least 22)."
        )
    if (context := mesh.shape["context"]) > 1:
        _check_context(config, context)


def _check_context(config: Config, context: int) -> None:
    """Checks that sequences can be split over so many devices."""
    length = config.data.sequence_length
    if length % context:
        raise InputError(
            f"data.sequence_length {length} does not divide over mesh.context {context}; make it a "
            "multiple."
        )
    reach = config.model.engram.reach
    if config.memory.sites.layers and length // context < reach:
        raise InputError(
            f"With mesh.context {context}, a device has {length // context} positions of a "
            f"sequence, but Engram's convolution looks {reach} back; lower mesh.context."
        )
    if config.model.attention.implementation == "cudnn":
        raise InputError(
            "--model.attention.implementation cudnn needs complete sequences; set mesh.context to "
            "1, or leave it out."
        )


def check_training_batch(config: Config, mesh: AnyMesh) -> None:
    """Checks that the devices of a mesh divide a micro-batch.

    Raises:
        InputError: they do not.
    """
    remedy = "data.batch_size to a multiple of devices / mesh.context × train.accumulation"
    _check_rows("A micro-batch", config.micro_batch_size, mesh, remedy)


def check_evaluation_batch(config: Config, mesh: AnyMesh) -> None:
    """Checks that the devices of a mesh divide a batch of an evaluation.

    Raises:
        InputError: they do not.
    """
    field = "train.evaluate_batch_size (in eval.py: --batch-size)"
    remedy = f"{field} to a multiple of devices / mesh.context"
    _check_rows("An evaluation's batch", config.evaluate_batch_size, mesh, remedy)


def _check_rows(what: str, rows: int, mesh: AnyMesh, remedy: str) -> None:
    parts = row_parts(mesh)
    if rows % parts:
        raise InputError(
            f"{what} of {rows} rows does not divide over {parts} devices; set {remedy}."
        )
