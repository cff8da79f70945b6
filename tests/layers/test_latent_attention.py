"""Latent attention compared with explicit keys and values in float64, per document."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from engram_jax.errors import InputError
from engram_jax.layers.latent_attention import Latent, LatentAttention, LatentAttentionConfig
from engram_jax.layers.positions import YarnConfig, frequencies
from engram_jax.layers.slots import Slots
from engram_jax.parameters import Matrix, roles
from engram_jax.sharding import BATCH_ABT, MeshConfig, make_mesh

SEGMENTS = np.array([[1] * 5 + [2] * 2 + [3] * 6 + [0] * 3, [1] * 16], np.int32)
POSITIONS = np.array([[*range(5), *range(2), *range(6), *range(3)], [*range(16)]], np.int32)
WIDTH, EPSILON = 12, 1e-3

PLAIN = LatentAttentionConfig(
    heads=3, latent_width=10, head_width=6, rotary_width=4, value_width=8, theta=100.0
)
COMPRESSED = replace(PLAIN, query_rank=7)
WIDE_VALUES = replace(PLAIN, value_width=14)
STRETCHED = replace(COMPRESSED, yarn=YarnConfig(trained_length=16, slow=0.5, fast=2.0))


def make_layer(config: LatentAttentionConfig, dtype: str = "float32") -> LatentAttention:
    """With noise on every parameter, so that zeros and unit gains hide no error."""
    layer = LatentAttention(
        WIDTH, config, norm_epsilon=EPSILON, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)
    )
    generator = np.random.default_rng(1)

    def disturb(leaf: Array) -> Array:
        return leaf + generator.normal(0, 0.2, leaf.shape).astype(np.float32)

    nnx.update(layer, jax.tree.map(disturb, nnx.state(layer)))
    return layer


def draw(rows: int = 2, length: int = 16) -> Array:
    return jax.random.normal(jax.random.key(1), (rows, length, WIDTH))


@nnx.jit
def apply(layer: LatentAttention, *inputs: Array) -> Array:
    return layer(*inputs)


def normalize(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON) * gain


def turn(x: np.ndarray, position: int, config: LatentAttentionConfig) -> np.ndarray:
    half = x.shape[-1] // 2
    angles = position * frequencies(x.shape[-1], config.theta, config.yarn).astype(np.float64)
    pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def attend_in_float64(layer: LatentAttention, x: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Loops over documents, queries and heads, with explicit keys and values."""
    config = layer.config
    weights = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(layer))
    )
    stretch = 0.1 * 0.707 * np.log(10.0) + 1 if config.yarn else 1.0
    scale = stretch**2 / np.sqrt(config.head_width + config.rotary_width)
    out = np.zeros(x.shape)
    documents = [
        (b, np.flatnonzero(row == number))
        for b, row in enumerate(segments)
        for number in np.unique(row)
    ]
    for b, rows in documents:
        keys, values, queries = [], [], []
        for position, row in enumerate(rows):
            hidden = np.asarray(x[b, row], np.float64)
            down = hidden @ weights["down"]
            latent = normalize(down[: config.latent_width], weights["latent_norm"]["gain"])
            shared = turn(down[config.latent_width :], position, config)
            contents = [latent @ weights["key_up"][:, q] for q in range(config.heads)]
            keys.append([np.concatenate([content, shared]) for content in contents])
            values.append([latent @ weights["value_up"][:, q] for q in range(config.heads)])
            if config.query_rank:
                hidden = normalize(hidden @ weights["query_down"], weights["query_norm"]["gain"])
            both = [hidden @ weights["query"][:, q] for q in range(config.heads)]
            content, rotary = np.split(np.array(both), [config.head_width], axis=-1)
            queries.append(np.concatenate([content, turn(rotary, position, config)], axis=-1))
        for position, row in enumerate(rows):
            for q in range(config.heads):
                scores = np.array([key[q] @ queries[position][q] for key in keys[: position + 1]])
                chances = np.exp(scale * scores) / np.exp(scale * scores).sum()
                mixed = sum(p * v[q] for p, v in zip(chances, values, strict=False))
                out[b, row] += mixed @ weights["out"][q]
    return out


@pytest.mark.parametrize("config", [PLAIN, COMPRESSED, WIDE_VALUES, STRETCHED])
def test_it_is_attention_to_keys_and_values_written_out(config: LatentAttentionConfig) -> None:
    layer, x = make_layer(config), draw()
    found = apply(layer, x, jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS))
    expected = attend_in_float64(layer, np.asarray(x), SEGMENTS)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_parameters_of_the_papers_size() -> None:
    def count(config: LatentAttentionConfig) -> dict[str, int]:
        layer = nnx.eval_shape(
            lambda: LatentAttention(
                2560, config, norm_epsilon=1e-6, dtype=jnp.dtype("bfloat16"), rngs=nnx.Rngs(0)
            )
        )
        state = nnx.to_pure_dict(nnx.state(layer))
        return {name: sum(x.size for x in jax.tree.leaves(leaf)) for name, leaf in state.items()}

    plain = {
        "query": 2560 * 32 * (128 + 64),
        "down": 2560 * (512 + 64),
        "latent_norm": 512,
        "key_up": 512 * 32 * 128,
        "value_up": 512 * 32 * 128,
        "out": 32 * 128 * 2560,
    }
    assert count(LatentAttentionConfig()) == plain
    compressed = {
        "query_down": 2560 * 1536,
        "query_norm": 1536,
        "query": 1536 * 32 * (128 + 64),
    }
    assert count(LatentAttentionConfig(query_rank=1536)) == plain | compressed


