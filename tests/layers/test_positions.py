"""Rotary embedding: against complex numbers, and its relative property."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.layers.positions import rotate


def rotate_in_complex(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    angles = positions[:, :, None, None] * theta ** (-np.arange(half) / half)
    turned = pairs * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize(("width", "theta"), [(2, 10_000.0), (16, 10_000.0), (8, 50.0)])
def test_pairs_turn_by_their_angles(width: int, theta: float) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 9, 3, width))
    positions = jax.random.randint(jax.random.key(1), (2, 9), 0, 300)
    expected = rotate_in_complex(np.asarray(x, np.float64), np.asarray(positions), theta)
    # An angle of 300 has an error of 300·2⁻²⁴ ≈ 2e-5 in float32, and x reaches 4.
    np.testing.assert_allclose(rotate(x, positions, theta), expected, atol=1e-4)


def test_products_depend_on_the_distance_alone() -> None:
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 2, 8))

    def product(at: int, other: int) -> np.ndarray:
        turned = [
            rotate(x, jnp.full((1, 1), position, jnp.int32), 100.0)
            for x, position in ((query, at), (key, other))
        ]
        return np.asarray(jnp.sum(turned[0] * turned[1], axis=-1))

    np.testing.assert_allclose(product(9, 4), product(105, 100), atol=1e-4)
    np.testing.assert_allclose(product(3, 3), jnp.sum(query * key, axis=-1), atol=1e-5)
    assert np.abs(product(9, 4) - product(9, 5)).max() > 1e-2


def test_position_zero_stays_and_lengths_are_kept() -> None:
    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
    turned = rotate(x, jnp.arange(6, dtype=jnp.int32)[None], 10_000.0)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )


def test_bfloat16_is_turned_in_float32() -> None:
    """At position 5,000 a bfloat16 angle would be off by 16 radians."""
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, 8)).astype(jnp.bfloat16)
    positions = jnp.full((1, 1), 5_001, jnp.int32)
    turned = rotate(x, positions, 10_000.0)
    assert turned.dtype == jnp.bfloat16
    expected = rotate(x.astype(jnp.float32), positions, 10_000.0)
    np.testing.assert_array_equal(turned, expected.astype(jnp.bfloat16))
