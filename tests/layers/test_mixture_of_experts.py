"""The mixture compared with a float64 loop over tokens, a dense computation, and on meshes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from lively import enliven

from engram_jax.errors import InputError
from engram_jax.layers.mixture_of_experts import ExpertsConfig, MixtureOfExperts, balance, route
from engram_jax.parameters import Matrix, roles
from engram_jax.sharding import TOKEN_AXES, MeshConfig, make_mesh

WIDTH, ROUTED = 6, 7
# With this bias, every token chooses the same three experts, and four experts have no token.
EVEN, SKEWED = np.zeros(ROUTED, np.float32), np.float32([9, 0, 0, 9, 9, 0, 0])
BOTH = pytest.mark.parametrize("implementation", ["ragged", "blocks"])
MORE_MESHES = [(2, 1, 4), (1, 2, 4), (2, 4, 1)]
LOADS = pytest.mark.parametrize("bias", [EVEN, SKEWED], ids=["even", "skewed"])


def make_layer(dtype: str = "float32", **changes: Any) -> MixtureOfExperts:
    config = ExpertsConfig(**({"routed": ROUTED, "active": 3, "width": 5, "shared": 1} | changes))
    layer = MixtureOfExperts(WIDTH, config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    nnx.update(layer, enliven(nnx.state(layer)))
    return layer


def draw(seed: int = 0, rows: int = 8, length: int = 4) -> Array:
    return jax.random.normal(jax.random.key(seed), (rows, length, WIDTH))


@nnx.jit
def apply(layer: MixtureOfExperts, x: Array, bias: Array) -> tuple[Array, Array]:
    return layer(x, bias)


@nnx.jit
def differentiate(
    layer: MixtureOfExperts, x: Array, bias: Array, cotangent: Array
) -> tuple[Array, Array, dict[str, Any]]:
    """Output, load, and all gradients by name."""
    graph, state = nnx.split(layer)

    def output(state: nnx.State, x: Array, bias: Array) -> tuple[Array, Array]:
        return nnx.merge(graph, state)(x, bias)

    y, pullback, load = jax.vjp(output, state, x, bias, has_aux=True)
    of_state, of_x, of_bias = pullback(cotangent)
    return y, load, nnx.to_pure_dict(of_state) | {"x": of_x, "bias": of_bias}


def assert_close(found: Any, expected: Any, atol: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), found, expected)


def swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    gated = x @ gate
    return (gated / (1 + np.exp(-gated)) * (x @ up)) @ down


def mix_in_float64(
    layer: MixtureOfExperts, x: Array, bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Loops over tokens and experts."""
    x, router, gate, up, down = (
        np.asarray(a[...], np.float64) for a in (x, layer.router, layer.gate, layer.up, layer.down)
    )
    shared = [np.asarray(w[...], np.float64) for w in (layer.shared.gate, layer.shared.up)]
    shared.append(np.asarray(layer.shared.down[...], np.float64))
    y, load = np.zeros(x.shape), np.zeros(len(bias), int)
    for b, t in np.ndindex(x.shape[:2]):
        affinity = 1 / (1 + np.exp(-x[b, t] @ router))
        chosen = np.argsort(-(affinity + bias))[: layer.config.active]
        for e in chosen:
            weight = affinity[e] / affinity[chosen].sum()
            y[b, t] += weight * swiglu(x[b, t], gate[e], up[e], down[e])
            load[e] += 1
        y[b, t] += swiglu(x[b, t], *shared)
    return y, load


@jax.jit
def mix_densely(state: dict[str, Any], x: Array, bias: Array) -> Array:
    """All experts for all tokens, weighted by one-hot choices; differentiated by JAX."""
    affinity = jax.nn.sigmoid(jnp.einsum("btd,dx->btx", x, state["router"]))
    _, chosen = jax.lax.top_k(affinity + bias[None, None], 3)
    weights = affinity * jnp.sum(jax.nn.one_hot(chosen, ROUTED), axis=2)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    hidden = jax.nn.silu(jnp.einsum("btd,xdw->btxw", x, state["gate"][:ROUTED]))
    hidden = hidden * jnp.einsum("btd,xdw->btxw", x, state["up"][:ROUTED])
    routed = jnp.einsum("btx,btxw,xwd->btd", weights, hidden, state["down"][:ROUTED])
    shared = state["shared"]
    hidden = jax.nn.silu(x @ shared["gate"]) * (x @ shared["up"])
    return routed + hidden @ shared["down"]


