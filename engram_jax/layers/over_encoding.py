"""OverEncoding, a baseline: n-gram embeddings are averaged with the input embedding.

From arXiv 2501.16975, in the version that the Engram paper compares with (§3.2). It has no gate and
does not use the context. It applies to the input embedding only.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from engram_jax.parameters import Matrix


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
