"""The decoder: causality, twins with and without memory, remat, dtypes, use of memory."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import Array

from engram_jax.config import MemoryConfig
from engram_jax.layers import hyper_connections
from engram_jax.layers.attention import AttentionConfig
from engram_jax.layers.hyper_connections import HyperConnectionsConfig
from engram_jax.layers.latent_attention import LatentAttentionConfig
from engram_jax.layers.mixture_of_experts import ExpertsConfig
from engram_jax.model import Decoder, DecoderConfig, MemorySites, Report
from engram_jax.parameters import roles
from engram_jax.sharding import TOKEN_AXES, MeshConfig, make_mesh, parameter_sharding

CONFIG = DecoderConfig(
    vocabulary=50,
    width=16,
    layers=2,
    attention=AttentionConfig(heads=2, kv_heads=1, head_width=8),
    feed_forward=24,
)
ENGRAM = MemorySites(layers=(0, 1), width=12, orders=2)
OVER_ENCODING = MemorySites(input="over_encoding", width=12, orders=2)
SEGMENTS = np.array([[1] * 5 + [2] * 2 + [3] * 7, [1] * 11 + [0] * 3], np.int32)
POSITIONS = np.array([[*range(5), *range(2), *range(7)], [*range(11), 0, 0, 0]], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 14), dtype=np.int32)


def make_decoder(
    config: DecoderConfig = CONFIG, sites: MemorySites = ENGRAM, seed: int = 0
) -> Decoder:
    params, memory = jax.random.split(jax.random.key(seed))
    return Decoder(config, sites, rngs=nnx.Rngs(params=params, memory=memory))


def make_lively_decoder(config: DecoderConfig = CONFIG, sites: MemorySites = ENGRAM) -> Decoder:
    """With random numbers for all parameters, also those initialized to zeros or ones."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: make_decoder(config, sites)))
    generator = np.random.default_rng(1)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> Array:
        middle = 1.0 if path[-1].key == "gain" else 0.0
        return jnp.asarray(generator.normal(middle, 0.3, leaf.shape), leaf.dtype)

    return nnx.merge(graph, jax.tree.map_with_path(draw, nnx.to_pure_dict(shapes)))


def draw_memory(layers: tuple[int, ...] = (0, 1), seed: int = 2) -> dict[int, Array]:
    return {
        layer: jax.random.normal(jax.random.fold_in(jax.random.key(seed), layer), (2, 14, 12))
        for layer in layers
    }


@nnx.jit
def apply(decoder: Decoder, tokens: Array, memory: dict[int, Array]) -> tuple[Array, Report]:
    return decoder(tokens, memory, jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS))


def parameters(decoder: Decoder) -> dict[str, np.ndarray]:
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(decoder, nnx.Param)))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_no_gradient_from_the_future_or_another_document() -> None:
    """Through all blocks, for embeddings and for memory."""
    graph, params = nnx.split(make_lively_decoder(replace(CONFIG, tie_embeddings=False)))
    readout = jax.random.normal(jax.random.key(3), (1, 1, 50))

    def outputs(extra: Array, memory: dict[int, Array]) -> Array:
        # Every position has its own vocabulary entry, so that its embedding can be changed.
        merged = nnx.merge(graph, params)
        merged.embedding = nnx.Param(extra.reshape(-1, CONFIG.width))
        tokens = jnp.arange(28, dtype=jnp.int32).reshape(2, 14)
        logits, _ = merged(tokens, memory, jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS))
        return jnp.sum(logits[0] * readout[0], axis=-1)

    inputs = jax.random.normal(jax.random.key(4), (2, 14, CONFIG.width))
    by_input, by_memory = jax.jit(jax.jacrev(outputs, argnums=(0, 1)))(inputs, draw_memory())
    same_document = SEGMENTS[0][:, None] == SEGMENTS[0][None]
    allowed = np.tril(np.ones((14, 14), bool)) & same_document
    for jacobian in (by_input, *by_memory.values()):
        assert not np.any(jacobian[:, 1])  # from another row
        np.testing.assert_array_equal(np.any(jacobian[:, 0], axis=-1), allowed)