@BOTH
@LOADS
def test_is_the_weighted_sum_of_the_chosen_experts(implementation: str, bias: np.ndarray) -> None:
    """Also if all tokens choose the same experts: no token is dropped; some experts have none."""
    layer, x = make_layer(implementation=implementation), draw()
    y, load = apply(layer, x, jnp.asarray(bias))
    expected, counts = mix_in_float64(layer, x, bias)
    np.testing.assert_allclose(y, expected, atol=2e-6)
    np.testing.assert_array_equal(load, counts)
    assert load.sum() == 3 * x.shape[0] * x.shape[1]


@BOTH
@LOADS
def test_gradients_are_those_of_a_dense_mixture(implementation: str, bias: np.ndarray) -> None:
    layer, x, cotangent = make_layer(implementation=implementation), draw(), draw(1)
    _, _, found = differentiate(layer, x, jnp.asarray(bias), cotangent)
    state = nnx.to_pure_dict(nnx.state(layer))
    _, pullback = jax.vjp(lambda s, x: mix_densely(s, x, jnp.asarray(bias)), state, x)
    of_state, of_x = pullback(cotangent)
    assert np.abs(of_state["router"]).max() > 1e-3
    assert_close(found, of_state | {"x": of_x, "bias": EVEN}, atol=5e-6)


def test_the_bias_chooses_but_does_not_weigh() -> None:
    x, router = draw()[0], make_layer().router[...]
    (chosen, weights), pullback = jax.vjp(lambda b: route(x, router, b, 3), jnp.asarray(SKEWED))
    assert all(set(row) == {0, 3, 4} for row in np.asarray(chosen))
    affinity = 1 / (1 + np.exp(-np.asarray(x, np.float64) @ np.asarray(router, np.float64)))
    expected = np.take_along_axis(affinity, np.asarray(chosen), axis=1)
    np.testing.assert_allclose(weights, expected / expected.sum(1, keepdims=True), rtol=1e-5)
    zero = np.zeros(chosen.shape, jax.dtypes.float0)
    assert not np.any(pullback((zero, jnp.ones_like(weights)))[0])


@pytest.mark.parametrize("shift", [0, 40, 50, 100, 1000])
def test_affinities_that_vanish_still_weigh(shift: float) -> None:
    """Far below 0, the sigmoid is an exponential, so a common shift has no effect."""
    router = jnp.array([[0.0, 1.0, -1.0], [-1.0, -1.0, -1.0]])

    def weigh(router: Array) -> Array:
        return route(jnp.array([[1.0, 30 + shift]]), router, jnp.array([0.5, 0.0, -1.0]), 2)[1][0]

    weights, slope = weigh(router), jax.jacobian(weigh)(router)[0]
    expected = 1 / (1 + np.exp(1))
    np.testing.assert_allclose(weights, [expected, 1 - expected], rtol=1e-5)
    variance = expected * (1 - expected)
    np.testing.assert_allclose(slope[0, :2], [variance, -variance], rtol=1e-5)
    assert np.all(np.isfinite(slope))


def test_the_router_learns_also_where_a_token_has_one_expert() -> None:
    layer, x, bias = make_layer(active=1), draw(), jnp.asarray(EVEN)
    chosen, weights = route(x[0], layer.router[...], bias, 1)
    logits = np.asarray(x[0] @ layer.router[...], np.float64)
    expected = np.take_along_axis(1 / (1 + np.exp(-logits)), np.asarray(chosen), axis=1)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    _, _, found = differentiate(layer, x, bias, draw(1))
    assert np.abs(found["router"]).max() > 1e-3


@pytest.mark.parametrize("bias", [np.zeros(5, np.float32), np.float32([-9, 0, 9, 0, -9])])
def test_padding_experts_are_as_if_they_were_not(bias: np.ndarray) -> None:
    padded, plain = make_layer(routed=5, multiple=4), make_layer(routed=5)
    assert padded.gate.shape[0] == padded.down.shape[0] == 8
    state = nnx.to_pure_dict(nnx.state(plain))
    stacks = {
        name: getattr(padded, name)[...].at[:5].set(state[name]) for name in ("gate", "up", "down")
    }
    nnx.update(padded, state | stacks)
    arguments = draw(), jnp.asarray(bias), draw(1)
    y, load, gradients = differentiate(padded, *arguments)
    expected_y, expected_load, expected = differentiate(plain, *arguments)
    assert load.shape == (5,)
    np.testing.assert_array_equal(load, expected_load)
    np.testing.assert_allclose(y, expected_y, atol=1e-6)
    for name in stacks:
        assert not np.any(gradients[name][5:])
        gradients[name] = gradients[name][:5]
    assert_close(gradients, expected, atol=2e-6)


