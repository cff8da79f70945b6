"""From tables to memory vectors: rows → distinct n-grams → tokens, and the way back.

The forward pass reads each distinct row once (`gather_rows`) and spreads it (`expand`). The
backward pass of `expand` is two segment sums in the orders of the plan: it gives one gradient per
distinct row, which is all that the row optimizer needs.
"""

import jax
import jax.numpy as jnp
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float, Int32, Shaped

from engram_jax.memory.plan import LayerPlan, TokenPlan
from pallas_kernels import hashed_gather


def gather_rows(table: Shaped[Array, "R *F"], rows: Int32[Array, "U"]) -> Shaped[Array, "U *F"]:
    """Reads a plan's rows, on every device alike; padding (row numbers from R up) reads as zero."""
    return table.at[rows].get(
        mode="fill",
        fill_value=0,
        indices_are_sorted=True,
        unique_indices=True,
        out_sharding=None if get_abstract_mesh().empty else jax.P(),
    )


def expand(
    gathered: Float[Array, "U F"],
    layer: LayerPlan,
    tokens: TokenPlan,
) -> Float[Array, "B T E"]:
    """Spreads gathered rows to the memory vector of every token: its H rows, order-major.

    Args:
        gathered: the distinct rows, as `gather_rows` gives them.
        layer: this layer's part of the plan.
        tokens: one micro-batch of the plan's tokens: arrays [orders, B, T].
    """
    spec = jax.typeof(tokens.ngram_of_token).sharding.spec
    if not any(spec):
        return _expand(gathered, layer.slot_of_ngram, layer.slot_order, *tokens)

    def expand_own(gathered: Array, *indices: Array) -> Array:
        # Forward, the rows become each device's own; backward, this sums over the devices.
        axes = tuple(axis for entry in spec if entry for axis in entry)
        return _expand(jax.lax.pcast(gathered, axes, to="varying"), *indices)

    return jax.shard_map(
        expand_own,
        in_specs=(jax.P(), jax.P(), jax.P(), spec, spec),
        out_specs=jax.P(*spec[1:], None),
    )(gathered, layer.slot_of_ngram, layer.slot_order, *tokens)


def _expand(
    gathered: Float[Array, "U F"],
    slot_of_ngram: Int32[Array, "orders G K"],
    slot_order: Int32[Array, "U"],
    ngram_of_token: Int32[Array, "orders B T"],
    token_order: Int32[Array, "orders B T"],
) -> Float[Array, "B T E"]:
    orders, ngrams, _ = slot_of_ngram.shape
    of_ngram = hashed_gather.gather(gathered, slot_of_ngram.reshape(-1), slot_order)
    of_ngram = of_ngram.reshape(orders, ngrams, -1)
    of_token = [
        hashed_gather.gather(values, ngram.reshape(-1), order.reshape(-1))
        for values, ngram, order in zip(of_ngram, ngram_of_token, token_order, strict=True)
    ]
    return jnp.concatenate(of_token, axis=-1).reshape(*ngram_of_token.shape[1:], -1)
