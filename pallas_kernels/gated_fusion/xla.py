"""The fusion in plain JAX, with a backward pass that recomputes intermediate values.

All branches gate the same value v. So the input of the convolution is RMSNorm(αv) = c·v, with one
number c = α / √(α²·mean(v²) + ε) per token and branch, and the taps shift v and c instead of their
product. The forward pass keeps only the inputs and the gates, and no array of the output's size.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.gated_fusion.form import FusedTokens, FusionForm, no_gradients, tap_reads

type Residuals = tuple[Any, ...]  # the arguments except the form, and the gates


@partial(jax.custom_vjp, nondiff_argnums=(7,))
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
    dtype = hidden.dtype
    hidden, key, value = (x.astype(jnp.float32) for x in (hidden, key, value))
    gate = _gate(hidden, key, gain, token_mask, form)
    out = gate[..., None] * value[:, :, None]
    if taps is not None:
        scale, _ = _scale(gate, value, form)
        out += jax.nn.silu(_convolve(value, scale, taps, segments, form))
    return out.astype(dtype), gate


def gate_new(
    hidden: Float[Array, "B T M D"],
    key: Float[Array, "B T M D"],
    value: Float[Array, "B T D"],
    gain: Float[Array, "M D"],
    token_mask: Bool[Array, "B T"] | None,
    form: FusionForm,
) -> tuple[Float[Array, "B T M"], Float[Array, "B T M"]]:
    """The gates of tokens that follow others, and c, such that c·v enters the convolution."""
    hidden, key, value = (x.astype(jnp.float32) for x in (hidden, key, value))
    gate = _gate(hidden, key, gain, token_mask, form)
    return gate, _scale(gate, value, form)[0]


def fuse_new(
    gate: Float[Array, "B T M"],
    taps: Float[Array, "kernel M D"],
    window: FusedTokens,
    form: FusionForm,
) -> Float[Array, "B T M D"]:
    """What `fuse` adds for tokens that follow others, in float32.

    Args:
        gate: from `gate_new`.
        taps: as in `fuse`.
        window: the new tokens, and before them those that the convolution can read.
        form: the constants.
    """
    value, length = window.value.astype(jnp.float32), gate.shape[1]
    mixed = _convolve(value, window.scale, taps, window.segments, form)[:, -length:]
    return gate[..., None] * value[:, -length:, None] + jax.nn.silu(mixed)


def _forward(*arguments: Any) -> tuple[tuple[Array, Array], Residuals]:
    out, gate = fuse(*arguments)
    return (out, gate), (*arguments[:7], gate)


def _backward(
    form: FusionForm, residuals: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array | np.ndarray | None, ...]:
    *arrays, segments, token_mask, gate = residuals
    hidden, key, value = (x.astype(jnp.float32) for x in arrays[:3])
    gain, taps = arrays[3:]
    d_out, d_gate = cotangents[0].astype(jnp.float32), cotangents[1]

    d_gate += jnp.einsum("btmd,btd->btm", d_out, value)
    d_value = jnp.einsum("btm,btmd->btd", gate, d_out)
    d_taps = None
    if taps is not None:
        scale, size = _scale(gate, value, form)
        mixed = _convolve(value, scale, taps, segments, form)
        slope = jax.nn.sigmoid(mixed)
        d_mixed = d_out * slope * (1 + mixed * (1 - slope))
        d_normed, by_tap = jnp.zeros(()), []
        for weight, distance in _taps(taps, value.shape[1], form):
            reads = tap_reads(segments, value.shape[1], distance)[..., None]
            older = _older(value, scale, reads, distance)
            by_tap.append(jnp.sum(d_mixed * older, axis=(0, 1)))
            d_normed += weight[None, None] * _shift(
                jnp.where(reads[..., None], d_mixed, 0), -distance
            )
        beyond = [jnp.zeros_like(by_tap[0])] * (len(taps) - len(by_tap))
        d_taps = jnp.stack(beyond + by_tap)
        d_scale = jnp.einsum("btmd,btd->btm", d_normed, value)
        d_value += jnp.einsum("btm,btmd->btd", scale, d_normed)
        d_gate += d_scale * form.convolution_epsilon * size**3
        d_square = -0.5 * jnp.sum(d_scale * scale**3, axis=-1, keepdims=True)
        d_value += 2 / value.shape[-1] * d_square * value

    score, hidden_size, key_size = _score(hidden, key, gain, form)
    # A masked gate is 0, so masked tokens have no gradient.
    d_score = d_gate * gate * (1 - gate) * form.root_slope(score)
    both = (d_score * hidden_size * key_size * value.shape[-1] ** -0.5)[..., None]
    own = (d_score * score / value.shape[-1])[..., None]
    weighted = gain[None, None]
    d_hidden = both * weighted * key - own * hidden_size[..., None] ** 2 * hidden
    d_key = both * weighted * hidden - own * key_size[..., None] ** 2 * key
    d_gain = jnp.sum(both * key * hidden, axis=(0, 1))
    gradients = (d_hidden, d_key, d_value, d_gain, d_taps)
    return (
        *[None if x is None else x.astype(a.dtype) for x, a in zip(gradients, arrays, strict=True)],
        *no_gradients(segments, token_mask),
    )


fuse.defvjp(_forward, _backward)


def _gate(
    hidden: Float[Array, "B T M D"],
    key: Float[Array, "B T M D"],
    gain: Float[Array, "M D"],
    token_mask: Bool[Array, "B T"] | None,
    form: FusionForm,
) -> Float[Array, "B T M"]:
    """The gates; 0 where masked."""
    gate = jnp.ones(hidden.shape[:3])
    if form.gated:
        gate = jax.nn.sigmoid(form.root(_score(hidden, key, gain, form)[0]))
    return gate if token_mask is None else jnp.where(token_mask[..., None], gate, 0)


def _score(
    hidden: Float[Array, "B T M D"],
    key: Float[Array, "B T M D"],
    gain: Float[Array, "M D"],
    form: FusionForm,
) -> tuple[Float[Array, "B T M"], Float[Array, "B T M"], Float[Array, "B T M"]]:
    """The score, and the factors that normalize queries and keys."""
    hidden_size = jax.lax.rsqrt(jnp.mean(hidden**2, axis=-1) + form.epsilon)
    key_size = jax.lax.rsqrt(jnp.mean(key**2, axis=-1) + form.epsilon)
    product = jnp.sum(gain[None, None] * key * hidden, axis=-1)
    return product * hidden_size * key_size * hidden.shape[-1] ** -0.5, hidden_size, key_size


def _scale(
    gate: Float[Array, "B T M"], value: Float[Array, "B T D"], form: FusionForm
) -> tuple[Float[Array, "B T M"], Float[Array, "B T M"]]:
    """c such that RMSNorm(αv) = c·v, and c / α."""
    mean_square = jnp.mean(value**2, axis=-1)[..., None]
    size = jax.lax.rsqrt(gate**2 * mean_square + form.convolution_epsilon)
    return gate * size, size


def _convolve(
    value: Float[Array, "B T D"],
    scale: Float[Array, "B T M"],
    taps: Float[Array, "kernel M D"],
    segments: Int32[Array, "B T"] | None,
    form: FusionForm,
) -> Float[Array, "B T M D"]:
    """The convolution of c·v."""
    mixed = jnp.zeros(())
    for weight, distance in _taps(taps, value.shape[1], form):
        reads = tap_reads(segments, value.shape[1], distance)[..., None]
        mixed = mixed + weight[None, None] * _older(value, scale, reads, distance)
    return mixed


def _older(
    value: Float[Array, "B T D"],
    scale: Float[Array, "B T M"],
    reads: Bool[Array, "#B T 1"],
    distance: int,
) -> Float[Array, "B T M D"]:
    """c·v of the token that a tap reads; zero if it reads none, even if v has NaN there."""
    normed = _shift(scale, distance)[..., None] * _shift(value, distance)[:, :, None]
    return jnp.where(reads[..., None], normed, 0)


def _taps(
    taps: Float[Array, "kernel M D"], length: int, form: FusionForm
) -> list[tuple[Float[Array, "M D"], int]]:
    """Weights and distances of the taps that can read a token in a row of `length` tokens."""
    distances = enumerate(form.distances(len(taps)))
    return [(taps[tap], distance) for tap, distance in distances if distance < length]


def _shift(x: Float[Array, "B T *n"], distance: int) -> Float[Array, "B T *n"]:
    """x of the token `distance` before each token (negative: after); zero outside the row."""
    rest = ((0, 0),) * (x.ndim - 2)
    if distance < 0:
        return jnp.pad(x[:, -distance:], ((0, 0), (0, -distance), *rest))
    return jnp.pad(x[:, : x.shape[1] - distance], ((0, 0), (distance, 0), *rest))