def place(layer: MixtureOfExperts, mesh: jax.sharding.Mesh) -> MixtureOfExperts:
    """The layer with parameters sharded as after `gather_parameters`."""

    def put(leaf: Array, role: Any) -> Array:
        dealt = isinstance(role, Matrix) and role.experts
        return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P("expert" if dealt else None)))

    graph, state = nnx.split(layer)
    placed = jax.tree.map(put, nnx.to_pure_dict(state), roles(state))
    nnx.replace_by_pure_dict(state, placed)
    return nnx.merge(graph, state)


@BOTH
@LOADS
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 8), *(pytest.param(s, marks=pytest.mark.slow) for s in MORE_MESHES)],
    ids=str,
)
def test_a_mesh_computes_what_one_device_does(
    sizes: tuple[int, int, int], implementation: str, bias: np.ndarray
) -> None:
    """On eight expert shards, the uneven load needs 3 rounds on a shard with a chosen expert."""
    layer = make_layer(multiple=8, implementation=implementation)
    x, cotangent = draw(), draw(1)
    expected_y, expected_load, expected = differentiate(layer, x, jnp.asarray(bias), cotangent)
    mesh = make_mesh(MeshConfig(*sizes))
    with jax.set_mesh(mesh):
        rows, whole = (jax.NamedSharding(mesh, p) for p in (jax.P(TOKEN_AXES), jax.P()))
        y, load, found = differentiate(
            place(layer, mesh),
            jax.device_put(x, rows),
            jax.device_put(bias, whole),
            jax.device_put(cotangent, rows),
        )
        assert y.sharding.spec == jax.P(TOKEN_AXES, None, None)
        assert found["gate"].sharding.spec[0] == "expert"
    np.testing.assert_array_equal(load, expected_load)
    np.testing.assert_allclose(y, expected_y, atol=2e-6)
    assert_close(found, expected, atol=5e-6)


def test_tokens_that_every_device_has_count_once() -> None:
    """With fewer rows than devices, as in sampling."""
    layer, x = make_layer(multiple=8), draw(rows=1)
    expected, expected_load = apply(layer, x, jnp.asarray(EVEN))
    mesh = make_mesh(MeshConfig(2, 1, 4))
    with jax.set_mesh(mesh):
        whole = jax.NamedSharding(mesh, jax.P())
        y, load = apply(place(layer, mesh), *jax.device_put((x, jnp.asarray(EVEN)), whole))
    np.testing.assert_array_equal(load, expected_load)
    np.testing.assert_allclose(y, expected, atol=2e-6)


def test_a_mesh_without_an_axis_for_experts_has_them_all() -> None:
    layer, x = make_layer(), draw()
    expected, expected_load = apply(layer, x, jnp.asarray(EVEN))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        whole, rows = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data"))
        graph, state = nnx.split(layer)
        placed = nnx.merge(graph, jax.device_put(state, whole))
        bias = jax.device_put(jnp.asarray(EVEN), whole)
        y, load = apply(placed, jax.device_put(x, rows), bias)
    np.testing.assert_array_equal(load, expected_load)
    np.testing.assert_allclose(y, expected, atol=2e-6)


def test_experts_that_cannot_be_dealt_are_refused() -> None:
    mesh = make_mesh(MeshConfig(2, 1, 4))
    with jax.set_mesh(mesh), pytest.raises(InputError, match=r"experts\.multiple to 4"):
        make_layer()(jnp.zeros((8, 4, WIDTH)), jnp.asarray(EVEN))


