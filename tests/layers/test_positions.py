"""Rotary embedding, compared with complex numbers; relative positions; YaRN's frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.layers.positions import YarnConfig, frequencies, rotate


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


@pytest.mark.parametrize(
    ("width", "theta", "config"),
    [
        (64, 10_000.0, YarnConfig()),
        (128, 500_000.0, YarnConfig(scale=4.0, trained_length=8192, slow=2.0, fast=16.0)),
        # Even the first pair makes fewer than 32 rotations over 100 positions.
        (32, 10_000.0, YarnConfig(trained_length=100)),
    ],
)
def test_yarn_divides_slow_pairs_and_keeps_fast_ones(
    width: int, theta: float, config: YarnConfig
) -> None:
    """From the number of rotations of every pair over the trained length."""
    trained = np.array([theta ** (-2 * i / width) for i in range(width // 2)])
    turns = config.trained_length / (2 * np.pi / trained)
    kept = np.flatnonzero(turns >= config.fast)
    first = kept[-1] if len(kept) else 0
    last = np.flatnonzero(turns <= config.slow)[0]
    expected = []
    for i, frequency in enumerate(trained):
        share = np.interp(i, [first, last], [0.0, 1.0])
        expected.append((1 - share) * frequency + share * frequency / config.scale)
    found = frequencies(width, theta, config)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(
        found[: first + 1], frequencies(width, theta)[: first + 1], strict=True
    )
    np.testing.assert_allclose(found[last:] * config.scale, trained[last:], rtol=1e-6)
    assert 0 < first + 1 < last < width // 2


def test_yarns_softmax_factor_is_that_of_the_paper() -> None:
    """Engram §5.1: s = 10 and "factor 0.707"."""
    factor = YarnConfig(scale=10.0, mscale=0.707).softmax_factor
    assert round(factor**0.5, 3) == 1.163
    assert round(factor, 3) == 1.352
    assert YarnConfig(scale=1.0).softmax_factor == 1.0


def test_yarn_turns_pairs_by_its_frequencies() -> None:
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    positions = jnp.arange(5, dtype=jnp.int32)[None] * 100
    config = YarnConfig(scale=4.0, trained_length=256)
    pairs = np.asarray(x[..., :4], np.float64) + 1j * np.asarray(x[..., 4:], np.float64)
    angles = np.asarray(positions)[:, :, None, None] * frequencies(8, 50.0, config)
    turned = pairs * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotate(x, positions, 50.0, config), expected, atol=1e-4)
    assert np.abs(rotate(x, positions, 50.0) - expected).max() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0.5}, "scale"),
        ({"slow": 32.0}, "slow"),
        ({"slow": 0.0}, "slow"),
        ({"trained_length": 6}, "trained_length"),
    ],
)
def test_impossible_stretches_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        YarnConfig(**change)
