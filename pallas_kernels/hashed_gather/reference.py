"""The definition of the gather: indexing, with JAX's own gradient (a scatter-add)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, Num, UInt32

from pallas_kernels.hashed_gather.format import RowFormat


def read(
    table: UInt32[Array, "R words"], numbers: Int32[Array, "n H"], form: RowFormat
) -> Num[Array, "n E"]:
    """The decoded rows, H rows next to each other."""
    rows = form.decode(table[:, : form.words])[numbers]
    inside = (numbers >= 0) & (numbers < len(table))
    return jnp.where(inside[..., None], rows, 0).reshape(len(numbers), -1)


def expand(
    values: Float[Array, "U F"], slots: Int[Array, "n H"], order: Int[Array, "m"]
) -> Float[Array, "n E"]:
    """values[slots]; `order` is not used."""
    del order
    return values[slots].reshape(len(slots), -1)