def test_a_document_in_a_packed_row_is_as_if_alone() -> None:
    decoder, memory = make_lively_decoder(), draw_memory()
    packed, _ = apply(decoder, jnp.asarray(TOKENS), memory)
    for begin, end in ((0, 5), (5, 7), (7, 14)):
        alone, _ = nnx.jit(lambda decoder, *inputs: decoder(*inputs))(
            decoder,
            jnp.asarray(TOKENS[:1, begin:end]),
            {layer: values[:1, begin:end] for layer, values in memory.items()},
            jnp.ones((1, end - begin), jnp.int32),
            jnp.arange(end - begin, dtype=jnp.int32)[None],
        )
        np.testing.assert_allclose(packed[0, begin:end], alone[0], atol=1e-4)


@pytest.mark.slow
def test_remat_changes_no_loss_and_no_gradient() -> None:
    memory = draw_memory()

    def run(remat: str | None) -> tuple[Array, tuple]:
        graph, params = nnx.split(make_lively_decoder(replace(CONFIG, remat=remat)))

        def loss(params: nnx.State, memory: dict[int, Array]) -> Array:
            logits, _ = apply(nnx.merge(graph, params), jnp.asarray(TOKENS), memory)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(TOKENS))
            return losses.mean()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, memory)

    (expected, expected_gradients), (found, gradients) = run(None), run("nothing_saveable")
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sites", [ENGRAM, OVER_ENCODING])
@pytest.mark.parametrize("tied", [True, False])
def test_twins_start_from_equal_backbones(sites: MemorySites, tied: bool) -> None:
    config = replace(CONFIG, tie_embeddings=tied)
    with_memory, dense = (parameters(make_decoder(config, s)) for s in (sites, MemorySites()))
    assert dense.keys() < with_memory.keys()
    for name, values in dense.items():
        np.testing.assert_array_equal(values, with_memory[name], err_msg=name)


def test_equal_backbones_whatever_the_layers_with_memory() -> None:
    one, other = (
        parameters(make_decoder(CONFIG, replace(ENGRAM, layers=layers))) for layers in ((0,), (1,))
    )
    for name in one.keys() & other.keys():
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_memory_that_is_missing_adds_nothing() -> None:
    decoder, memory = make_lively_decoder(), draw_memory()
    dense = make_lively_decoder(sites=MemorySites())
    shared = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    for block in shared["blocks"].values():
        block.pop("engram", None)
    graph, _ = nnx.split(dense)
    dense = nnx.merge(graph, shared)
    expected, no_report = apply(dense, jnp.asarray(TOKENS), {})
    found, report = apply(decoder, jnp.asarray(TOKENS), {})
    np.testing.assert_array_equal(found, expected)
    assert no_report.gates == report.gates == no_report.loads == {}
    assert no_report.mixing_error is None
    # Each layer alone changes the logits, and returns gates.
    for layer in (0, 1):
        partly, report = apply(decoder, jnp.asarray(TOKENS), {layer: memory[layer]})
        assert report.gates.keys() == {layer} and report.gates[layer].shape == (2, 14, 1)
        assert np.abs(partly - expected).max() > 1e-3


def test_an_image_placeholder_has_no_embedding_and_closed_gates() -> None:
    decoder, memory = make_lively_decoder(), draw_memory()
    alive = np.ones(TOKENS.shape, bool)
    alive[0, 8] = alive[1, 3] = False

    @nnx.jit
    def masked(decoder: Decoder, tokens: Array) -> tuple[Array, Report]:
        return decoder(
            *(tokens, memory, jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS)),
            token_mask=jnp.asarray(alive),
        )

    logits, report = masked(decoder, jnp.asarray(np.where(alive, TOKENS, -1)))
    for gates in report.gates.values():
        assert (np.asarray(gates[..., 0] > 0) == alive).all()
    # The content there has no effect, and earlier positions do not depend on it.
    np.testing.assert_array_equal(logits, masked(decoder, jnp.asarray(TOKENS))[0])
    plain, _ = apply(decoder, jnp.asarray(TOKENS), memory)
    np.testing.assert_allclose(logits[0, :8], plain[0, :8], atol=1e-5)
    assert np.abs(logits[0, 8:] - plain[0, 8:]).max() > 1e-3


