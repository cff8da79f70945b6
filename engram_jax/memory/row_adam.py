"""Adam on the rows that a step touched, and on no other.

This is *lazy* Adam: a row's moments and its update count change only when the row is touched, so
an idle row neither decays nor drifts. It is not dense Adam, which moves idle rows by momentum.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from engram_jax.errors import InputError
from engram_jax.memory.layout import Table
from engram_jax.memory.lookup import gather_rows
from engram_jax.sharding import extend_spec


@dataclass(frozen=True)
class RowAdam:
    """Hyperparameters of the row optimizer.

    Attributes:
        factor: learning rate relative to the network's (paper: 5).
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
    """

    factor: float = 5.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.eps > 0):
            raise InputError("b1 and b2 must be at least 0 and below 1, and eps positive.")


def update_rows(
    table: Table,
    rows: Int32[Array, "U"],
    gathered: Float[Array, "U F"],
    gradient: Float[Array, "U F"],
    learning_rate: Float[Array, ""],
    adam: RowAdam,
) -> Table:
    """One lazy Adam step on distinct rows; bias correction by each row's own count.

    Args:
        table: the table; donate it, so that it is updated in place.
        rows: distinct ascending row numbers; those from R up are padding and are dropped.
        gathered: the rows' values, as read for the forward pass.
        gradient: one gradient per row, summed over its uses.
        learning_rate: the network's learning rate of this step.
        adam: hyperparameters.
    """
    count = gather_rows(table.count, rows) + 1
    mean = adam.b1 * gather_rows(table.mean, rows) + (1 - adam.b1) * gradient
    square = adam.b2 * gather_rows(table.square, rows) + (1 - adam.b2) * gradient**2
    corrected_mean = _correct_bias(mean, adam.b1, count)
    corrected_square = _correct_bias(square, adam.b2, count)
    step = corrected_mean / (jnp.sqrt(corrected_square) + adam.eps)
    return Table(
        rows=_scatter_rows(table.rows, rows, gathered - adam.factor * learning_rate * step),
        mean=_scatter_rows(table.mean, rows, mean),
        square=_scatter_rows(table.square, rows, square),
        count=_scatter_rows(table.count, rows, count),
    )


def _correct_bias(
    moment: Float[Array, "U F"], decay: float, count: Int32[Array, "U"]
) -> Float[Array, "U F"]:
    """moment / (1 − decay^count); expm1, as 1 − 0.999 in float32 is off by 1e-5 of itself."""
    if decay == 0:
        return moment
    return moment / -jnp.expm1(count * math.log(decay))[:, None]


def _scatter_rows(
    column: Shaped[Array, "R *F"], rows: Int32[Array, "U"], values: Shaped[Array, "U *F"]
) -> Shaped[Array, "R *F"]:
    return column.at[rows].set(
        values,
        mode="drop",
        indices_are_sorted=True,
        unique_indices=True,
        out_sharding=extend_spec(column),
    )
