"""Baselines that read memory at the input: averaged with the token embedding, or added to it.

OverEncoding is from arXiv 2501.16975, in the version that the Engram paper compares with (§3.2).
Both have no gate and do not use the context. They apply to the input embedding only.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from engram_jax.parameters import Matrix


class AddedRows(nnx.Module):
    """Adds rows of the model's width to the input embedding, with one trained factor per channel.

    There is no gate, no projection and no average. With one head of 2-grams, it is the bigram
    table of the speedruns of nanoGPT (there, it is added in every block).

    Args:
        width: model width D; the memory is one or more rows of it.
    """

    def __init__(self, width: int) -> None:
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(
        self, embedding: Float[Array, "B T D"], memory: Float[Array, "B T E"] | None
    ) -> Float[Array, "B T D"]:
        """Adds the rows of every position; without memory, nothing."""
        if memory is None:
            return embedding
        rows = memory.astype(embedding.dtype).reshape(*embedding.shape[:2], -1, embedding.shape[2])
        return embedding + rows.sum(axis=2) * self.scale.astype(embedding.dtype)[None, None]


class OverEncoding(nnx.Module):
    """The mean of the token embedding and one projected embedding per n-gram order.

    Args:
        width: model width D.
        memory_width: memory width E, the rows of all orders side by side.
        orders: number of n-gram orders, N−1.
        dtype: dtype of the projections.
        rngs: random streams.
    """

    def __init__(
        self, width: int, memory_width: int, orders: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        init = nnx.initializers.lecun_normal(batch_axis=0)
        shape = (orders, memory_width // orders, width)
        self.projection = nnx.Param(init(rngs.params(), shape), role=Matrix(stacked=1))
        self.dtype = dtype

    def __call__(
        self, embedding: Float[Array, "B T D"], memory: Float[Array, "B T E"] | None
    ) -> Float[Array, "B T D"]:
        """Averages the N embeddings of every position. Without memory, N−1 of them are zero."""
        orders = self.projection.shape[0]
        if memory is None:
            return embedding / (1 + orders)
        rows = memory.astype(self.dtype).reshape(*memory.shape[:2], orders, -1)
        projected = jnp.einsum("btoe,oed->btd", rows, self.projection.astype(self.dtype))
        return (embedding + projected) / (1 + orders)
