"""The slots of a decode state: where the new positions of every sequence are cached."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Shaped

# Attention reads cached slots in blocks of this size, up to the longest sequence's last slot.
BLOCK = 256


def whole_blocks(capacity: int) -> int:
    """The capacity, rounded up so that it is one block or whole blocks."""
    return capacity if capacity <= BLOCK else -(-capacity // BLOCK) * BLOCK


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
        self,
        cache: Shaped[Array, "B *cached"],
        values: Shaped[Array, "B T *rest"],
        axis: int = 1,
    ) -> Shaped[Array, "B *cached"]:
        """Writes the values of the new positions; `axis` is the axis of the slots."""
        return write(cache, self.new, values, axis)

    def block_of(
        self, cache: Shaped[Array, "B *cached"], number: Int32[Array, ""] | int, axis: int = 1
    ) -> Shaped[Array, "B *block"]:
        """The values of a block of slots; `axis` is the axis of the slots."""
        return jax.lax.dynamic_slice_in_dim(cache, number * self.block, self.block, axis)

    def seen(self, number: Int32[Array, ""] | int) -> Bool[Array, "B T block"]:
        """Which slots of a block each new position sees: up to its own, in its document."""
        there = number * self.block + jnp.arange(self.block)
        own = jnp.take_along_axis(self.segments, self.new, axis=1, mode="clip")
        earlier = there[None, None] <= self.new[:, :, None]
        return earlier & (self.block_of(self.segments, number)[:, None] == own[:, :, None])

    def window(
        self, cache: Shaped[Array, "B slots *rest"], reach: int
    ) -> Shaped[Array, "B window *rest"]:
        """The values of the new slots and of the `reach` slots before them.

        Before the first slot and beyond the capacity, they are those of some other slot. For the
        former, `segments_of_window` is −1; the latter are never read.
        """
        slots = jnp.maximum(self._in_window(reach), 0)
        return cache.at[jnp.arange(len(cache))[:, None], slots].get(mode="clip")

    def segments_of_window(self, reach: int) -> Int32[Array, "B window"]:
        """Document numbers of these slots; −1 before the first slot."""
        return jnp.where(self._in_window(reach) >= 0, self.window(self.segments, reach), -1)

    def _in_window(self, reach: int) -> Int32[Array, "B window"]:
        length = reach + self.new.shape[1]
        return self.first[:, None] - reach + jnp.arange(length)[None]


def write(
    cache: Shaped[Array, "B *cached"],
    slots: Int32[Array, "B T"],
    values: Shaped[Array, "B T *rest"],
    axis: int = 1,
) -> Shaped[Array, "B *cached"]:
    """Writes values at their slots. (A slice update would overwrite the last slots when full.)"""
    rows = jnp.arange(len(cache))[:, None]
    places = (rows, *[slice(None)] * (axis - 1), slots)
    return cache.at[places].set(values.astype(cache.dtype), mode="drop", unique_indices=True)
