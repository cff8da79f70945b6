"""The formula of initial rows: equal on host and device, and as good as normal numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.memory.initial_rows import initial_values


def test_the_formula_in_plain_integers_and_known_values() -> None:
    """These values must not change: runs with tables off the device depend on them."""

    def mix(bits: int) -> int:
        bits = (bits ^ bits >> 16) * 0x7FEB352D % 2**32
        bits = (bits ^ bits >> 15) * 0x846CA68B % 2**32
        return bits ^ bits >> 16

    def plain(place: int, element: int, seed: int, layer: int) -> int:
        stream = mix((mix(seed) + layer) % 2**32)
        keys = [mix((stream + number * 0x9E3779B9) % 2**32) for number in (0, element + 1)]
        return sum(mix(mix(place ^ keys[0]) ^ keys[1]).to_bytes(4)) - 510

    seed, layer, places = 2**32 - 1, 14, [0, 1, 2**31 - 1]
    expected = [[plain(place, element, seed, layer) for element in range(3)] for place in places]
    assert expected == [[168, -62, -41], [188, -127, 153], [-279, -35, -59]]
    found = initial_values(np.array(places, np.int32), 3, seed=seed, layer=layer, scale=0.02)
    np.testing.assert_array_equal(found, np.float32(9081 * 2.0**-26) * np.float32(expected))


@pytest.mark.parametrize("scale", [0.02, 1.0, 0.3, 1e-20])
def test_host_and_device_have_equal_bits_for_any_shape_and_fusion(scale: float) -> None:
    places = np.random.default_rng(0).integers(0, 2**31, 4099).astype(np.int32)
    host = initial_values(places, 7, seed=5, layer=2, scale=scale)

    @jax.jit
    def fused(places: jax.Array, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        """With a sum after the product, which a compiler may fuse to one rounding."""
        values = initial_values(places, 7, seed=seed, layer=2, scale=scale)
        return values, values + jnp.float32(scale / 3)

    values, moved = fused(jnp.asarray(places), jnp.uint32(5))
    np.testing.assert_array_equal(values, host)
    np.testing.assert_array_equal(moved, host + np.float32(scale / 3))
    assert abs(host.std() / scale - 1) < 0.02


def test_moments_tails_and_independence() -> None:
    """10⁶ values of consecutive places; bounds are 4 to 5 standard errors of normal numbers."""
    values = initial_values(np.arange(125_000, dtype=np.int32), 8, seed=0, layer=1, scale=1.0)
    count = values.size
    assert abs(values.mean(dtype=np.float64)) < 4 / count**0.5
    assert abs(values.std(dtype=np.float64) - 1) < 4 / count**0.5
    assert 3.0 < np.abs(values).max() < 3.451
    assert abs((values.astype(np.float64) ** 4).mean() - (3 - 0.3)) < 0.03
    others = {
        "element": np.roll(values, 1, axis=1),
        "place": np.roll(values, 1, axis=0),
        "place and element": np.roll(np.roll(values, 1, axis=0), 1, axis=1),
        "layer": initial_values(np.arange(125_000, dtype=np.int32), 8, seed=0, layer=2, scale=1.0),
        "seed": initial_values(np.arange(125_000, dtype=np.int32), 8, seed=1, layer=1, scale=1.0),
    }
    for name, other in others.items():
        for power in (1, 2):
            one, two = values.ravel() ** power, other.ravel() ** power
            assert abs(np.corrcoef(one, two)[0, 1]) < 5 / count**0.5, (name, power)
    # Rows of neighbors share no runs of elements.
    assert len(np.unique(values[:, 0])) > 900 and len(np.unique(values[:5000], axis=0)) == 5000
