"""Root-mean-square normalization."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def normalize(x: Float[Array, "*batch D"], epsilon: float) -> Float[Array, "*batch D"]:
    """x / √(mean(x²) + ε) over the last axis, computed and returned in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)


class RMSNorm(nnx.Module):
    """RMS normalization with a gain per channel.

    Args:
        shape: shape of the gain; its last axis is normalized.
        epsilon: added to the mean square.
        zero_centered: the gain is 1 + the parameter, which then starts at zero.
    """

    def __init__(self, *shape: int, epsilon: float = 1e-6, zero_centered: bool = False) -> None:
        self.gain = nnx.Param(jnp.zeros(shape) if zero_centered else jnp.ones(shape))
        self.epsilon = epsilon
        self.zero_centered = zero_centered

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalizes the last axis; the result has x's dtype."""
        gain = self.scale()
        gain = gain.reshape((1,) * (x.ndim - gain.ndim) + gain.shape)
        return (normalize(x, self.epsilon) * gain).astype(x.dtype)

    def scale(self) -> Float[Array, "*shape"]:
        """The factor of every normalized channel."""
        return self.gain + 1 if self.zero_centered else self.gain[...]
