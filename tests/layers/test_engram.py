"""The Engram layer: golden values, float64 gradients, causality, the published versions."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from golden import golden_form, load_golden, released_hash, set_golden_weights
from jax import Array
from jax.sharding import AxisType
from simulation import simulation, simulation_by_xla

from engram_jax.errors import InputError
from engram_jax.hashing import DEAD
from engram_jax.layers.engram import Engram, EngramConfig
from pallas_kernels.gated_fusion import FusionImplementation

WIDTH, MEMORY = 5, 6
ON_CPU: tuple[FusionImplementation, ...] = ("reference", "xla", "pallas_tpu")


def golden_rows(golden: dict[str, np.ndarray], sizes: dict[str, Any]) -> np.ndarray:
    layer = sizes["layers"][0]
    primes = golden[f"table_sizes_{layer}"].reshape(-1)
    return golden[f"hash_{layer}"] + np.cumsum(primes) - primes


def make_layer(config: EngramConfig, branches: int = 2, seed: int = 0) -> Engram:
    """A layer with random noise on every parameter."""
    layer = Engram(WIDTH, MEMORY, config, branches=branches, rngs=nnx.Rngs(seed))
    graph, params = nnx.split(layer)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [
        leaf + 0.3 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return nnx.merge(graph, jax.tree.unflatten(tree, moved))


def draw_inputs(branches: int = 2, seed: int = 1, length: int = 14) -> tuple[Array, Array]:
    hidden, memory = jax.random.split(jax.random.key(seed))
    return (
        jax.random.normal(hidden, (2, length, branches, WIDTH)),
        jax.random.normal(memory, (2, length, MEMORY)),
    )


def engram_in_numpy(
    layer: Engram, hidden: np.ndarray, memory: np.ndarray, segments: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Equations 3 to 6, one token and one branch at a time, in the precision of the arguments."""
    config = layer.config
    p = {name: np.asarray(leaf, hidden.dtype) for name, leaf in named_parameters(layer).items()}

    def norm(x: np.ndarray, name: str, branch: int, epsilon: float) -> np.ndarray:
        gain = p[f"{name}/gain"][branch] + (1 if config.zero_centered_gain else 0)
        return x / np.sqrt(np.mean(x**2) + epsilon) * gain

    rows, length, branches, width = hidden.shape
    gates, gated = np.zeros((rows, length, branches), hidden.dtype), np.zeros_like(hidden)
    for b, t, m in np.ndindex(gates.shape):
        value = memory[b, t] @ p["value"]
        if config.bias:
            value = value + p["value_bias"]
        if not config.gated:
            gates[b, t, m], gated[b, t, m] = 1, value
            continue
        key = memory[b, t] @ p["key"][m]
        if config.bias:
            key = key + p["key_bias"][m]
        query = norm(hidden[b, t, m], "query_norm", m, config.norm_epsilon)
        score = norm(key, "key_norm", m, config.norm_epsilon) @ query / np.sqrt(width)
        sign = np.copysign(1, score) if config.signed_root == "copysign" else np.sign(score)
        gates[b, t, m] = 1 / (1 + np.exp(-sign * np.sqrt(max(abs(score), 1e-6))))
        gated[b, t, m] = gates[b, t, m] * value
    output = gated.copy()
    if config.convolution:
        for b, t, m in np.ndindex(gates.shape):
            mixed = np.zeros(width, hidden.dtype)
            for tap in range(config.kernel):
                there = t - (config.kernel - 1 - tap) * config.dilation
                alone = segments is None or config.cross_documents
                if there >= 0 and (alone or segments[b, there] == segments[b, t]):
                    normed = norm(
                        gated[b, there, m], "convolution_norm", m, config.convolution_epsilon
                    )
                    mixed += p["convolution"][tap, m] * normed
            output[b, t, m] += mixed / (1 + np.exp(-mixed))
    return output, gates


def named_parameters(layer: Engram) -> dict[str, Array]:
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@nnx.jit
def apply(layer: Engram, *inputs: Array | None, **named: Array | None) -> tuple[Array, Array]:
    return layer(*inputs, **named)


