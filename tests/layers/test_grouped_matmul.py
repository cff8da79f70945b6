"""Grouped products compared with a loop over groups in float64, and their costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.layers.grouped_matmul import block_size, grouped_matmul, padded_rows
from engram_jax.sharding import MeshConfig, make_mesh

# Empty groups at the ends and between; padding rows; no rows at all.
SIZES = [[4, 0, 8, 12], [0, 24, 0, 0], [8, 4, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("block", [None, 1, 4])
def test_every_row_meets_its_groups_matrix(sizes: list[int], block: int | None) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x, matrices, cotangent = (
        jax.random.normal(k, s) for k, s in zip(keys, [(24, 5), (4, 5, 3), (24, 3)], strict=True)
    )
    found, pullback = jax.vjp(
        lambda x, m: grouped_matmul(x, m, jnp.array(sizes, jnp.int32), block), x, matrices
    )
    x_gradient, matrices_gradient = pullback(cotangent)

    x, matrices, cotangent = (np.asarray(a, np.float64) for a in (x, matrices, cotangent))
    group = np.repeat(np.arange(4), sizes)
    out, into_x, into_matrices = (np.zeros(s) for s in ((24, 3), (24, 5), (4, 5, 3)))
    for row, g in enumerate(group):
        out[row] = x[row] @ matrices[g]
        into_x[row] = matrices[g] @ cotangent[row]
        into_matrices[g] += np.outer(x[row], cotangent[row])
    np.testing.assert_allclose(found, out, atol=1e-5)
    np.testing.assert_allclose(x_gradient, into_x, atol=1e-5)
    np.testing.assert_allclose(matrices_gradient, into_matrices, atol=1e-5)


@pytest.mark.parametrize("block", [None, 4])
def test_rows_of_no_group_may_hold_anything(block: int | None) -> None:
    x = jnp.ones((12, 2)).at[8:].set(jnp.nan)
    sizes = jnp.array([4, 4], jnp.int32)
    found, pullback = jax.vjp(
        lambda x, m: grouped_matmul(x, m, sizes, block), x, jnp.ones((2, 2, 3))
    )
    assert not np.any(found[8:])
    x_gradient, matrices_gradient = pullback(jnp.ones((12, 3)).at[8:].set(jnp.inf))
    assert not np.any(x_gradient[8:])
    np.testing.assert_allclose(matrices_gradient, np.full((2, 2, 3), 4.0))


def test_a_matrix_gradient_is_summed_over_its_blocks_in_float32() -> None:
    """A running bfloat16 sum of 1024 times ⅓ stops at 128, where ⅓ is below half of a step."""
    x = jnp.full((1024, 1), 1 / 3, jnp.bfloat16)
    sizes = jnp.array([1024], jnp.int32)

    def total(matrices: jax.Array) -> jax.Array:
        return jnp.sum(grouped_matmul(x, matrices, sizes, 1).astype(jnp.float32))

    gradient = jax.grad(total)(jnp.ones((1, 1, 1), jnp.bfloat16))
    np.testing.assert_allclose(np.float32(gradient), 1024 * float(x[0, 0]), rtol=2**-8)


@pytest.mark.parametrize(("rows", "groups"), [(8192, 16), (24_576, 72), (640, 8), (6, 72), (1, 1)])
def test_any_sizes_fit_the_padded_rows(rows: int, groups: int) -> None:
    block = block_size(rows, groups, "blocks")
    bound = padded_rows(rows, groups, block)
    assert bound % block == 0
    assert bound <= 1.3 * rows
    generator = np.random.default_rng(0)
    even = np.bincount(np.arange(rows) % groups, minlength=groups)
    drawn = np.bincount(generator.integers(0, groups, rows), minlength=groups)
    # The worst case: all groups except one have a block with a single row.
    ones = np.minimum(1, np.arange(groups) < rows)
    worst = ones + (rows - ones.sum()) * (np.arange(groups) == 0)
    for sizes in (even, drawn, worst):
        assert sizes.sum() == rows
        assert (-(-sizes // block) * block).sum() <= bound
    assert padded_rows(rows, groups, block_size(rows, groups, "ragged")) == rows


def test_the_platform_of_the_mesh_picks() -> None:
    assert block_size(640, 8, None) == block_size(640, 8, "blocks") is not None
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert block_size(640, 8, None) is not None
    tpu = jax.sharding.AbstractDevice("TPU v5", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=tpu)
    with jax.sharding.use_abstract_mesh(mesh):
        assert block_size(640, 8, None) is None
