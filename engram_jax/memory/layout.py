"""What a table is made of: the rows and their optimizer state, and how they start."""

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


@no_type_check  # at run time: as a pytree it also holds shapes and shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Table:
    """One layer's table with its row-wise Adam state.

    Attributes:
        rows: the embeddings, row number = head offset + hash.
        mean: first moment of every row's gradient.
        square: second moment.
        count: updates every row has received; lazy Adam corrects its bias with it.
    """

    rows: Float[Array, "R F"]
    mean: Float[Array, "R F"]
    square: Float[Array, "R F"]
    count: Int32[Array, "R"]


def init_table(key: Array, rows: int, width: int, scale: float) -> Table:
    """A table of normally distributed rows with standard deviation `scale`; 0 starts at zero.

    Args:
        key: JAX random key.
        rows: padded number of rows R.
        width: row width F.
        scale: standard deviation of every element.
    """
    shape = (rows, width)
    values = scale * jax.random.normal(key, shape) if scale else jnp.zeros(shape)
    return Table(values, jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(rows, jnp.int32))
