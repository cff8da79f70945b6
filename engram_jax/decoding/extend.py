"""The step of decoding: hash the new tokens, read their rows, run the cached decoder."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, UInt32

from engram_jax.decoding.weights import WEIGHT_SPECS, DecodeWeights
from engram_jax.hashing_device import hash_after, stored_places
from engram_jax.layers.decode_state import DecodeState
from engram_jax.layers.slots import Slots
from engram_jax.memory.lookup import current_values, read_places
from engram_jax.model import Memory
from engram_jax.program import Program
from engram_jax.sharding import TOKEN_AXES

type FetchedRecords = dict[int, UInt32[Any, "B T H words"]]  # by layer id

BY_SEQUENCE = jax.P(TOKEN_AXES)  # everything that begins with B


def extend(
    program: Program,
    weights: DecodeWeights,
    state: DecodeState,
    tokens: Int32[Array, "B T"],
    count: Int32[Array, "B"],
    logits: Literal["all", "last"] = "last",
    fetched: FetchedRecords | None = None,
) -> tuple[Float[Array, "B T V"] | Float[Array, "B V"], DecodeState]:
    """Appends tokens to sequences of one document each; see `Decoder.extend`.

    Call it inside `on_all_devices`.

    Args:
        program: the program.
        weights: its prepared weights.
        state: the sequences.
        tokens: the new tokens.
        count: how many of the T tokens each sequence has.
        logits: those of "all" new positions, or of each sequence's "last".
        fetched: records of the tokens' rows, if the host has read them.
    """
    positions = state.length[:, None] + jnp.arange(tokens.shape[1])[None]
    state, slots = state.append(tokens, jnp.ones_like(tokens), positions)
    return nnx.merge(program.graph, weights.params).extend(
        *(state, slots, _read_memory(program, weights, state, slots, count, fetched), weights.head),
        count=count,
        expert_bias=weights.expert_bias,
        logits=logits,
    )


def _read_memory(
    program: Program,
    weights: DecodeWeights,
    state: DecodeState,
    slots: Slots,
    count: Int32[Array, "B"],
    fetched: FetchedRecords | None,
) -> Memory:
    """The memory vectors of appended tokens, by layer id; zeros beyond each sequence's count."""
    if weights.hash is None or program.ngram_hash is None:
        return {}
    if fetched is not None:
        layout = program.config.memory.layout
        return {
            layer: current_values(
                layout.unpack(words.reshape(-1, layout.words)), weights.row_adam, weights.step
            ).reshape(*words.shape[:2], -1)
            for layer, words in fetched.items()
        }
    spec = program.ngram_hash.spec
    orders = spec.max_order - 1
    tokens, segments = slots.window(state.tokens, orders), slots.segments_of_window(orders)
    rows = hash_after(weights.hash, tokens, segments)
    # Without the barrier, XLA hashes again for every element that is read.
    all_places = jax.lax.optimization_barrier(stored_places(weights.hash, rows))
    is_new = (jnp.arange(rows.shape[2])[None] < count[:, None])[..., None]
    tables = {**weights.tables, **weights.outside}
    memory = {}
    for number, layer in enumerate(spec.layers):
        # Padding, from R up, is not read, so no row of a sequence that has ended is asked for.
        places = jnp.where(is_new, all_places[number], program.ngram_hash.padded_rows[number])
        memory[layer] = read_places(
            tables[layer], places, weights.row_adam, weights.step, program.config.memory.gather
        )
    return memory


def on_all_devices(
    function: Callable[..., Any], by_sequence: Sequence[bool], *, donate: Sequence[int] = ()
) -> jax.stages.Wrapped:
    """Jits a function of prepared weights and other arguments; each device has its own sequences.

    All results are by sequence. Call the result inside `program.use_mesh()`.

    Args:
        function: its first argument is a `DecodeWeights`.
        by_sequence: for every further argument, whether its arrays begin with B; the others are
            complete on every device.
        donate: numbers of the arguments that are donated.
    """
    specs = [BY_SEQUENCE if split else jax.P() for split in by_sequence]
    # check_vma is off, because kernels do not declare that their results vary over every mesh axis.
    mapped = jax.shard_map(
        function, in_specs=(WEIGHT_SPECS, *specs), out_specs=BY_SEQUENCE, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=donate)
