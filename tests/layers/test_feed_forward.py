"""SwiGLU compared with float64."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lively import enliven

from engram_jax.layers.feed_forward import FeedForward


def test_is_swiglu() -> None:
    layer = FeedForward(6, 10, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    nnx.update(layer, enliven(nnx.state(layer)))
    x = jax.random.normal(jax.random.key(0), (2, 3, 6))
    x64, gate, up, down = (
        np.asarray(a, np.float64) for a in (x, layer.gate[...], layer.up[...], layer.down[...])
    )
    gated = x64 @ gate
    expected = (gated / (1 + np.exp(-gated)) * (x64 @ up)) @ down
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_computes_in_the_asked_dtype_from_float32_parameters() -> None:
    layer = FeedForward(6, 10, dtype=jnp.dtype("bfloat16"), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 6))
    assert layer.gate.dtype == jnp.float32
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
