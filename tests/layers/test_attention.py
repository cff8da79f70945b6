"""Attention compared with float64, document by document; splash compared with XLA."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from lively import enliven

from engram_jax.errors import InputError
from engram_jax.layers import scaled_dot_product
from engram_jax.layers.attention import Attention, AttentionConfig
from engram_jax.layers.context import on_all_positions
from engram_jax.layers.scaled_dot_product import attend
from engram_jax.sharding import BATCH_ABT, TOKENS_BT, MeshConfig, make_mesh

SEGMENTS = np.array([[1] * 5 + [2] * 2 + [3] * 6 + [0] * 3, [1] * 16], np.int32)
POSITIONS = np.array([[*range(5), *range(2), *range(6), 0, 0, 0], [*range(16)]], np.int32)


def draw(
    length: int, heads: int, kv_heads: int, width: int, rows: int = 2, seed: int = 0
) -> tuple[Array, Array, Array]:
    shapes = [(rows, length, count, width) for count in (heads, kv_heads, kv_heads)]
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))


def attend_in_float64(
    query: Array, key: Array, value: Array, segments: np.ndarray, scale: float | None = None
) -> np.ndarray:
    """One query at a time, over the keys that it may see."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    scale = 1 / np.sqrt(query.shape[-1]) if scale is None else scale
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    group = query.shape[2] // key.shape[2]
    for b, t, q in np.ndindex(query.shape[:3]):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        scores = key[b, seen, q // group] @ query[b, t, q] * scale
        weights = np.exp(scores - scores.max())
        out[b, t, q] = weights @ value[b, seen, q // group] / weights.sum()
    return out


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_xla_is_softmax_over_the_documents_past(heads: tuple[int, int]) -> None:
    inputs = draw(16, *heads, 8)
    found = attend(*inputs, jnp.asarray(SEGMENTS), "xla")
    np.testing.assert_allclose(found, attend_in_float64(*inputs, SEGMENTS), atol=2e-6)


@pytest.mark.parametrize("value_width", [3, 12])
@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_values_may_have_another_width_and_scores_another_scale(
    implementation: str, value_width: int
) -> None:
    length = 128 if implementation == "splash" else 16
    segments = np.repeat(SEGMENTS, length // 16, axis=1)
    query, key, _ = draw(length, 4, 2, 8)
    value = jax.random.normal(jax.random.key(7), (2, length, 2, value_width))
    found = attend(query, key, value, jnp.asarray(segments), implementation, scale=0.7)
    expected = attend_in_float64(query, key, value, segments, scale=0.7)
    np.testing.assert_allclose(found, expected, atol=5e-6)


def test_the_default_on_cpu_is_xla() -> None:
    inputs = draw(16, 4, 2, 8)
    by_default = attend(*inputs, jnp.asarray(SEGMENTS))
    np.testing.assert_array_equal(by_default, attend(*inputs, jnp.asarray(SEGMENTS), "xla"))


@pytest.mark.parametrize(
    ("platform", "length", "kernels"), [("tpu", 128, 1), ("tpu", 96, 0), ("gpu", 128, 0)]
)
def test_the_default_is_that_of_the_meshs_platform(
    platform: str, length: int, kernels: int
) -> None:
    """As when compiling on a host without the device. Splash needs a multiple of 128.

    The capability of a GPU that is not present is unknown, so XLA is used.
    """
    device = jax.sharding.AbstractDevice(device_kind="", num_cores=2, platform=platform)
    mesh = jax.sharding.AbstractMesh((2, 1, 1), BATCH_ABT[1], abstract_device=device)
    rows = jax.NamedSharding(mesh, jax.P(BATCH_ABT[1]))
    shape = (2, length, 2, 16)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows)] * 3
    segments = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=rows)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = str(jax.make_jaxpr(attend)(*inputs, segments))
    assert traced.count("pallas_call[") == traced.count("interpret=False") == kernels


