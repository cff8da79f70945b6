"""Options of the fusion, and which taps of the convolution read which tokens."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

MOST_TAPS = 30  # maximum number of taps: each needs one bit in a token's flags


@dataclass(frozen=True)
class FusionForm:
    """The constants of the fusion.

    Attributes:
        epsilon: added to the mean square of keys and queries.
        signed_root: the signed root of a zero score: 0 for "sign", ±10⁻³ for "copysign".
        dilation: distance between the convolution's taps in tokens.
        convolution_epsilon: added to the mean square of the convolution's input.
        gated: False: every gate is 1, an ablation. Of the training passes, only the reference has
            this form.
    """

    epsilon: float
    signed_root: Literal["sign", "copysign"] = "sign"
    dilation: int = 1
    convolution_epsilon: float = 1e-5
    gated: bool = True

    def root(self, score: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """sign(s)·√max(|s|, 10⁻⁶)."""
        sign = jnp.sign(score)
        if self.signed_root == "copysign":
            sign = jnp.copysign(jnp.ones_like(score), score)
        return sign * jnp.sqrt(jnp.maximum(jnp.abs(score), 1e-6))

    def root_slope(self, score: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """The derivative of `root`."""
        size = jnp.abs(score)
        return jnp.where(size > 1e-6, 0.5 * jax.lax.rsqrt(jnp.maximum(size, 1e-6)), 0)

    def distances(self, kernel: int) -> tuple[int, ...]:
        """How many tokens back each tap of a kernel reads."""
        return tuple((kernel - 1 - tap) * self.dilation for tap in range(kernel))


class FusedTokens(NamedTuple):
    """What the convolution reads of tokens.

    Attributes:
        value: the memory's value v.
        scale: c, such that the input of the convolution is c·v.
        segments: document numbers; a number that no document has where there is no token.
    """

    value: Float[Array, "B T D"]
    scale: Float[Array, "B T M"]
    segments: Int32[Array, "B T"]


def normalize(x: Float[Array, "*n D"], epsilon: float) -> Float[Array, "*n D"]:
    """x / √(mean(x²) + ε) over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)


def tap_reads(
    segments: Int32[Array, "B T"] | None, length: int, distance: int
) -> Bool[Array, "#B T"]:
    """Whether the token `distance` before each token is in the same row and document."""
    there = jnp.arange(length) >= distance
    if segments is None or not distance:
        return there[None]
    older = jnp.pad(segments, ((0, 0), (min(distance, length), 0)))[:, :length]
    return there[None] & (older == segments)


def token_flags(
    batch: int,
    length: int,
    segments: Int32[Array, "B T"] | None,
    token_mask: Bool[Array, "B T"] | None,
    distances: tuple[int, ...],
) -> Int32[Array, "B T"]:
    """Flags of every token. Bit 0: its gate is not masked. Bit 1 + i: tap i reads a token."""
    alive = jnp.ones((1, length), bool) if token_mask is None else token_mask
    reads = [tap_reads(segments, length, distance) for distance in distances]
    flags = sum(bit.astype(jnp.int32) << i for i, bit in enumerate([alive, *reads]))
    return jnp.broadcast_to(flags, (batch, length))


def no_gradients(*integers: Array | None) -> list[np.ndarray | None]:
    """The cotangents of integer arguments."""
    return [None if x is None else np.zeros(x.shape, jax.dtypes.float0) for x in integers]
