"""Grouped matrix product: every row is multiplied with the matrix of its group.

y_r = x_r · M_{g(r)}, for rows that are ordered by group. It is the one operation of a mixture of
experts that a dense layer does not have. Blocks of rows that share a matrix are from MegaBlocks
(arXiv 2211.15841).
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from engram_jax.sharding import platform_of

type GroupedImplementation = Literal["ragged", "blocks"]

# The largest number of rows that padding adds, relative to the rows without it. A larger value
# wastes products. A smaller value gives smaller blocks, and every block copies a matrix.
_PADDING = 0.25


def block_size(rows: int, groups: int, implementation: GroupedImplementation | None) -> int | None:
    """The number of rows in a block: the size of every group must be a multiple of it.

    None means that groups may have any size (for "ragged").

    Args:
        rows: total rows of all groups.
        groups: number of groups.
        implementation: "ragged" is XLA's ragged dot. It is a kernel on TPU; on CPU it multiplies
            all rows with all matrices. "blocks" is a batched product of blocks. None takes "ragged"
            on TPU and "blocks" on other devices.
    """
    platform = platform_of(jax.sharding.get_abstract_mesh())
    if (implementation or ("ragged" if platform == "tpu" else "blocks")) == "ragged":
        return None
    block = 1 + int(_PADDING * rows / groups)
    return block // 8 * 8 if block > 8 else block


def padded_rows(rows: int, groups: int, block: int | None) -> int:
    """An upper bound of the total rows after each group is padded to a multiple of `block`."""
    if block is None:
        return rows
    return (rows + min(rows, groups) * (block - 1)) // block * block


def grouped_matmul(
    x: Float[Array, "rows D"],
    matrices: Float[Array, "X D W"],
    sizes: Int32[Array, "X"],
    block: int | None,
) -> Float[Array, "rows W"]:
    """Multiplies every row with the matrix of its group. Rows after the last group become zero.

    Args:
        x: rows, ordered by group.
        matrices: one per group.
        sizes: number of rows of every group, a multiple of `block`; zero is allowed.
        block: result of `block_size`; None is "ragged".
    """
    # A kernel leaves undefined values in rows without a group, and in their gradients. So those
    # rows are set to zero in both the input and the output.
    grouped = (jnp.arange(len(x)) < jnp.sum(sizes))[:, None]
    x = jnp.where(grouped, x, 0)
    multiply = jax.lax.ragged_dot if block is None else partial(_multiply_blocks, block=block)
    return jnp.where(grouped, multiply(x, matrices, sizes), 0)


def _multiply_blocks(
    x: Float[Array, "rows D"], matrices: Float[Array, "X D W"], sizes: Int32[Array, "X"], block: int
) -> Float[Array, "rows W"]:
    begins = jnp.arange(0, len(x), block)
    group = jnp.sum(begins[:, None] >= jnp.cumsum(sizes)[None], axis=1)
    # Cast to float32 first, so that the gradients of a matrix's blocks are summed in float32.
    gathered = matrices.astype(jnp.float32).at[group].get(mode="clip", indices_are_sorted=True)
    blocks = x.reshape(-1, block, x.shape[1])
    return jnp.einsum("nbd,ndw->nbw", blocks, gathered.astype(x.dtype)).reshape(len(x), -1)
