"""Hyper-connections compared with the paper's formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from lively import enliven

from engram_jax.errors import InputError
from engram_jax.layers.hyper_connections import (
    HyperConnection,
    HyperConnectionsConfig,
    column_error,
    read,
    sinkhorn,
    write,
)

BRANCHES, WIDTH = 3, 8


def make_connection(scale: float = 0.5) -> HyperConnection:
    config = HyperConnectionsConfig(branches=BRANCHES, scale=scale)
    graph, params = nnx.split(HyperConnection(WIDTH, config, rngs=nnx.Rngs(0)))
    return nnx.merge(graph, enliven(params))


def draw_stream(seed: int = 1) -> Array:
    return jax.random.normal(jax.random.key(seed), (2, 5, BRANCHES, WIDTH))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def mappings_in_numpy(
    connection: HyperConnection, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mappings of one token, in float64."""
    p = {
        name: np.asarray(getattr(connection, name)[...], np.float64)
        for name in ("projection", "scale", "pre_bias", "post_bias", "mix_bias")
    }
    flat = x.reshape(-1)
    normalized = flat / np.sqrt(np.mean(flat**2) + connection.config.norm_epsilon)
    projected = normalized @ p["projection"].reshape(BRANCHES * WIDTH, -1)
    pre = sigmoid(p["scale"][0] * projected[:BRANCHES] + p["pre_bias"])
    post = 2 * sigmoid(p["scale"][1] * projected[BRANCHES : 2 * BRANCHES] + p["post_bias"])
    mix = p["scale"][2] * projected[2 * BRANCHES :].reshape(BRANCHES, BRANCHES) + p["mix_bias"]
    mix = np.exp(mix)
    for _ in range(connection.config.sinkhorn_iterations):
        mix /= mix.sum(axis=0)
        mix /= mix.sum(axis=1)[:, None]
    return pre, post, mix


def test_a_layer_reads_and_writes_as_in_the_paper() -> None:
    connection, x = make_connection(), draw_stream()
    y = jax.random.normal(jax.random.key(2), (2, 5, WIDTH))
    mappings = connection(x)
    seen, after = read(x, mappings), write(x, y, mappings)
    for row, t in np.ndindex(2, 5):
        stream = np.asarray(x[row, t], np.float64)
        pre, post, mix = mappings_in_numpy(connection, stream)
        np.testing.assert_allclose(mappings.pre[row, t], pre, rtol=2e-6)
        np.testing.assert_allclose(mappings.post[row, t], post, rtol=2e-6)
        np.testing.assert_allclose(mappings.mix[row, t], mix, rtol=2e-5)
        np.testing.assert_allclose(seen[row, t], pre @ stream, atol=2e-6)
        expected = mix @ stream + np.outer(post, np.asarray(y[row, t]))
        np.testing.assert_allclose(after[row, t], expected, atol=5e-6)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 2e-6), ("bfloat16", 4e-3)])
def test_gradients_of_writing_are_those_of_the_formula(dtype: str, error: float) -> None:
    connection, x = make_connection(), draw_stream().astype(dtype)
    y, g = draw_stream(2)[:, :, 0].astype(dtype), draw_stream(3).astype(dtype)
    mappings = connection(x)
    of_x, of_y, of_mappings = jax.vjp(write, x, y, mappings)[1](g)
    assert of_x.dtype == of_y.dtype == dtype
    x, y, g, mix, post = (
        np.asarray(part, np.float64) for part in (x, y, g, mappings.mix, mappings.post)
    )
    for found, formula, inputs in (
        (of_x, "btmn,btmd->btnd", (mix, g)),
        (of_y, "btm,btmd->btd", (post, g)),
        (of_mappings.mix, "btmd,btnd->btmn", (g, x)),
        (of_mappings.post, "btmd,btd->btm", (g, y)),
    ):
        expected = np.einsum(formula, *inputs)
        largest = np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=error * largest)


def test_every_parameter_gets_a_gradient() -> None:
    graph, params = nnx.split(make_connection())
    x, y = draw_stream(), draw_stream(3)[:, :, 0]

    def loss(params: nnx.State) -> Array:
        mappings = nnx.merge(graph, params)(x)
        return jnp.sum(write(x, y + read(x, mappings), mappings) ** 3)

    gradient = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(gradient)):
        assert np.all(np.isfinite(leaf)) and np.any(leaf), jax.tree_util.keystr(path)


