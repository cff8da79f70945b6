"""What depends on the platform: its kernels, its memory, and how many processes build batches."""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from engram_jax.config import Config
from engram_jax.errors import InputError
from engram_jax.hashing import NgramHash
from engram_jax.layers.cross_entropy import count_parts
from engram_jax.memory.layout import LANES
from engram_jax.sharding import AnyMesh, platform_of, row_parts
from engram_jax.train_state import TrainState, device_bytes

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


def check_memory(config: Config, state: TrainState, devices: int) -> None:
    """Refuses a run that cannot fit in the memory of its machines.

    Only arrays that exist at the same time in every run are counted, so a run that passes can still
    be too large. (`costs.memory` estimates 1.6 to 2.4 times as much for the paper's models.)

    Args:
        config: the configuration.
        state: the state of a training run, or its shapes; with shardings.
        devices: number of devices of the mesh.

    Raises:
        InputError: it does not fit; the message names what needs the memory, and its flags.
    """
    host, device = _memory(devices)
    parts = least_bytes(config, state, devices)
    if sum(parts.values()) > device:
        listed = ", ".join(f"{part} {size / 1e9:,.1f}" for part, size in parts.items() if size)
        raise InputError(
            f"{config.name} needs at least {sum(parts.values()) / 1e9:,.1f} GB on each device of a "
            f"mesh of {devices} ({listed}), and there are {device / 1e9:,.1f} GB of memory; "
            f"{_REMEDIES[max(parts, key=parts.__getitem__)]}."
        )
    data, train = config.data, config.train
    tokens = data.batch_size * data.sequence_length // jax.process_count()
    fields, worker_bytes, entry_bytes = 6, 1 << 26, 16
    for what, flags, needed in (
        (
            "batches that are built ahead",
            "data.batch_size or data.prefetch",
            tokens * fields * 4 * (data.prefetch + 1),
        ),
        ("the schedule", "train.steps", entry_bytes << train.steps.bit_length()),
        ("the processes", "data.workers", (data.workers or 0) * worker_bytes),
    ):
        if needed > host:
            raise InputError(
                f"This run needs at least {needed / 1e9:,.1f} GB for {what}, and there are "
                f"{host / 1e9:,.1f} GB of memory; lower {flags}."
            )


# What to change if a part of `least_bytes` is the largest.
_REMEDIES = {
    "parameters and optimizer": "raise mesh.fsdp, or lower the sizes in model",
    "gradients": "raise mesh.fsdp, or lower the sizes in model",
    "tables": "use more devices, set memory.placement to host or file, or lower "
    "memory.rows_per_head, memory.heads or memory.row_width",
} | dict.fromkeys(
    ("inputs of the blocks", "logits"),
    "use more devices, raise train.accumulation, or lower data.batch_size or data.sequence_length",
)


def least_bytes(config: Config, state: TrainState, devices: int) -> dict[str, int]:
    """Bytes that every training step needs at least on each device, by a name of `_REMEDIES`.

    With one micro-batch, gradients exist after the inputs of the blocks, so only the larger of the
    two is counted.

    Args:
        config: the configuration.
        state: the state or its shapes, with shardings.
        devices: number of devices of the mesh.
    """
    model, data, train = config.model, config.data, config.train
    tokens = data.batch_size * data.sequence_length // (train.accumulation * devices)
    number, parts = jnp.dtype(model.dtype).itemsize, count_parts(tokens, model.vocabulary)
    gradients = {"gradients": device_bytes(state.params)}  # sums are in float32
    if train.accumulation == 1:
        gradients = {"gradients": gradients["gradients"] * number // 4}
    kept = {
        "inputs of the blocks": tokens * model.width * model.branches * model.layers * number,
        "logits": 4 * tokens * model.vocabulary // parts,
    }
    if train.accumulation > 1:
        kept |= gradients
    return {
        "parameters and optimizer": device_bytes(replace(state, tables={})),
        "tables": device_bytes(state.tables),
    } | max(gradients, kept, key=lambda parts: sum(parts.values()))


def _memory(devices: int) -> tuple[float, float]:
    """Bytes of this machine's memory, and of each of so many devices (infinity: not known)."""
    host = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # there is none, or it is "max"
        host = min(host, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    if jax.default_backend() == "cpu":
        return host, host * jax.process_count() / devices
    stats = jax.local_devices()[0].memory_stats() or {}
    return host, stats.get("bytes_limit", math.inf)


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


def check_devices(config: Config, ngram_hash: NgramHash | None, mesh: AnyMesh) -> None:
    """Checks that the devices of a mesh can run a configuration.

    Raises:
        InputError: the mesh does not divide the tables, or its devices do not support the named
            implementations.
    """
    if jax.config.read("jax_enable_x64"):
        raise InputError(
            "64-bit types of JAX are enabled, so parameters would be float64; unset JAX_ENABLE_X64."
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
    if config.micro_batch_size % row_parts(mesh):
        raise InputError(
            f"A micro-batch of {config.micro_batch_size} rows does not divide over "
            f"{row_parts(mesh)} devices; set data.batch_size to a multiple of devices / "
            "mesh.context × train.accumulation."
        )


def check_evaluation_batch(config: Config, mesh: AnyMesh) -> None:
    """Checks that the devices of a mesh divide a batch of an evaluation.

    Raises:
        InputError: they do not.
    """
    if config.evaluate_batch_size % row_parts(mesh):
        raise InputError(
            f"An evaluation's batch of {config.evaluate_batch_size} rows does not divide over "
            f"{row_parts(mesh)} devices; set train.evaluate_batch_size (in eval.py: --batch-size) "
            "to a multiple of devices / mesh.context."
        )
