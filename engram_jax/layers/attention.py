"""Grouped-query attention (arXiv 2305.13245) over packed documents."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from engram_jax.errors import InputError
from engram_jax.layers.context import on_all_positions
from engram_jax.layers.positions import rotate
from engram_jax.layers.scaled_dot_product import Implementation, attend, attend_cached
from engram_jax.layers.slots import Slots
from engram_jax.parameters import Matrix


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes of an attention layer.

    Attributes:
        heads: query heads Q.
        kv_heads: key/value heads J; each serves Q/J query heads.
        head_width: width P of a head.
        theta: base of the rotary frequencies.
        implementation: "xla" on any device, "cudnn" on NVIDIA GPUs in bfloat16, "splash" on TPU;
            None chooses by device (see `attend`).
    """

    heads: int = 6
    kv_heads: int = 2
    head_width: int = 32
    theta: float = 10_000.0
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_width) < 1:
            raise InputError("heads, kv_heads and head_width must be at least 1.")
        if self.heads % self.kv_heads:
            raise InputError(
                f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly; "
                "choose kv_heads that divides heads."
            )
        if self.theta <= 1:
            raise InputError(f"theta {self.theta} must be above 1; 10000 is common.")
        if self.head_width % 2:
            raise InputError(f"head_width {self.head_width} is odd; rotary embedding needs pairs.")


class KeyValues(NamedTuple):
    """What a decoder caches of every position, in the order in which one query reads it fastest.

    Attributes:
        key: rotated keys.
        value: values.
    """

    key: Float[Array, "B J P slots"]
    value: Float[Array, "B J slots P"]


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions, within documents.

    Args:
        width: model width D.
        config: sizes.
        dtype: dtype of the computation; parameters are float32.
        rngs: random streams.
    """

    def __init__(
        self, width: int, config: AttentionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        init = nnx.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        heads, kv_heads, head_width = config.heads, config.kv_heads, config.head_width
        self.query = nnx.Param(init(rngs.params(), (width, heads, head_width)), role=Matrix())
        self.key = nnx.Param(init(rngs.params(), (width, kv_heads, head_width)), role=Matrix())
        self.value = nnx.Param(init(rngs.params(), (width, kv_heads, head_width)), role=Matrix())
        # Output matrices of attention and feed-forward start at zero: see `Decoder`.
        self.out = nnx.Param(jnp.zeros((heads, head_width, width)), role=Matrix(inputs=2))
        self.config = config
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segments: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """Attends to earlier positions of the same document.

        Args:
            x: normalized hidden states.
            segments: document number of every position.
            positions: position within the document.
        """
        query, *own = self._project(x, positions)
        key, value = on_all_positions(lambda key, value: (key, value), tuple(own))
        mixed = attend(query, key, value, segments, self.config.implementation)
        return self._combine(mixed)

    def extend(
        self,
        x: Float[Array, "B T D"],
        positions: Int32[Array, "B T"],
        cache: KeyValues,
        slots: Slots,
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """Like a call, for positions that follow cached ones; also returns the new cache.

        Args:
            x: normalized hidden states of the new positions.
            positions: their positions within their documents.
            cache: keys and values of the positions before them.
            slots: their slots.
        """
        query, key, value = self._project(x, positions)
        cache = KeyValues(slots.write(cache.key, key, 3), slots.write(cache.value, value, 2))

        def read(number: Int32[Array, ""] | int) -> tuple[Array, Array]:
            return slots.block_of(cache.key, number, 3), slots.block_of(cache.value, number, 2)

        mixed = attend_cached(query, read, slots, self.config.head_width**-0.5)
        return self._combine(mixed), cache

    def empty_cache(self, batch: int, capacity: int) -> KeyValues:
        """A cache of this many slots for every sequence."""
        heads, width = self.config.kv_heads, self.config.head_width
        key = jnp.zeros((batch, heads, width, capacity), self.dtype)
        return KeyValues(key, key.swapaxes(2, 3))

    def _project(
        self, x: Float[Array, "B T D"], positions: Int32[Array, "B T"]
    ) -> tuple[Float[Array, "B T Q P"], Float[Array, "B T J P"], Float[Array, "B T J P"]]:
        """Rotated queries, rotated keys, and values."""
        theta, dtype = self.config.theta, self.dtype
        query = rotate(jnp.einsum("btd,dqp->btqp", x, self.query.astype(dtype)), positions, theta)
        key = rotate(jnp.einsum("btd,djp->btjp", x, self.key.astype(dtype)), positions, theta)
        return query, key, jnp.einsum("btd,djp->btjp", x, self.value.astype(dtype))

    def _combine(self, mixed: Float[Array, "B T Q P"]) -> Float[Array, "B T D"]:
        """The output of all heads. (An einsum over two axes would transpose the matrix.)"""
        out = self.out.astype(self.dtype)
        return mixed.reshape(*mixed.shape[:2], -1) @ out.reshape(-1, out.shape[-1])