def test_it_starts_as_an_ordinary_residual_connection() -> None:
    """With equal branches, as at the start, a layer reads the branch and adds to each branch."""
    config = HyperConnectionsConfig(branches=BRANCHES, scale=0.0)
    connection = HyperConnection(WIDTH, config, rngs=nnx.Rngs(0))
    one, y = draw_stream()[:, :, :1], draw_stream(3)[:, :, 0]
    x = jnp.repeat(one, BRANCHES, axis=2)
    mappings = connection(x)
    np.testing.assert_allclose(read(x, mappings), one[:, :, 0], atol=1e-6)
    np.testing.assert_allclose(write(x, y, mappings), x + y[:, :, None], atol=2e-6)
    weights = np.asarray(mappings.pre[0, 0])
    assert len(np.unique(weights.round(4))) == BRANCHES  # otherwise the branches would stay equal


@pytest.mark.parametrize("branches", [2, 4, 8])
def test_mixing_is_doubly_stochastic(branches: int) -> None:
    logits = jax.random.uniform(jax.random.key(0), (500, branches, branches), minval=-1, maxval=1)
    mix = np.asarray(sinkhorn(logits, 20))
    assert (mix > 0).all()
    np.testing.assert_allclose(mix.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(mix.sum(axis=-2), 1, atol=1e-3)
    # With few iterations and large logits there is an error, so `column_error` measures it.
    hasty = sinkhorn(5 * logits, 1)
    error = np.abs(np.asarray(hasty).sum(axis=-2) - 1).max()
    assert error > 0.05
    np.testing.assert_allclose(column_error(hasty), error, rtol=1e-5)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([[200.0, 0.0], [0.0, 200.0]], 1.0),
        # A common factor of a column or a row has no effect.
        ([[-150.0, 0.0], [-150.0, 0.0]], 0.5),
        ([[-150.0, -150.0], [0.0, 0.0]], 0.5),
    ],
)
def test_logits_far_apart_stay_finite(logits: list[list[float]], expected: float) -> None:
    value, gradient = jax.value_and_grad(lambda x: sinkhorn(x, 20)[0, 0])(jnp.array(logits))
    assert np.isclose(value, expected) and np.isfinite(gradient).all()


@pytest.mark.parametrize("lift", [0.0, 60.0])
def test_sinkhorns_gradient_is_that_of_the_plain_formula(lift: float) -> None:
    """The scaling factors have no gradient. The first row is `lift` below the others."""

    def plain(logits: Array) -> Array:
        mix = jnp.exp(logits)
        for _ in range(20):
            mix /= mix.sum(axis=-2, keepdims=True)
            mix /= mix.sum(axis=-1, keepdims=True)
        return mix

    low = lift * jnp.eye(1, 4)[..., None]
    logits = 2 * jax.random.normal(jax.random.key(0), (50, 4, 4)) - low
    cotangent = jax.random.normal(jax.random.key(1), logits.shape)
    with jax.enable_x64(True):
        expected, pull_back = jax.vjp(plain, logits.astype(jnp.float64))
        (of_plain,) = pull_back(cotangent.astype(jnp.float64))
    found, pull_back = jax.vjp(lambda x: sinkhorn(x, 20), logits)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(pull_back(cotangent)[0], of_plain, atol=2e-6)


def test_no_gradient_goes_through_a_maximum() -> None:
    """That gradient divides by the number of entries equal to the maximum, which can become 0."""
    gradient = jax.make_jaxpr(jax.grad(lambda x: sinkhorn(x, 2)[0, 0]))(jnp.eye(2))
    used = {equation.primitive.name for equation in gradient.eqns}
    assert "reduce_max" in used and "eq" not in used


def test_a_bfloat16_stream_keeps_its_dtype_and_float32_coefficients() -> None:
    connection, x = make_connection(), draw_stream()
    half = x.astype(jnp.bfloat16)
    mappings = connection(half)
    assert all(part.dtype == jnp.float32 for part in mappings)
    seen = read(half, mappings)
    after = write(half, seen, mappings)
    assert seen.dtype == after.dtype == jnp.bfloat16
    expected = read(x, connection(x))
    np.testing.assert_allclose(seen.astype(jnp.float32), expected, atol=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_backward_pass_keeps_no_copy_of_the_stream_in_another_dtype(dtype: str) -> None:
    connection, x = make_connection(), draw_stream().astype(dtype)

    def run(x: Array) -> Array:
        mappings = connection(x)
        return write(x, jnp.tanh(read(x, mappings)), mappings)

    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(run, x)[1], x))
    assert {leaf.dtype.name for leaf in kept if leaf.size == x.size} == {dtype}


@pytest.mark.parametrize("change", [{"branches": 1}, {"sinkhorn_iterations": 0}])
def test_impossible_sizes_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least"):
        HyperConnectionsConfig(**change)