def test_memory_enters_at_its_own_layer() -> None:
    decoder, memory = make_lively_decoder(), draw_memory()
    straight, _ = apply(decoder, jnp.asarray(TOKENS), memory)
    swapped, _ = apply(decoder, jnp.asarray(TOKENS), {0: memory[1], 1: memory[0]})
    assert np.abs(straight - swapped).max() > 1e-3


def test_over_encoding_averages_into_the_input_embedding() -> None:
    decoder = make_lively_decoder(sites=OVER_ENCODING)
    memory = draw_memory((0,))
    found, report = apply(decoder, jnp.asarray(TOKENS), memory)
    assert report.gates == {}
    rows = np.asarray(memory[0]).reshape(2, 14, 2, 6)
    projection = np.asarray(decoder.over_encoding.projection[...])
    inputs = 4 * np.asarray(decoder.embedding[...])[TOKENS] + np.einsum(
        "btoe,oed->btd", rows, projection
    )
    # The same backbone without memory, with those inputs as its embedding.
    graph, _ = nnx.split(make_decoder(replace(CONFIG, tie_embeddings=False), MemorySites()))
    shared = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    del shared["over_encoding"]
    shared["head"] = shared["embedding"]
    shared["embedding"] = jnp.asarray(inputs.reshape(28, -1) / 3 / 4)  # 4 = √D
    plain = nnx.merge(graph, shared)
    expected, _ = apply(plain, jnp.arange(28, dtype=jnp.int32).reshape(2, 14), {})
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("fusion", "parameter"), [("over_encoding", "projection"), ("added", "scale")]
)
def test_parameters_that_read_memory_at_the_input_keep_their_paths(
    fusion: str, parameter: str
) -> None:
    """A checkpoint has them under these names."""
    sites = MemoryConfig(
        layers=(0,), fusion=fusion, heads=1, rows_per_head=(5, 5), row_width=16
    ).sites
    decoder = make_decoder(sites=sites)
    names = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    assert list(names[fusion]) == [parameter]
    memory, embedded = {0: jnp.ones((2, 14, 32))}, jnp.zeros((2, 14, 16))
    read = decoder._begin(embedded, decoder._input_memory, memory, None)
    assert np.abs(read).min() > 0
    plain = make_decoder(sites=MemorySites())
    assert plain._input_memory is None


@pytest.mark.parametrize("tied", [True, False])
def test_the_head(tied: bool) -> None:
    decoder = make_lively_decoder(replace(CONFIG, tie_embeddings=tied))
    assert hasattr(decoder, "head") != tied
    before, _ = apply(decoder, jnp.asarray(TOKENS), {})
    # Token 49 is not in the text, so its embedding has an effect only through a tied head.
    assert (TOKENS != 49).all()
    decoder.embedding = nnx.Param(decoder.embedding[...].at[49].add(1.0))
    after, _ = apply(decoder, jnp.asarray(TOKENS), {})
    np.testing.assert_array_equal(before[..., :49], after[..., :49])
    assert np.any(before[..., 49] != after[..., 49]) == tied


def test_bfloat16_is_finite_and_near_float32() -> None:
    memory = draw_memory()
    decoder = make_lively_decoder()
    half = make_lively_decoder(replace(CONFIG, dtype="bfloat16"))
    assert all(values.dtype == np.float32 for values in parameters(half).values())
    expected, _ = apply(decoder, jnp.asarray(TOKENS), memory)
    found, _ = apply(half, jnp.asarray(TOKENS), memory)
    assert found.dtype == jnp.float32 and np.isfinite(found).all()
    # About twenty successive roundings of 2⁻⁸ along the residual stream.
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert 1e-5 < error < 20**0.5 * 2**-8

    def loss(decoder: Decoder) -> Array:
        logits, _ = apply(decoder, jnp.asarray(TOKENS), memory)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(TOKENS)).mean()

    gradient = nnx.jit(nnx.grad(loss))(half)
    leaves = jax.tree.leaves(gradient)
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in leaves)


