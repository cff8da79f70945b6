"""The definition of the gather: indexed reads; JAX derives the backward scatter-add."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, Num, UInt32

from pallas_kernels.hashed_gather.format import RowFormat


def read(
    table: UInt32[Array, "R words"], numbers: Int32[Array, "n H"], form: RowFormat
) -> Num[Array, "n E"]:
    """The rows, decoded, side by side."""
    rows = form.decode(table[:, : form.words])[numbers]
    inside = (numbers >= 0) & (numbers < len(table))
    return jnp.where(inside[..., None], rows, 0).reshape(len(numbers), -1)


def expand(
    values: Float[Array, "U F"], slots: Int[Array, "n H"], order: Int[Array, "m"]
) -> Float[Array, "n E"]:
    """values[slots]; `order` is not needed here."""
    del order
    return values[slots].reshape(len(slots), -1)
