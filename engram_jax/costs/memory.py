"""The memory of a training step on a TPU chip, estimated from shapes. Nothing is compiled.

The forward pass is traced, which takes seconds, and gives the arrays that are kept for the backward
pass, for any model and `model.remat`. docs/scale.md compares estimates with compiled programs.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from engram_jax.config import Config
from engram_jax.decoder_config import DecoderConfig
from engram_jax.layers.cross_entropy import count_parts
from engram_jax.layers.mixture_of_experts import CAPACITY_FACTOR
from engram_jax.model import Decoder
from engram_jax.program import Program
from engram_jax.sharding import TOKENS_BT, make_abstract_mesh, row_parts
from engram_jax.train_state import TrainState, device_bytes

# Of the arrays that JAX would keep of a block, the TPU compiler allocates about this share, because
# it fuses elementwise operations.
_BLOCK_SHARE = 0.5


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