def test_in_bfloat16_a_frequent_token_gets_the_sum_of_its_gradients() -> None:
    tokens = jnp.full((1, 2048), 7, jnp.int32)
    same = jnp.ones_like(tokens)
    positions = jnp.arange(2048, dtype=jnp.int32)[None]
    config = replace(CONFIG, layers=1, tie_embeddings=False)

    def gradient(dtype: str) -> Array:
        decoder = make_decoder(replace(config, dtype=dtype), MemorySites())

        def loss(decoder: Decoder) -> Array:
            logits, _ = decoder(tokens, {}, same, positions)
            return jnp.sum(logits[..., 3])

        return nnx.jit(nnx.grad(loss))(decoder).embedding[...][7]

    np.testing.assert_allclose(
        gradient("bfloat16"),
        gradient("float32"),
        rtol=0.02,
        atol=0.02 * abs(gradient("float32")).max(),
    )


def test_every_parameter_gets_a_gradient() -> None:
    for sites, memory in ((ENGRAM, draw_memory()), (OVER_ENCODING, draw_memory((0,)))):
        config = replace(CONFIG, tie_embeddings=False)
        graph, params = nnx.split(make_lively_decoder(config, sites))

        def loss(params: nnx.State, graph=graph, memory=memory) -> Array:
            logits, _ = apply(nnx.merge(graph, params), jnp.asarray(TOKENS), memory)
            return jnp.sum(logits**2)

        gradient = jax.jit(jax.grad(loss))(params)
        for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(gradient)):
            assert np.any(leaf), jax.tree_util.keystr(path)


def test_equal_seeds_give_equal_models() -> None:
    one, same, other = (parameters(make_decoder(seed=seed)) for seed in (0, 0, 1))
    for name in one:
        np.testing.assert_array_equal(one[name], same[name])
    assert any((one[name] != other[name]).any() for name in one)


def test_parts_of_one_model_start_differently() -> None:
    values = parameters(make_decoder())
    matrices = {name: v for name, v in values.items() if v.ndim > 1 and v.std() > 0}
    by_shape: dict[tuple, list[np.ndarray]] = {}
    for v in matrices.values():
        by_shape.setdefault(v.shape, []).append(v)
    for group in by_shape.values():
        for index, one in enumerate(group):
            assert not any(np.array_equal(one, other) for other in group[:index])


PAPER = replace(
    CONFIG,
    layers=3,
    attention=LatentAttentionConfig(
        heads=2, latent_width=12, head_width=8, rotary_width=4, value_width=8
    ),
    experts=ExpertsConfig(routed=5, shared=1, active=2, width=8, multiple=2),
    hyper_connections=HyperConnectionsConfig(branches=3),
    tie_embeddings=False,
)
"""The paper's backbone, small: latent attention, experts behind a dense layer, three branches."""


def loss_and_gradients(
    config: DecoderConfig, sites: MemorySites, memory: dict[int, Array]
) -> tuple[Array, tuple[dict, dict]]:
    graph, params = nnx.split(make_lively_decoder(config, sites))

    def loss(params: dict, memory: dict[int, Array]) -> Array:
        logits, _ = apply(nnx.merge(graph, params), jnp.asarray(TOKENS), memory)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(TOKENS)).mean()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(nnx.to_pure_dict(params), memory)


# Engram and two blocks of a loop differ in nothing else.
LOOPED = replace(PAPER, experts=replace(PAPER.experts, leading_dense=0))


@pytest.fixture(scope="module")
def unrolled() -> tuple[Array, tuple[dict, dict]]:
    return loss_and_gradients(LOOPED, replace(ENGRAM, layers=(0,)), draw_memory((0,)))


