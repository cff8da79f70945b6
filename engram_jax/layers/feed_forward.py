"""The gated feed-forward layer, SwiGLU (arXiv 2002.05202)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from engram_jax.parameters import Matrix


class FeedForward(nnx.Module):
    """(SiLU(x·gate) ⊙ x·up)·down.

    Args:
        width: model width D.
        inner: inner width W.
        dtype: dtype of the computation; parameters are float32.
        rngs: random streams.
    """

    def __init__(self, width: int, inner: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.lecun_normal()
        self.gate = nnx.Param(init(rngs.params(), (width, inner)), role=Matrix())
        self.up = nnx.Param(init(rngs.params(), (width, inner)), role=Matrix())
        # Output matrices of attention and feed-forward start at zero: see `Decoder`.
        self.down = nnx.Param(jnp.zeros((inner, width)), role=Matrix())
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the layer to every position."""
        gate, up, down = (w.astype(self.dtype) for w in (self.gate, self.up, self.down))
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down