@pytest.mark.parametrize(
    ("capability", "widest"),
    [("7.5", 0), ("8.0", 128), ("9.0", 256), ("10.0", 128), ("12.0", 128), ("gfx942", 0)],
)
def test_the_default_on_a_gpu_is_what_its_generation_can(
    capability: str, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN up to the width that has a backward pass; never on an AMD GPU."""
    arrays = {
        width: jnp.zeros((1, 2, 1, width), jnp.bfloat16) for width in (64, 128, 192, 256, 264)
    }
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(scaled_dot_product.jax, "devices", lambda: [device])
    monkeypatch.setattr(scaled_dot_product, "platform_of", lambda mesh: "gpu")
    for width, array in arrays.items():
        expected = "cudnn" if width <= widest else "xla"
        assert scaled_dot_product._fastest(array, array, None) == expected


def test_splash_is_xla_with_gradients() -> None:
    """In interpret mode."""
    segments = jnp.asarray(np.cumsum(np.isin(np.arange(128), [0, 40, 41, 100]))[None], jnp.int32)
    inputs = draw(128, 2, 1, 128, rows=1)
    cotangent = jax.random.normal(jax.random.key(5), inputs[0].shape)

    def run(implementation: str) -> tuple[Array, tuple[Array, Array, Array]]:
        out, pullback = jax.vjp(
            partial(attend, segments=segments, implementation=implementation), *inputs
        )
        return out, pullback(cotangent)

    (expected, expected_gradients), (found, gradients) = run("xla"), run("splash")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, reference, atol=5e-5)


def test_a_named_implementation_that_cannot_run_fails() -> None:
    inputs = draw(16, 2, 2, 8)
    with pytest.raises(Exception, match=r"(?i)splash|cudnn|lane|block|multiple|head"):
        attend(*inputs, jnp.asarray(SEGMENTS), "splash")
    with pytest.raises(RuntimeError, match=r"(?i)cudnn|cuda"):
        attend(*inputs, jnp.asarray(SEGMENTS), "cudnn")


def make_layer(config: AttentionConfig, width: int = 12) -> Attention:
    layer = Attention(width, config, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    nnx.update(layer, enliven(nnx.state(layer)))
    return layer


@nnx.jit
def apply(layer: Attention, *inputs: Array) -> Array:
    return layer(*inputs)


def test_a_document_in_a_packed_row_is_as_if_alone() -> None:
    layer = make_layer(AttentionConfig(heads=4, kv_heads=2, head_width=6))
    x = jax.random.normal(jax.random.key(1), (2, 16, 12))
    packed = apply(layer, x, jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS))
    for begin, end in ((0, 5), (5, 7), (7, 13)):
        length = end - begin
        alone = apply(
            layer,
            x[:1, begin:end],
            jnp.ones((1, length), jnp.int32),
            jnp.arange(length, dtype=jnp.int32)[None],
        )
        np.testing.assert_allclose(packed[0, begin:end], alone[0], atol=2e-6)


def test_no_gradient_from_the_future_or_another_document() -> None:
    layer = make_layer(AttentionConfig(heads=4, kv_heads=2, head_width=6))
    x = jax.random.normal(jax.random.key(1), (2, 16, 12))

    def outputs(x: Array) -> Array:
        return jnp.sum(layer(x, jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS))[0] ** 3, axis=-1)

    jacobian = jax.jit(jax.jacrev(outputs))(x)
    assert not np.any(jacobian[:, 1])
    same_document = SEGMENTS[0][:, None] == SEGMENTS[0][None]
    allowed = np.tril(np.ones((16, 16), bool)) & same_document
    np.testing.assert_array_equal(np.any(jacobian[:, 0], axis=-1), allowed)


def test_attention_depends_on_relative_positions_alone() -> None:
    layer = make_layer(AttentionConfig(heads=2, kv_heads=1, head_width=8, theta=100.0))
    x = jax.random.normal(jax.random.key(1), (1, 16, 12))
    segments = jnp.ones((1, 16), jnp.int32)
    positions = jnp.arange(16, dtype=jnp.int32)[None]
    here = apply(layer, x, segments, positions)
    np.testing.assert_allclose(apply(layer, x, segments, positions + 37), here, atol=2e-5)
    assert np.abs(apply(layer, x, segments, 2 * positions) - here).max() > 1e-2


def test_grouped_queries_are_full_attention_with_repeated_heads() -> None:
    inputs = draw(16, 6, 2, 8)
    query, key, value = inputs
    repeated = attend(
        query, jnp.repeat(key, 3, axis=2), jnp.repeat(value, 3, axis=2), jnp.asarray(SEGMENTS)
    )
    np.testing.assert_allclose(attend(*inputs, jnp.asarray(SEGMENTS)), repeated, atol=2e-6)


@pytest.mark.parametrize(
    ("implementation", "context"),
    [("xla", 1), ("xla", 4), ("splash", 1), pytest.param("splash", 2, marks=pytest.mark.slow)],
)
def test_eight_devices_attend_as_one(implementation: str, context: int) -> None:
    """Values and gradients. With a context, each device has a part of T."""
    length, width = (128 * context, 128) if implementation == "splash" else (16, 8)
    inputs = draw(length, 2, 1, width, rows=8 // context)
    counts = 5 + np.arange(8 // context)[:, None]
    segments = jnp.asarray(np.arange(length)[None] // counts, jnp.int32)

    def loss(inputs: tuple[jax.Array, ...], name: str) -> tuple[jax.Array, jax.Array]:
        query, *own = inputs
        key, value = on_all_positions(lambda *both: both, tuple(own))
        found = attend(query, key, value, split_segments, name)
        return jnp.sum(jnp.sin(found)), found

    split_segments = segments
    (_, expected), gradients = jax.value_and_grad(loss, has_aux=True)(inputs, "xla")
    mesh = make_mesh(MeshConfig(fsdp=2, context=context))
    with jax.set_mesh(mesh):
        tokens = jax.NamedSharding(mesh, TOKENS_BT)
        split_segments = jax.device_put(segments, tokens)
        run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
        (_, found), found_gradients = run(jax.device_put(inputs, tokens), implementation)
        assert found.sharding.spec[:2] == tuple(TOKENS_BT)
    for one, other in zip((found, *found_gradients), (expected, *gradients), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5, "kv_heads": 2}, "kv_heads"),
        ({"head_width": 7}, "odd"),
        ({"heads": 0, "kv_heads": 1}, "heads"),
        ({"heads": 2, "kv_heads": 0}, "kv_heads"),
        ({"head_width": 0}, "head_width"),
        ({"theta": 1.0}, "theta"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AttentionConfig(**change)


def test_positions_split_over_a_mesh_are_refused() -> None:
    """Otherwise each device would silently attend only to its own part."""
    mesh = make_mesh(MeshConfig(4), jax.devices()[:4])
    along = jax.NamedSharding(mesh, jax.P(None, "data"))
    inputs = jax.device_put((*draw(16, 2, 2, 8), jnp.asarray(SEGMENTS)), along)
    with jax.set_mesh(mesh), pytest.raises(InputError, match="only along B"):
        attend(*inputs, "xla")