@pytest.mark.parametrize(
    "remat",
    [
        pytest.param(None, marks=pytest.mark.slow),
        pytest.param("experts_saveable", marks=pytest.mark.slow),
        pytest.param("dots_with_no_batch_dims_saveable", marks=pytest.mark.slow),
    ],
)
def test_a_scanned_stack_is_the_unrolled_one(
    unrolled: tuple[Array, tuple[dict, dict]], remat: str | None
) -> None:
    """Blocks 1 and 2 in one loop; parameters and gradients keep a name for every layer."""
    sites, memory = replace(ENGRAM, layers=(0,)), draw_memory((0,))
    expected, (by_name, by_memory) = unrolled
    scanned = replace(LOOPED, scan=True, remat=remat)
    found, (gradients, rows) = loss_and_gradients(scanned, sites, memory)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(rows[0], by_memory[0], rtol=1e-4, atol=1e-6)
    assert gradients["blocks"].keys() == {0, 1, 2}
    for (path, a), b in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(by_name), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6, err_msg=name)
    graph, params = nnx.split(make_lively_decoder(scanned, sites))

    def logits(memory: dict[int, Array]) -> Array:
        segments, positions = jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS)
        return nnx.merge(graph, params)(jnp.asarray(TOKENS), memory, segments, positions)[0]

    assert "length=2" in str(jax.make_jaxpr(logits)(memory))


def test_what_dealt_experts_gave_can_be_kept_instead_of_computed_and_summed_again() -> None:
    mesh = make_mesh(MeshConfig(expert=2), jax.devices()[:2])

    def trace(remat: str) -> str:
        """Of the gradient of a model with one layer of experts."""
        config = replace(PAPER, layers=2, remat=remat)
        graph, state = nnx.split(make_lively_decoder(config, MemorySites()))
        params = nnx.to_pure_dict(state)
        inputs = (TOKENS, SEGMENTS, POSITIONS)

        def loss(params: dict) -> Array:
            tokens, segments, positions = jax.device_put(
                inputs, jax.NamedSharding(mesh, jax.P(TOKEN_AXES))
            )
            return nnx.merge(graph, params)(tokens, {}, segments, positions)[0].sum()

        with jax.set_mesh(mesh):
            params = jax.device_put(params, parameter_sharding(mesh, params, roles(state)))
            return str(jax.make_jaxpr(jax.grad(loss))(params))

    again, kept = trace("nothing_saveable"), trace("experts_saveable")
    # The products are gate, up and down, in the first round and in the loop of further rounds.
    for name, fewer in (("reduce_scatter[", 1), ("dot_general[", 6)):
        assert kept.count(name) == again.count(name) - fewer, name


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_the_blocks_report(scan: bool) -> None:
    decoder = make_lively_decoder(replace(PAPER, scan=scan), replace(ENGRAM, layers=(0,)))
    _, report = apply(decoder, jnp.asarray(TOKENS), draw_memory((0,)))
    assert report.gates[0].shape == (2, 14, 3)
    assert report.loads.keys() == {1, 2}
    for load in report.loads.values():
        assert load.shape == (5,) and load.sum() == 2 * TOKENS.size
    assert 0 < report.mixing_error < 1


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_bias_of_a_layer_moves_tokens_between_its_experts(scan: bool) -> None:
    decoder = make_lively_decoder(replace(PAPER, scan=scan), MemorySites())
    inputs = jnp.asarray(TOKENS), {}, jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS)
    bias = {layer: jnp.zeros(5) for layer in (1, 2)}
    favored = bias | {2: jnp.array([0.0, 0.0, 0.0, 0.0, 2.0])}
    call = nnx.jit(lambda decoder, *inputs: decoder(*inputs)[1].loads)
    before, after = call(decoder, *inputs, bias), call(decoder, *inputs, favored)
    np.testing.assert_array_equal(before[1], after[1])
    assert before[2][4] < after[2][4] == TOKENS.size