def test_every_matrix_is_declared_one() -> None:
    layer = LatentAttention(
        WIDTH, COMPRESSED, norm_epsilon=EPSILON, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)
    )
    state = nnx.state(layer)
    shapes = nnx.to_pure_dict(state)
    inputs = {
        name: shapes[name].shape[: role.inputs]
        for name, role in roles(state).items()
        if isinstance(role, Matrix) and not role.stacked
    }
    assert inputs == {
        "query_down": (12,),
        "query": (7,),
        "down": (12,),
        "key_up": (10,),
        "value_up": (10,),
        "out": (3, 8),
    }
    assert not np.any(layer.out)


def test_attention_depends_on_relative_positions_alone() -> None:
    layer, x = make_layer(STRETCHED), draw(rows=1)
    segments = jnp.ones((1, 16), jnp.int32)
    positions = jnp.arange(16, dtype=jnp.int32)[None]
    here = apply(layer, x, segments, positions)
    np.testing.assert_allclose(apply(layer, x, segments, positions + 37), here, atol=2e-5)
    assert np.abs(apply(layer, x, segments, 2 * positions) - here).max() > 1e-2


def test_no_gradient_from_the_future_or_another_document() -> None:
    layer = make_layer(COMPRESSED)

    def outputs(x: Array) -> Array:
        return jnp.sum(layer(x, jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS))[0] ** 3, axis=-1)

    jacobian = jax.jit(jax.jacrev(outputs))(draw())
    assert not np.any(jacobian[:, 1])
    same_document = SEGMENTS[0][:, None] == SEGMENTS[0][None]
    allowed = np.tril(np.ones((16, 16), bool)) & same_document
    np.testing.assert_array_equal(np.any(jacobian[:, 0], axis=-1), allowed)


@pytest.mark.parametrize("config", [PLAIN, STRETCHED])
@pytest.mark.parametrize(("begin", "end"), [(4, 5), (6, 9), (15, 16)])
def test_new_positions_read_a_cache_as_the_whole_row(
    config: LatentAttentionConfig, begin: int, end: int
) -> None:
    """Few positions are attended to by their latents, many by their keys and values."""
    layer, x = make_layer(config), draw()
    positions, segments = jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS)
    whole = apply(layer, x, segments, positions)

    def extend(cache: Latent, begin: int, end: int) -> tuple[Array, Latent]:
        first = jnp.full(2, begin, jnp.int32)
        slots = Slots(first, segments, first[:, None] + jnp.arange(end - begin)[None])
        return layer.extend(x[:, begin:end], positions[:, begin:end], cache, slots)

    unfilled = jax.tree.map(lambda part: part + 9, layer.empty_cache(2, 16))
    extend = jax.jit(extend, static_argnums=(1, 2))
    assert layer._absorbs(end - begin) != layer._absorbs(100)
    before, cache = extend(unfilled, 0, begin)
    found, _ = extend(cache, begin, end)
    np.testing.assert_allclose(before, whole[:, :begin], atol=1e-5)
    np.testing.assert_allclose(found, whole[:, begin:end], atol=1e-5)


def test_bfloat16_is_near_float32() -> None:
    inputs = draw(), jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS)
    expected = apply(make_layer(STRETCHED), *inputs)
    found = apply(make_layer(STRETCHED, "bfloat16"), inputs[0].astype(jnp.bfloat16), *inputs[1:])
    assert found.dtype == jnp.bfloat16
    # There are six roundings of 2⁻⁹ (on average) from x to the output.
    error = np.sqrt(np.mean((found.astype(np.float32) - expected) ** 2) / np.mean(expected**2))
    assert error < 6 * 2**-9


def test_splash_is_xla_with_gradients() -> None:
    """In interpret mode."""
    segments = jnp.asarray(np.cumsum(np.isin(np.arange(128), [0, 40, 41, 100]))[None], jnp.int32)
    positions = jnp.arange(128, dtype=jnp.int32)[None]
    x = draw(rows=1, length=128)

    def run(implementation: str) -> tuple[Array, Array]:
        layer = make_layer(replace(STRETCHED, implementation=implementation))

        def loss(x: Array) -> tuple[Array, Array]:
            out = layer(x, segments, positions)
            return jnp.sum(out**3), out

        gradient, out = jax.jit(jax.grad(loss, has_aux=True))(x)
        return out, gradient

    (expected, expected_gradient), (found, gradient) = run("xla"), run("splash")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    largest = np.abs(expected_gradient).max()
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5 * largest)


def test_eight_devices_attend_as_one() -> None:
    layer, x = make_layer(COMPRESSED), draw(rows=8)
    lengths = 3 + np.arange(8)[:, None]
    segments = (np.arange(16)[None] // lengths).astype(np.int32)
    positions = (np.arange(16)[None] % lengths).astype(np.int32)
    graph, state = nnx.split(layer)

    @jax.jit
    def run(state: nnx.State, x: Array, segments: Array, positions: Array) -> Array:
        return nnx.merge(graph, state)(x, segments, positions)

    inputs = (x, segments, positions)
    expected = run(state, *inputs)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    with jax.set_mesh(mesh):
        rows, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P(BATCH_ABT[1]), jax.P()))
        found = run(jax.device_put(state, whole), *jax.device_put(inputs, rows))
    assert found.sharding.spec[0] == BATCH_ABT[1]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "heads"),
        ({"latent_width": 0}, "latent_width"),
        ({"value_width": 0}, "value_width"),
        ({"query_rank": -1}, "query_rank"),
        ({"rotary_width": 3}, "odd"),
        ({"theta": 1.0}, "theta"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LatentAttentionConfig(**change)