FORMS = {  # with the number of branches
    "demo": (EngramConfig(), 3),
    "plain": (EngramConfig(), 1),
    "wide taps": (EngramConfig(kernel=3, dilation=5), 2),
    "v4.1": (
        EngramConfig(bias=False, convolution=False, norm_epsilon=1e-20, signed_root="copysign"),
        2,
    ),
    "ple": (EngramConfig(zero_centered_gain=True, bias=False, norm_epsilon=1e-6), 1),
    "one tap": (EngramConfig(kernel=1), 2),
    "no gates": (EngramConfig(gated=False), 2),
}
SEGMENTS = np.array([[1] * 5 + [2] * 2 + [3] * 7, [1] * 14], np.int32)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("name", ["a_small", "b_small"])
def test_golden_forward(name: str, implementation: FusionImplementation) -> None:
    golden, sizes = load_golden(name)
    memory_width = golden["key_w"].shape[1]
    form = replace(golden_form(sizes), implementation=implementation)
    layer = Engram(
        sizes["hidden"], memory_width, form, branches=sizes["branches"], rngs=nnx.Rngs(0)
    )
    set_golden_weights(layer, golden)
    rows = golden_rows(golden, sizes)
    memory = golden["table"][rows].reshape(*rows.shape[:2], -1)
    with simulation(implementation):
        output, gate = apply(layer, jnp.asarray(golden["hidden"]), jnp.asarray(memory))
    np.testing.assert_allclose(gate, golden["gate"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(output, golden["output"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_follows_the_formula(form: str) -> None:
    layer, (hidden, memory) = make_layer(*FORMS[form]), draw_inputs(FORMS[form][1])
    for segments in (None, SEGMENTS):
        expected = engram_in_numpy(
            layer, np.asarray(hidden, np.float64), np.asarray(memory, np.float64), segments
        )
        found = apply(layer, hidden, memory, None if segments is None else jnp.asarray(segments))
        np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
        np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_float64_finite_differences(form: str) -> None:
    """Of the NumPy formula, along random directions, for every parameter and input."""
    layer, (hidden, memory) = make_layer(*FORMS[form]), draw_inputs(FORMS[form][1], length=7)
    segments = SEGMENTS[:, :7]
    graph, params = nnx.split(layer)
    weights = np.random.default_rng(3).normal(size=hidden.shape)

    def loss(params: Any, hidden: Array, memory: Array) -> Array:
        output, _ = nnx.merge(graph, params)(hidden, memory, jnp.asarray(segments))
        return jnp.sum(output * jnp.asarray(weights, jnp.float32))

    point = (params, hidden, memory)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*point)
    point64 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), point)

    def loss64(point: Any) -> float:
        output, _ = engram_in_numpy(nnx.merge(graph, point[0]), point[1], point[2], segments)
        return float(np.sum(output * weights))

    leaves, tree = jax.tree.flatten(point64)
    generator = np.random.default_rng(4)
    for number, (leaf, found) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
        direction = generator.normal(size=leaf.shape)
        ends = []
        for step in (1e-6, -1e-6):
            moved = [*leaves]
            moved[number] = leaf + step * direction
            ends.append(loss64(jax.tree.unflatten(tree, moved)))
        difference = (ends[0] - ends[1]) / 2e-6
        # Rounding of float32 is relative to the terms of the sum, because the sum can cancel.
        size = np.sum(np.abs(direction * np.asarray(found)))
        assert abs(np.sum(direction * np.asarray(found)) - difference) <= 2e-5 * size + 1e-6


def receptive_fields(config: EngramConfig) -> dict[str, np.ndarray]:
    """[t, t′]: whether the output at t of row 0 has a gradient from t′, by hidden and memory."""
    layer, (hidden, memory) = make_layer(config), draw_inputs()
    weights = jax.random.normal(jax.random.key(9), (1, 2, WIDTH))

    def outputs(hidden: Array, memory: Array) -> Array:
        return jnp.sum(layer(hidden, memory, jnp.asarray(SEGMENTS))[0][0] * weights, axis=(1, 2))

    by_hidden, by_memory = jax.jit(jax.jacrev(outputs, argnums=(0, 1)))(hidden, memory)
    assert not np.any(by_hidden[:, 1]) and not np.any(by_memory[:, 1])  # or from another row
    return {
        "hidden": np.any(by_hidden[:, 0], axis=(2, 3)),
        "memory": np.any(by_memory[:, 0], axis=2),
    }


@pytest.mark.parametrize("source", ["hidden", "memory"])
def test_no_gradient_from_the_future_or_another_document(source: str) -> None:
    config = EngramConfig(kernel=3, dilation=2)
    here, there = np.indices((14, 14))
    taps = np.isin(here - there, [0, 2, 4])
    same_document = SEGMENTS[0][:, None] == SEGMENTS[0][None]
    np.testing.assert_array_equal(receptive_fields(config)[source], taps & same_document)
    crossing = replace(config, cross_documents=True)
    np.testing.assert_array_equal(receptive_fields(crossing)[source], taps)
    without = replace(config, convolution=False)
    np.testing.assert_array_equal(receptive_fields(without)[source], here == there)


def test_a_document_in_a_packed_row_is_as_if_alone() -> None:
    layer, (hidden, memory) = make_layer(EngramConfig()), draw_inputs()
    packed, gates = apply(layer, hidden, memory, jnp.asarray(SEGMENTS))
    alone, gates_alone = apply(layer, hidden[:, 7:], memory[:, 7:])
    np.testing.assert_allclose(packed[0, 7:], alone[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gates[0, 7:], gates_alone[0], rtol=1e-6)


def test_crossing_documents_is_the_demo_on_the_whole_row() -> None:
    config = EngramConfig()
    demo, (hidden, memory) = make_layer(config), draw_inputs()
    crossing = make_layer(replace(config, cross_documents=True))
    whole, _ = apply(demo, hidden, memory)
    packed, _ = apply(crossing, hidden, memory, jnp.asarray(SEGMENTS))
    np.testing.assert_allclose(packed, whole, rtol=1e-6, atol=1e-6)
    apart, _ = apply(demo, hidden, memory, jnp.asarray(SEGMENTS))
    assert np.any(np.abs(apart - packed)[0, 7:] > 1e-2)


def test_equal_branches_are_so_many_plain_streams() -> None:
    plain = make_layer(EngramConfig(), branches=1)
    graph, _ = nnx.split(Engram(WIDTH, MEMORY, EngramConfig(), branches=3, rngs=nnx.Rngs(0)))
    branch_axis = {"key": 0, "key_bias": 0, "convolution": 1, "gain": 0}

    def triple(path: tuple, leaf: Array) -> Array:
        axis = branch_axis.get(path[-1].key)
        return leaf if axis is None else jnp.repeat(leaf, 3, axis)

    params = nnx.to_pure_dict(nnx.state(plain, nnx.Param))
    branched = nnx.merge(graph, jax.tree.map_with_path(triple, params))
    hidden, memory = draw_inputs(branches=1)
    expected, gate = apply(plain, hidden, memory, jnp.asarray(SEGMENTS))
    found, gates = apply(branched, jnp.repeat(hidden, 3, axis=2), memory, jnp.asarray(SEGMENTS))
    for branch in range(3):
        np.testing.assert_allclose(found[:, :, branch], expected[:, :, 0], atol=1e-6)
        np.testing.assert_allclose(gates[:, :, branch], gate[:, :, 0], atol=1e-6)


def test_branches_do_not_mix() -> None:
    layer, (hidden, memory) = make_layer(EngramConfig(), branches=3), draw_inputs(branches=3)
    before, _ = apply(layer, hidden, memory)
    after, _ = apply(layer, hidden.at[:, :, 1].add(1.0), memory)
    same = np.asarray(before) == np.asarray(after)
    assert same[:, :, [0, 2]].all() and not same[:, :, 1].all()


@pytest.mark.parametrize(
    ("signed_root", "gates"),
    [("sign", {0.5}), ("copysign", {1 / (1 + np.exp(-1e-3)), 1 / (1 + np.exp(1e-3))})],
)
def test_the_signed_root_of_zero(signed_root: str, gates: set[float]) -> None:
    """With rows of zeros, the gate and its gradient are finite."""
    config = EngramConfig(bias=False, norm_epsilon=1e-20, signed_root=signed_root)
    layer = Engram(WIDTH, MEMORY, config, rngs=nnx.Rngs(0))
    hidden = jnp.stack([jnp.ones((1, 2, 1, WIDTH)), -jnp.ones((1, 2, 1, WIDTH))])[:, 0]
    _, gate = layer.fuse(hidden, jnp.zeros((2, 2, 1, WIDTH)), jnp.zeros((2, 2, WIDTH)))
    assert all(min(abs(float(g) - expected) for expected in gates) < 1e-7 for g in gate.ravel())

    def loss(memory: Array) -> Array:
        output, gate = layer(hidden, memory)
        return jnp.sum(output) + jnp.sum(gate)

    gradient = jax.grad(loss)(jnp.zeros((2, 2, MEMORY)))
    assert np.isfinite(gradient).all() and np.any(gradient)


def test_gate_rises_with_the_score_and_is_one_half_at_zero() -> None:
    layer = Engram(1, 1, EngramConfig(norm_epsilon=1e-20), rngs=nnx.Rngs(0))
    scores = jnp.array([-4.0, -0.25, 0.25, 4.0])
    layer.key_norm.gain = nnx.Param(jnp.ones((1, 1)))
    gates = []
    for score in scores:
        layer.query_norm.gain = nnx.Param(score.reshape(1, 1))
        one = jnp.ones((1, 1, 1, 1))
        gates.append(layer.fuse(one, one, one[..., 0])[1].item())
    np.testing.assert_allclose(gates, 1 / (1 + np.exp([2, 0.5, -0.5, -2])), rtol=1e-6)


def test_dead_positions_have_a_closed_gate_and_give_nothing() -> None:
    layer, (hidden, memory) = make_layer(EngramConfig()), draw_inputs()
    mask = np.ones((2, 14), bool)
    mask[0, 3] = mask[1, 5:9] = False
    output, gate = apply(layer, hidden, memory, token_mask=jnp.asarray(mask))
    plain, open_gate = apply(layer, hidden, memory)
    np.testing.assert_array_equal(np.asarray(gate)[~mask], 0)
    np.testing.assert_array_equal(np.asarray(gate)[mask], np.asarray(open_gate)[mask])
    without = Engram(WIDTH, MEMORY, EngramConfig(convolution=False), branches=2, rngs=nnx.Rngs(0))
    output, _ = apply(without, hidden, memory, token_mask=jnp.asarray(mask))
    np.testing.assert_array_equal(np.asarray(output)[~mask], 0)
    assert np.all(np.any(np.asarray(output)[mask], axis=-1)) and plain.shape == output.shape


def test_the_layer_begins_as_the_gated_value_alone() -> None:
    config = EngramConfig()
    with_taps = Engram(WIDTH, MEMORY, config, rngs=nnx.Rngs(0))
    without = Engram(WIDTH, MEMORY, replace(config, convolution=False), rngs=nnx.Rngs(0))
    hidden, memory = draw_inputs(branches=1)
    np.testing.assert_array_equal(with_taps(hidden, memory)[0], without(hidden, memory)[0])

    def loss(layer: Engram) -> Array:
        return jnp.sum(layer(hidden, memory)[0] ** 3)

    assert np.any(nnx.grad(loss)(with_taps).convolution[...])  # taps of zero have a gradient


def test_without_bias_there_are_no_bias_parameters() -> None:
    layer = Engram(WIDTH, MEMORY, FORMS["v4.1"][0], branches=2, rngs=nnx.Rngs(0))
    names = set(named_parameters(layer))
    assert names == {"key", "value", "key_norm/gain", "query_norm/gain"}


def test_zero_centered_gains_start_as_ones() -> None:
    hidden, memory = draw_inputs(branches=1)
    plain = Engram(WIDTH, MEMORY, EngramConfig(), rngs=nnx.Rngs(0))
    centered = Engram(WIDTH, MEMORY, EngramConfig(zero_centered_gain=True), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(centered.key_norm.gain[...], 0)
    np.testing.assert_array_equal(centered(hidden, memory)[0], plain(hidden, memory)[0])


def test_bfloat16_stays_near_float32() -> None:
    layer, (hidden, memory) = make_layer(EngramConfig()), draw_inputs()
    expected, expected_gate = apply(layer, hidden, memory)
    layer.dtype = jnp.dtype("bfloat16")
    output, gate = apply(layer, hidden.astype(jnp.bfloat16), memory)
    assert output.dtype == jnp.bfloat16 and gate.dtype == jnp.float32
    # bfloat16 rounds to 2⁻⁸; the root is steep where the score is near zero.
    np.testing.assert_allclose(gate, expected_gate, atol=0.03)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(output.astype(jnp.float32), expected, atol=0.02 * scale)


@pytest.mark.parametrize(
    "change", [{"kernel": 0}, {"dilation": 0}, {"gated": False, "implementation": "xla"}]
)
def test_impossible_forms_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"at least 1|without gates"):
        EngramConfig(**change)


def scaled_fp8(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """fp8 e4m3 bytes times one power of two, 2^(byte − 127), per block."""
    values = weight.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scales = 2.0 ** (scale.astype(np.float64) - 127)
    return values * scales.repeat(block[0], 0).repeat(block[1], 1).astype(np.float32)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layer_id", [1, 3])
def test_released_miniature(
    layer_id: int, masked: bool, implementation: FusionImplementation
) -> None:
    """DeepSeek-V4.1's version, with its fp8 weights, and its rows from our hash."""
    golden, sizes = load_golden("f_v41_mini")
    ngram_hash = released_hash(golden, sizes)
    mask, which = golden["token_mask"], f"masked_{layer_id}" if masked else str(layer_id)
    ids = np.where(mask, golden["ids"], DEAD) if masked else golden["ids"]

    embed = scaled_fp8(
        golden[f"embed.weight_{layer_id}"], golden[f"embed.scale_{layer_id}"], (1, 32)
    )
    fused = scaled_fp8(
        golden[f"wkv.weight_{layer_id}"], golden[f"wkv.scale_{layer_id}"], (32, 32)
    ).T
    width, branches = sizes["hidden_size"], sizes["hc_mult"]
    memory = embed[ngram_hash.hash_tokens(layer_id, ids)].reshape(1, len(ids), -1)
    config = EngramConfig(
        bias=False,
        convolution=False,
        norm_epsilon=1e-20,
        signed_root="copysign",
        implementation=implementation,
    )
    layer = Engram(
        *(width, memory.shape[-1], config),
        branches=branches,
        dtype=jnp.dtype("bfloat16"),
        rngs=nnx.Rngs(0),
    )
    # One matrix: the keys of all branches, then the value.
    keys = fused[:, :-width].reshape(-1, branches, width).swapaxes(0, 1)
    layer.key, layer.value = nnx.Param(jnp.asarray(keys)), nnx.Param(jnp.asarray(fused[:, -width:]))
    layer.key_norm.gain = nnx.Param(jnp.asarray(golden[f"k_weight_{layer_id}"]))
    layer.query_norm.gain = nnx.Param(jnp.asarray(golden[f"q_weight_{layer_id}"]))
    before = {1: "hidden", 3: "output_masked_1" if masked else "output_1"}[layer_id]
    hidden = golden[before][None]
    with simulation(implementation):
        output, gate = apply(
            layer,
            jnp.asarray(hidden),
            jnp.asarray(memory),
            token_mask=jnp.asarray(mask[None]) if masked else None,
        )
    # Both round keys to bfloat16. With keys computed in float64, results are equal to float32's
    # precision. But a key close to the middle of two bfloat16 numbers can round differently, which
    # changes one of the score's 64 terms (below 8 before the root) by a factor of 1 ± 2⁻⁷.
    exact = np.einsum("bte,med->btmd", memory.astype(np.float64), keys.astype(np.float64))
    exact_key = jnp.asarray(exact.astype(ml_dtypes.bfloat16))
    with simulation(implementation):
        _, exact_gate = layer.fuse(
            jnp.asarray(hidden), exact_key, jnp.zeros_like(exact_key[:, :, 0])
        )
    exact_gate = np.where(mask[:, None] | (not masked), exact_gate[0], 0)
    np.testing.assert_allclose(exact_gate, golden[f"gate_{which}"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(gate[0], golden[f"gate_{which}"], rtol=0, atol=1e-3)
    expected = golden[f"output_{which}"]
    # Rounding to bfloat16 (8 significant bits) has a relative error of at most 2⁻⁸. Here, gate and
    # gated value are rounded; in the released code, the sum with the residual stream.
    found = hidden[0] + np.asarray(output[0], np.float32)
    bound = 2.0**-8 * (2.01 * np.abs(np.asarray(output[0], np.float32)) + np.abs(expected)) + 1e-6
    assert (np.abs(found - expected) <= bound).all()
    if masked:
        np.testing.assert_array_equal(expected[~mask], hidden[0][~mask])
        np.testing.assert_array_equal(output[0][~mask], 0)


@pytest.mark.parametrize(
    ("crossing", "split_t", "implementation"),
    [
        (False, "sequence", "xla"),
        (True, "sequence", "xla"),
        pytest.param(False, None, "xla", marks=pytest.mark.slow),
        pytest.param(False, "sequence", "pallas_tpu", marks=pytest.mark.slow),
        pytest.param(True, None, "xla", marks=pytest.mark.slow),
        pytest.param(True, "sequence", "pallas_tpu", marks=pytest.mark.slow),
        pytest.param(False, None, "pallas_tpu", marks=pytest.mark.slow),
        pytest.param(True, None, "pallas_tpu", marks=pytest.mark.slow),
    ],
)
def test_the_layer_is_the_same_with_its_tokens_split_over_devices(
    crossing: bool, split_t: str | None, implementation: FusionImplementation
) -> None:
    """Values and gradients, with B and T split; the convolution looks 9 positions back.

    In the first row, documents cross the edges of the devices' parts of T. In the second, one ends
    exactly there, and the device after must not read it.
    """
    config = EngramConfig(cross_documents=crossing)
    layer = make_layer(replace(config, implementation=implementation))
    hidden, memory = draw_inputs(length=48)
    lengths = [11, 2, 24, 11], [12, 11, 14, 11]
    documents = [1, 2, 3, 4], [5, 6, 7, 0]
    segments = jnp.asarray(np.stack([*map(np.repeat, documents, lengths)]))
    mask = segments > 0

    def loss(hidden: Array, memory: Array, params: Any, *rest: Array) -> tuple[Array, Any]:
        added, gates = nnx.merge(graph, params)(hidden, memory, *rest)
        return jnp.sum(jnp.sin(added)), (added, gates)

    graph, params = nnx.split(layer)
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    with simulation_by_xla():
        expected = run(hidden, memory, params, segments, mask)
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh), simulation_by_xla():
        split = [
            jax.device_put(array, jax.NamedSharding(mesh, jax.P("data", split_t)))
            for array in (hidden, memory, segments, mask)
        ]
        whole = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        found = run(*split[:2], whole, *split[2:])
        _, (added, _) = found[0]
        assert added.sharding.spec[:2] == ("data", split_t)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-5, err_msg=name)


def test_a_stream_that_is_split_over_its_channels_is_refused() -> None:
    layer = Engram(8, MEMORY, EngramConfig(), rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((8,), ("channels",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh), pytest.raises(InputError, match=r"splits of B and T only"):
        hidden = jnp.zeros((1, 12, 1, 8), out_sharding=jax.P(None, None, None, "channels"))
        layer(hidden, jnp.zeros((1, 12, MEMORY), out_sharding=jax.P()))


def test_too_short_a_part_of_the_tokens_is_refused() -> None:
    layer = Engram(WIDTH, MEMORY, EngramConfig(), rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh), pytest.raises(InputError, match=r"6 positions.*looks 9"):
        split = jax.P(None, "sequence")
        hidden = jnp.zeros((1, 48, 1, WIDTH), out_sharding=split)
        layer(hidden, jnp.zeros((1, 48, MEMORY), out_sharding=split))
