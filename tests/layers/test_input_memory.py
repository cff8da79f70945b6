"""OverEncoding is the mean of N embeddings; added rows are a sum."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engram_jax.layers.input_memory import AddedRows, OverEncoding


def test_averages_the_token_and_one_projection_per_order() -> None:
    layer = OverEncoding(5, 12, 3, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    embedding = jax.random.normal(jax.random.key(0), (2, 4, 5))
    memory = jax.random.normal(jax.random.key(1), (2, 4, 12))
    total = np.asarray(embedding, np.float64)
    for order in range(3):
        rows = np.asarray(memory, np.float64)[..., 4 * order : 4 * order + 4]
        total = total + rows @ np.asarray(layer.projection[order], np.float64)
    np.testing.assert_allclose(layer(embedding, memory), total / 4, rtol=1e-5, atol=1e-6)


def test_rows_of_zeros_leave_the_scaled_embedding() -> None:
    layer = OverEncoding(5, 8, 2, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    embedding = jax.random.normal(jax.random.key(0), (2, 4, 5))
    found = layer(embedding, jnp.zeros((2, 4, 8)))
    np.testing.assert_allclose(found, np.asarray(embedding) / 3, rtol=1e-6)


def test_added_rows_are_summed_scaled_by_channel_and_added() -> None:
    layer = AddedRows(5)
    layer.scale[...] = jnp.arange(5.0)
    embedding = jax.random.normal(jax.random.key(0), (2, 4, 5))
    memory = jax.random.normal(jax.random.key(1), (2, 4, 10))
    rows = np.asarray(memory)
    expected = np.asarray(embedding) + (rows[..., :5] + rows[..., 5:]) * np.arange(5)
    np.testing.assert_allclose(layer(embedding, memory), expected, rtol=1e-5)
    np.testing.assert_array_equal(layer(embedding, None), embedding)