def test_balancing_evens_a_skewed_load() -> None:
    """One expert's affinity is 0.3 higher at first, so about 300 steps of 1e-3 are needed."""
    generator = np.random.default_rng(0)
    router = jnp.asarray(generator.normal(0, 0.1, (8, 16)), jnp.float32).at[0, 5].add(1.2)
    rate = ExpertsConfig().balance_rate

    def step(bias: Array, key: Array) -> tuple[Array, Array]:
        x = jax.random.normal(key, (512, 8)).at[:, 0].set(1)
        chosen, _ = route(x, router, bias, 2)
        load = jnp.sum(jax.nn.one_hot(chosen, 16, dtype=jnp.int32), axis=(0, 1))
        return balance(bias, load, rate), load

    keys = jax.random.split(jax.random.key(0), 1000)
    _, loads = jax.jit(lambda: jax.lax.scan(step, jnp.zeros(16), keys))()
    ratio = np.max(loads, axis=1) / np.mean(loads, axis=1)
    assert ratio[:10].min() > 3
    assert ratio[-100:].max() < 1.5


def test_balancing_moves_the_bias_by_the_sign_of_what_is_missing() -> None:
    bias = balance(jnp.array([0.5, 0, 0, 0]), jnp.array([9, 1, 4, 2], jnp.int32), 0.25)
    np.testing.assert_array_equal(bias, [0.25, 0.25, 0, 0.25])


def test_products_are_few() -> None:
    """Floating-point operations without those of the shared experts."""
    tokens, width, inner = 2048, 64, 128
    config = ExpertsConfig(routed=16, active=4, width=inner, shared=1, implementation="blocks")
    layer = MixtureOfExperts(width, config, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    x = jnp.zeros((1, tokens, width))

    def count(module: nnx.Module, *inputs: Array) -> np.ndarray:
        graph, state = nnx.split(module)

        def output(state: nnx.State, x: Array) -> Array:
            return jnp.sum(jax.tree.leaves(nnx.merge(graph, state)(x, *inputs))[0])

        functions = (output, jax.value_and_grad(output, argnums=(0, 1)))
        compiled = [jax.jit(function).lower(state, x).compile() for function in functions]
        return np.array([part.cost_analysis()["flops"] for part in compiled])

    pairs = 4 * tokens
    forward = pairs * 3 * 2 * width * inner
    found = count(layer, jnp.zeros(16)) - count(layer.shared)
    ratio = found / np.array([forward, 3 * forward])
    assert np.all(ratio >= 1) and np.all(ratio <= 1.3), ratio


@BOTH
def test_bfloat16_is_near_float32(implementation: str) -> None:
    layer = make_layer("bfloat16", implementation=implementation)
    x, cotangent = draw().astype(jnp.bfloat16), draw(1).astype(jnp.bfloat16)
    y, load, found = differentiate(layer, x, jnp.asarray(EVEN), cotangent)
    assert y.dtype == found["x"].dtype == jnp.bfloat16
    assert found["gate"].dtype == jnp.float32
    inputs = x.astype(jnp.float32), jnp.asarray(EVEN), cotangent.astype(jnp.float32)
    expected_y, expected_load, expected = differentiate(make_layer(), *inputs)
    np.testing.assert_array_equal(load, expected_load)  # routing is in float32

    def assert_near(found: Array, expected: Array) -> None:
        found, expected = np.asarray(found, np.float32), np.asarray(expected)
        assert np.all(np.isfinite(found))
        # About ten roundings of 2⁻⁹ each.
        error = np.sqrt(np.mean((found - expected) ** 2))
        assert error <= 10 * 2**-9 * np.sqrt(np.mean(expected**2))

    jax.tree.map(assert_near, (y, found), (expected_y, expected))


def test_matrices_are_declared_and_the_router_is_none() -> None:
    found = roles(nnx.state(make_layer()))
    for name in ("gate", "up", "down"):
        assert found[name] == Matrix(stacked=1, experts=True)
    assert not isinstance(found["router"], Matrix)


def test_experts_begin_as_nothing_and_of_their_own() -> None:
    layer = MixtureOfExperts(
        64,
        ExpertsConfig(routed=4, active=2, width=32),
        dtype=jnp.dtype("float32"),
        rngs=nnx.Rngs(0),
    )
    assert not np.any(layer.down[...])
    np.testing.assert_allclose(np.std(layer.gate[...], axis=(1, 2)), 64**-0.5, rtol=0.1)
    assert np.abs(layer.gate[0] - layer.gate[1]).max() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"active": 0}, "at least 1"),
        ({"multiple": 0}, "at least 1"),
        ({"shared": 0}, "at least 1"),
        ({"routed": 4, "active": 5}, "active"),
        ({"leading_dense": -1}, "leading_dense"),
        ({"balance_rate": -1e-3}, "balance_rate"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ExpertsConfig(**change)
