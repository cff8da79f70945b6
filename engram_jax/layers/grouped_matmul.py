"""Products of rows with the matrix of their group, for rows that lie group after group.

y_r = x_r · M_{g(r)}, the one operation of a mixture of experts that a dense layer lacks. Blocks of
rows that share a matrix are MegaBlocks' (arXiv 2211.15841).
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from engram_jax.sharding import platform_of

type GroupedImplementation = Literal["ragged", "blocks"]

# Rows that padding may add, relative to the rows there are. More would waste products; fewer make
# blocks smaller, and every block copies a matrix.
_PADDING = 0.25


def block_size(rows: int, groups: int, implementation: GroupedImplementation | None) -> int | None:
    """Rows that the groups must be multiples of; None: any, for "ragged".

    Args:
        rows: rows of all groups together.
        groups: how many groups there are.
        implementation: "ragged" is XLA's ragged dot, a kernel on TPU, while CPUs multiply all rows
            with all matrices; "blocks" is a batch of products; None takes "ragged" on TPU, "blocks"
            elsewhere.
    """
    platform = platform_of(jax.sharding.get_abstract_mesh())
    if (implementation or ("ragged" if platform == "tpu" else "blocks")) == "ragged":
        return None
    block = 1 + int(_PADDING * rows / groups)
    return block // 8 * 8 if block > 8 else block


def padded_rows(rows: int, groups: int, block: int | None) -> int:
    """Rows that suffice for any sizes of the groups once each is padded to whole blocks."""
    if block is None:
        return rows
    return (rows + min(rows, groups) * (block - 1)) // block * block


def grouped_matmul(
    x: Float[Array, "rows D"],
    matrices: Float[Array, "X D W"],
    sizes: Int32[Array, "X"],
    block: int | None,
) -> Float[Array, "rows W"]:
    """Multiplies every row with the matrix of its group; rows behind the last group become zero.

    Args:
        x: rows, group after group.
        matrices: one for every group.
        sizes: rows of every group, which may be none; multiples of `block`.
        block: of `block_size`; None is "ragged".
    """
    # On the way in and out: in rows of no group, and in their gradients, a kernel leaves anything.
    grouped = (jnp.arange(len(x)) < jnp.sum(sizes))[:, None]
    x = jnp.where(grouped, x, 0)
    multiply = jax.lax.ragged_dot if block is None else partial(_multiply_blocks, block=block)
    return jnp.where(grouped, multiply(x, matrices, sizes), 0)


def _multiply_blocks(
    x: Float[Array, "rows D"], matrices: Float[Array, "X D W"], sizes: Int32[Array, "X"], block: int
) -> Float[Array, "rows W"]:
    begins = jnp.arange(0, len(x), block)
    group = jnp.sum(begins[:, None] >= jnp.cumsum(sizes)[None], axis=1)
    # Through float32, in which the gradients of a matrix's blocks are then summed.
    gathered = matrices.astype(jnp.float32).at[group].get(mode="clip", indices_are_sorted=True)
    blocks = x.reshape(-1, block, x.shape[1])
    return jnp.einsum("nbd,ndw->nbw", blocks, gathered.astype(x.dtype)).reshape(len(x), -1)
