"""The embedding of the tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from engram_jax.sharding import split_axes


def look_up(embedding: Float[Array, "V D"], tokens: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
    """The tokens' embeddings, in float32.

    Then the gradients of a token's many occurrences are summed in float32, too. In bfloat16, a sum
    of a thousand terms stops growing at half its value, due to rounding. The `shard_map` makes each
    device sum the gradients of its own tokens first. Without it, JAX requests the gradients of all
    tokens on every device, and leaves it to the compiler to avoid that.
    """
    axes = split_axes(tokens)

    def look_up_own(embedding: Array, tokens: Array) -> Array:
        if axes:
            embedding = jax.lax.pcast(embedding, axes, to="varying")
        return embedding.astype(jnp.float32)[tokens]

    if jax.sharding.get_abstract_mesh().empty:
        return look_up_own(embedding, tokens)
    spec = jax.typeof(tokens).sharding.spec
    return jax.shard_map(look_up_own, in_specs=(jax.P(reduced=set(axes)), spec), out_specs=spec)(
        embedding, tokens
    )
