"""Rotary position embedding (arXiv 2104.09864)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def rotate(
    x: Float[Array, "B T heads P"], positions: Int32[Array, "B T"], theta: float
) -> Float[Array, "B T heads P"]:
    """Turns the pair (xᵢ, x₍ᵢ₊P/2₎) by the angle position · θ^(−2i/P), in float32."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
