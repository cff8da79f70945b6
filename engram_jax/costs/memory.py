"""The memory of a training step, from shapes: what it needs at least, and an estimate of all.

Nothing is compiled. For the estimate, which is for TPU chips, the forward pass is traced. That
takes seconds, and gives the arrays that are kept for the backward pass, for any model and
`model.remat`. docs/scale.md compares estimates with compiled programs.
"""

import math
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from engram_jax.config import Config
from engram_jax.decoder_config import DecoderConfig
from engram_jax.errors import InputError
from engram_jax.layers.cross_entropy import count_parts
from engram_jax.layers.mixture_of_experts import CAPACITY_FACTOR
from engram_jax.model import Decoder
from engram_jax.program import Program
from engram_jax.sharding import TOKENS_BT, make_abstract_mesh, row_parts
from engram_jax.train_state import TrainState, device_bytes

# Of the arrays that JAX would keep of a block, the TPU compiler allocates about this share, because
# it fuses elementwise operations.
_BLOCK_SHARE = 0.5


def check_memory(config: Config, state: TrainState, devices: int) -> None:
    """Refuses a run that cannot fit in the memory of its machines.

    Only arrays that exist at the same time in every run are counted, so a run that passes can still
    be too large. (`estimate_bytes` gives 1.6 to 2.4 times as much for the paper's models.)

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


def estimate_bytes(config: Config) -> dict[str, int]:
    """Estimated bytes of a step on each TPU chip of the configuration's mesh, by what they are for.

    Temporaries of the optimizer are not included: they exist when those of the blocks do not.

    Raises:
        InputError: sizes do not fit each other or the mesh.
    """
    mesh, model = make_abstract_mesh(config.mesh), config.model
    data = replace(config.data, batch_size=mesh.size * config.train.accumulation)
    state = Program.of_sizes(replace(config, data=data), mesh).abstract_state()
    tokens = _rows(config) * data.sequence_length // config.mesh.context
    number = jnp.dtype(model.dtype).itemsize
    block = experts = 0.0
    if model.remat is not None:
        block = _BLOCK_SHARE * _kept_bytes(config, replace(model, remat=None), state) / model.layers
    if model.experts is not None:
        # Expert-parallel chips gather their tokens, and sum their outputs in float32.
        pairs = CAPACITY_FACTOR * tokens * model.experts.active
        of_pair = model.width * (2 * number + 4) + 4 * model.experts.width * number
        experts = pairs * of_pair + config.mesh.expert * tokens * model.width * (number + 4)
    memory, parts = config.memory, count_parts(tokens, model.vocabulary)
    rows = tokens * config.train.accumulation * memory.sites.width * len(memory.layers)
    return {
        "state": device_bytes(state),
        "gradients": device_bytes(state.params),
        "kept for the backward pass": _kept_bytes(config, model, state),
        "backward pass of a block": round(block),
        "a round of its experts": round(experts),
        "logits": 2 * 4 * tokens * model.vocabulary // parts,  # and their gradient
        "output head": 2 * model.vocabulary * model.width * number,  # and its gradient
        "rows of tables": 3 * 4 * rows,  # their gradients, and those that other chips request
    }


def _kept_bytes(config: Config, model: DecoderConfig, state: TrainState) -> int:
    """Bytes per TPU chip that the forward pass of a model keeps for the backward pass."""
    tpu = jax.sharding.AbstractDevice(device_kind="", num_cores=1, platform="tpu")
    mesh = make_abstract_mesh(config.mesh).update(abstract_device=tpu)
    sites, rows = config.memory.sites, _rows(config) * row_parts(mesh)
    shape = rows, config.data.sequence_length

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = jax.NamedSharding(mesh, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    split = jax.NamedSharding(mesh, TOKENS_BT)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split)
    vectors = jax.ShapeDtypeStruct((*shape, sites.width), jnp.float32, sharding=split)
    memory = dict.fromkeys(config.memory.layers, vectors)

    def make_decoder() -> Decoder:
        return Decoder(model, sites, rngs=nnx.Rngs(0, memory=1))

    def pull_back(params: Any, memory: Any, bias: Any, *inputs: Array) -> Any:
        def hidden(params: Any, memory: Any) -> tuple[Array, Array]:
            decoder, (tokens, segments, positions) = nnx.merge(graph, params), inputs
            return decoder.hidden_states(tokens, memory, segments, positions, bias)[:2]

        return jax.vjp(hidden, params, memory)[1]  # a pytree of the arrays that it needs

    graph, _ = nnx.split(nnx.eval_shape(make_decoder))
    params, bias = jax.tree.map(place, (state.params, state.expert_bias))
    with jax.sharding.use_abstract_mesh(mesh):
        kept = jax.eval_shape(pull_back, params, memory, bias, tokens, tokens, tokens)
    return device_bytes(kept) - device_bytes(params)


def _rows(config: Config) -> int:
    """Rows of a micro-batch on one chip, or on those that share its sequences."""
    parts = config.train.accumulation * row_parts(make_abstract_mesh(config.mesh))
    return -(-config.data.batch_size // parts)
