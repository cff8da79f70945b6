"""RMS normalization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.layers.norms import RMSNorm, normalize


@pytest.mark.parametrize("epsilon", [1e-20, 1e-6, 1.0])
def test_normalizes_the_last_axis(epsilon: float) -> None:
    x = 3 * jax.random.normal(jax.random.key(0), (2, 5, 7))
    x64 = np.asarray(x, np.float64)
    expected = x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + epsilon)
    np.testing.assert_allclose(normalize(x, epsilon), expected, rtol=2e-6)


def test_gains_are_per_branch_and_channel() -> None:
    norm = RMSNorm(3, 4, epsilon=1e-6)
    gain = jax.random.normal(jax.random.key(1), (3, 4))
    norm.gain.set_value(gain)
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 4))
    expected = np.asarray(normalize(x, 1e-6)) * np.asarray(gain)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-6)
    centered = RMSNorm(3, 4, epsilon=1e-6, zero_centered=True)
    centered.gain.set_value(gain - 1)
    np.testing.assert_allclose(centered(x), norm(x), rtol=1e-5, atol=1e-6)


def test_zeros_stay_zero_with_a_finite_gradient() -> None:
    norm = RMSNorm(6, epsilon=1e-20)
    x = jnp.zeros((1, 6))
    np.testing.assert_array_equal(norm(x), 0)
    assert np.isfinite(jax.grad(lambda x: norm(x).sum())(x)).all()


def test_bfloat16_is_normalized_in_float32() -> None:
    norm = RMSNorm(512)
    x = (100 * jax.random.normal(jax.random.key(0), (4, 512))).astype(jnp.bfloat16)
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))