@pytest.mark.parametrize(
    "memory",
    [
        pytest.param(draw_memory((0, 1)), id="engram"),
        pytest.param({}, id="plain", marks=pytest.mark.slow),
    ],
)
def test_hyper_connections_start_as_a_plain_residual_network(memory: dict[int, Array]) -> None:
    """At scale 0, equal to 1e-6 of the logits; at scale 0.01, to 2e-3."""
    plain = make_lively_decoder()
    shared = nnx.to_pure_dict(nnx.state(plain, nnx.Param))
    for scale, tolerance in ((0.0, 1e-6), (0.01, 2e-3)):
        connections = HyperConnectionsConfig(branches=3, scale=scale)
        wide = make_decoder(replace(CONFIG, hyper_connections=connections))
        graph, params = nnx.split(wide)
        params = nnx.to_pure_dict(params)
        for layer, block in params["blocks"].items():
            for name, part in shared["blocks"][layer].items():
                # Engram has keys, gates and taps per branch: the same values for all branches.
                block[name] = jax.tree.map(
                    lambda ours, theirs: jnp.broadcast_to(theirs, ours.shape), block[name], part
                )
        params |= {name: shared[name] for name in ("embedding", "norm")}
        expected, _ = apply(plain, jnp.asarray(TOKENS), memory)
        found, _ = apply(nnx.merge(graph, params), jnp.asarray(TOKENS), memory)
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert error < tolerance, scale
    assert error > 1e-6  # then the branches differ


def test_a_single_fusion_is_engram_itself_on_a_plain_stream() -> None:
    memory = draw_memory()
    expected, _ = apply(make_lively_decoder(), jnp.asarray(TOKENS), memory)
    found, report = apply(
        make_lively_decoder(replace(CONFIG, single_fusion=True)), jnp.asarray(TOKENS), memory
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert report.gates[0].shape == (2, 14, 1)


def test_a_single_fusion_reaches_the_stream_through_the_layer_alone() -> None:
    """There is one gate for all branches.

    Initially, attention and feed-forward add nothing. Only Engram's output remains, for the input
    of the attention. It enters every branch by H_post, and not if H_post is zero.
    """
    connections = HyperConnectionsConfig(branches=3, scale=0.0)
    config = replace(CONFIG, layers=1, hyper_connections=connections, single_fusion=True)
    block = make_decoder(config, replace(ENGRAM, layers=(0,))).blocks[0]
    memory, segments = draw_memory((0,))[0], jnp.asarray(SEGMENTS)
    assert block.engram.key.shape == (1, 12, 16)
    block.attention_connection.post_bias[...] = jnp.array([-1e3, 0.0, 1.0])
    x = jax.random.normal(jax.random.key(5), (2, 14, 3, 16))
    added = block(x, segments, jnp.asarray(POSITIONS), memory)[0]
    added -= block(x, segments, jnp.asarray(POSITIONS))[0]
    h = hyper_connections.read(x, block.attention_connection(x))
    fused = block.engram(h[:, :, None], memory, segments)[0][:, :, 0]
    assert np.abs(fused).max() > 0.1
    for branch, share in enumerate((0.0, 1.0, 2 * jax.nn.sigmoid(1.0))):
        # The feed-forward's H_res is only approximately the identity.
        np.testing.assert_allclose(added[:, :, branch], share * fused, atol=5e-3)


def test_no_gradient_from_the_future_through_the_papers_backbone() -> None:
    """Experts choose for each token by itself, and branches mix within a position."""
    graph, params = nnx.split(make_lively_decoder(replace(PAPER, layers=2), MemorySites()))

    def outputs(embedding: Array) -> Array:
        merged = nnx.merge(graph, params)
        merged.embedding = nnx.Param(embedding.reshape(-1, PAPER.width))
        tokens = jnp.arange(28, dtype=jnp.int32).reshape(2, 14)
        logits, _ = merged(tokens, {}, jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS))
        return jnp.sum(logits[0] ** 2, axis=-1)

    inputs = jax.random.normal(jax.random.key(4), (2, 14, PAPER.width))
    jacobian = jax.jit(jax.jacrev(outputs))(inputs)
    allowed = np.tril(np.ones((14, 14), bool)) & (SEGMENTS[0][:, None] == SEGMENTS[0][None])
    assert not np.any(jacobian[:, 1])
    np.testing.assert_array_equal(np.any(jacobian[:, 0], axis=-1), allowed)
