"""The slots of a decode state: where the new positions of every sequence are cached."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Shaped

# Attention reads cached slots in blocks of this size, up to the longest sequence's last slot.
BLOCK = 256


class Slots(NamedTuple):
    """The slots of T new positions of every sequence, which follow its older positions.

    A slot beyond the capacity is dropped when written.

    Attributes:
        first: slot of every sequence's first new position, which is its length before.
        segments: document number of every slot, including the new ones.
        new: slots of the new positions.
    """

    first: Int32[Array, "B"]
    segments: Int32[Array, "B slots"]
    new: Int32[Array, "B T"]

    @property
    def capacity(self) -> int:
        """Number of slots of a sequence."""
        return self.segments.shape[1]

    @property
    def block(self) -> int:
        """Number of slots in a block."""
        return min(BLOCK, self.capacity)

    @property
    def blocks(self) -> Int32[Array, ""]:
        """Number of blocks that hold the new positions of all sequences, and all older ones."""
        used = jnp.minimum(jnp.max(self.new) + 1, self.capacity)
        return (used + self.block - 1) // self.block

    def write(
        self, cache: Shaped[Array, "B slots *rest"], values: Shaped[Array, "B T *rest"]
    ) -> Shaped[Array, "B slots *rest"]:
        """Writes the values of the new positions."""
        return write(cache, self.new, values)

    def block_of(
        self, cache: Shaped[Array, "B slots *rest"], number: Int32[Array, ""] | int
    ) -> Shaped[Array, "B block *rest"]:
        """The values of a block of slots."""
        return jax.lax.dynamic_slice_in_dim(cache, number * self.block, self.block, axis=1)

    def seen(self, number: Int32[Array, ""] | int) -> Bool[Array, "B T block"]:
        """Which slots of a block each new position sees: up to its own, in its document."""
        there = number * self.block + jnp.arange(self.block)
        own = jnp.take_along_axis(self.segments, self.new, axis=1, mode="clip")
        earlier = there[None, None] <= self.new[:, :, None]
        return earlier & (self.block_of(self.segments, number)[:, None] == own[:, :, None])

    def before(
        self, cache: Shaped[Array, "B slots *rest"], count: int
    ) -> Shaped[Array, "B {count} *rest"]:
        """The values of the `count` slots before the new ones; undefined before the first slot."""
        return read_before(cache, self.first, count)

    def segments_before(self, count: int) -> Int32[Array, "B {count}"]:
        """Document numbers of the `count` slots before the new ones; −1 before the first slot."""
        exists = self.first[:, None] >= count - jnp.arange(count)[None]
        return jnp.where(exists, self.before(self.segments, count), -1)


def write(
    cache: Shaped[Array, "B slots *rest"],
    slots: Int32[Array, "B T"],
    values: Shaped[Array, "B T *rest"],
) -> Shaped[Array, "B slots *rest"]:
    """Writes values at their slots. (A slice update would overwrite the last slots when full.)"""
    rows = jnp.arange(len(cache))[:, None]
    return cache.at[rows, slots].set(values.astype(cache.dtype), mode="drop", unique_indices=True)


def read_before(
    cache: Shaped[Array, "B slots *rest"], first: Int32[Array, "B"], count: int
) -> Shaped[Array, "B {count} *rest"]:
    """The values of the `count` slots before slot `first`; undefined before the first slot."""
    slots = jnp.maximum(first[:, None] - count + jnp.arange(count)[None], 0)
    return cache.at[jnp.arange(len(cache))[:, None], slots].get(mode="clip")
