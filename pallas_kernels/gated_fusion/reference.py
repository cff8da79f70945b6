"""The definition of the fusion (paper eqs. 4–6), in float32, differentiated by JAX.

The other implementations are tested against it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.gated_fusion.form import FusionForm, normalize


def fuse(
    hidden: Float[Array, "B T M D"],
    key: Float[Array, "B T M D"],
    value: Float[Array, "B T D"],
    gain: Float[Array, "M D"],
    taps: Float[Array, "kernel M D"] | None,
    segments: Int32[Array, "B T"] | None,
    token_mask: Bool[Array, "B T"] | None,
    form: FusionForm,
) -> tuple[Float[Array, "B T M D"], Float[Array, "B T M"]]:
    """Returns what to add to the residual branches, and the gates."""
    dtype, (_, length, _, width) = hidden.dtype, hidden.shape
    hidden, key, value = (x.astype(jnp.float32) for x in (hidden, key, value))
    gate = jnp.ones(hidden.shape[:3])
    if form.gated:
        query, key = normalize(hidden, form.epsilon), normalize(key, form.epsilon)
        score = jnp.sum(gain[None, None] * key * query, axis=-1) * width**-0.5
        gate = jax.nn.sigmoid(form.root(score))
    if token_mask is not None:
        gate = jnp.where(token_mask[..., None], gate, 0)
    gated = gate[..., None] * value[:, :, None]
    if taps is None:
        return gated.astype(dtype), gate
    normed, mixed = normalize(gated, form.convolution_epsilon), jnp.zeros_like(gated)
    for tap, weight in enumerate(taps):
        there = jnp.arange(length) - (len(taps) - 1 - tap) * form.dilation
        reads = (there >= 0)[None]
        if segments is not None:
            reads &= segments[:, there] == segments
        mixed += weight[None, None] * jnp.where(reads[..., None, None], normed[:, there], 0)
    return (gated + jax.nn.silu(mixed)).astype(dtype), gate
