"""Parameter groups, decay and learning rate, compared with optax and with NumPy."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from engram_jax.layers.hyper_connections import HyperConnectionsConfig
from engram_jax.layers.latent_attention import LatentAttentionConfig
from engram_jax.layers.mixture_of_experts import ExpertsConfig
from engram_jax.memory.layout import RowState
from engram_jax.memory.row_adam import RowAdamConfig, make_row_adam
from engram_jax.model import Decoder, DecoderConfig, MemorySites
from engram_jax.muon import scale_by_muon
from engram_jax.optimizer import OptimizerConfig, make_optimizer, make_schedule
from engram_jax.parameters import Connection, Matrix, Plain, VocabularyMatrix, roles
from engram_jax.sharding import MeshConfig, make_mesh, parameter_sharding
from engram_jax.typing import Parameters, PyTree

type Choice = Literal["adam", "muon"]

ROLES = {
    "embedding": VocabularyMatrix(),
    "block": {
        "gain": Plain(),
        "up": Matrix(),
        "experts": Matrix(stacked=1, experts=True),
        "connection": Connection(),
    },
}
SHAPES = {
    "embedding": (16, 8),
    "block": {"gain": (8,), "up": (8, 16), "experts": (4, 8, 16), "connection": (2, 8, 3)},
}
RATE = 0.01


def draw(seed: int) -> Parameters:
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(generator.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def run(optimizer: optax.GradientTransformation, params: PyTree, *gradients: PyTree) -> PyTree:
    """The parameters after one step for each gradient."""
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def train(choice: Choice, params: Parameters, *gradients: Parameters) -> Parameters:
    config = OptimizerConfig(matrices=choice, b1=0.8, b2=0.9, muon_momentum=0.7, muon_steps=3)
    return run(make_optimizer(config, optax.constant_schedule(RATE), ROLES), params, *gradients)


def assert_equal(found: PyTree, expected: PyTree) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, expected
    )


@pytest.mark.parametrize("choice", ["adam", "muon"])
def test_without_gradients_matrices_decay_and_nothing_else_moves(choice: Choice) -> None:
    params = draw(0)
    found = train(choice, params, *[jax.tree.map(jnp.zeros_like, params)] * 2)
    np.testing.assert_array_equal(found["embedding"], params["embedding"])
    np.testing.assert_array_equal(found["block"]["gain"], params["block"]["gain"])
    for name in ("up", "experts"):
        kept = (1 - RATE * 0.1) ** 2
        np.testing.assert_allclose(found["block"][name], kept * params["block"][name], rtol=1e-6)


@pytest.mark.parametrize("choice", ["adam", "muon"])
def test_lookups_and_gains_have_adamw_without_decay(choice: Choice) -> None:
    params, gradients = draw(0), [draw(seed) for seed in (1, 2, 3)]
    found = train(choice, params, *gradients)

    def plain(tree: Parameters) -> PyTree:
        return tree["embedding"], tree["block"]["gain"]

    alone = optax.adamw(RATE, b1=0.8, b2=0.9, eps=1e-8, weight_decay=0.0)
    assert_equal(plain(found), run(alone, plain(params), *map(plain, gradients)))


def test_matrices_have_adamw_with_decay_by_default() -> None:
    params, gradients = draw(0), [draw(seed) for seed in (1, 2, 3)]
    found = train("adam", params, *gradients)
    alone = optax.adamw(RATE, b1=0.8, b2=0.9, eps=1e-8, weight_decay=0.1)
    expected = run(alone, params, *gradients)
    for name in ("up", "experts"):
        assert_equal(found["block"][name], expected["block"][name])


def test_matrices_have_muon_with_decoupled_decay_if_asked() -> None:
    params, gradients = draw(0), [draw(seed) for seed in (1, 2, 3)]
    found = train("muon", params, *gradients)
    for name in ("up", "experts"):
        muon = scale_by_muon({"w": ROLES["block"][name]}, momentum=0.7, steps=3)
        expected, state = params["block"][name], muon.init({"w": params["block"][name]})
        for gradient in gradients:
            updates, state = muon.update({"w": gradient["block"][name]}, state)
            expected = expected - RATE * (updates["w"] + 0.1 * expected)
        np.testing.assert_allclose(found["block"][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("choice", ["adam", "muon"])
def test_roles_may_have_rates_of_their_own(choice: Choice) -> None:
    """The factor also applies to weight decay. Plain parameters have factor 1."""
    start, gradients = draw(0), draw(1)

    def updates(config: OptimizerConfig) -> PyTree:
        optimizer = make_optimizer(config, optax.constant_schedule(RATE), ROLES)
        return jax.jit(optimizer.update)(gradients, optimizer.init(start), start)[0]

    whole = updates(OptimizerConfig(choice))
    rates = {"matrix_factor": 0.5, "lookup_factor": 4.0, "connection_factor": 0.1}
    found = updates(OptimizerConfig(choice, **rates))
    block = {"gain": 1.0, "up": 0.5, "experts": 0.5, "connection": 0.1}
    factors = {"embedding": 4.0, "block": block}
    assert_equal(found, jax.tree.map(lambda update, factor: factor * update, whole, factors))


def test_the_default_keeps_the_state_of_adamw() -> None:
    """Checkpoints of runs without Muon have this structure."""
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(RATE), ROLES)
    expected = optax.adamw(optax.constant_schedule(RATE), mask=lambda _: ROLES).init(draw(0))
    assert jax.tree.structure(optimizer.init(draw(0))) == jax.tree.structure(expected)


@pytest.mark.parametrize("choice", ["adam", "muon"])
def test_a_mesh_trains_as_one_device(choice: Choice) -> None:
    params, gradients = draw(0), [draw(seed) for seed in (1, 2)]
    expected = train(choice, params, *gradients)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    places = parameter_sharding(mesh, params, ROLES)
    with jax.set_mesh(mesh):
        found = train(choice, *(jax.device_put(tree, places) for tree in (params, *gradients)))

    def compare(found: jax.Array, expected: jax.Array, place: jax.NamedSharding) -> None:
        assert found.sharding.is_equivalent_to(place, found.ndim)
        np.testing.assert_allclose(found, expected, atol=1e-6)

    jax.tree.map(compare, found, expected, places)


PAPERS = DecoderConfig(
    layers=2,
    attention=LatentAttentionConfig(query_rank=16),
    experts=ExpertsConfig(),
    hyper_connections=HyperConnectionsConfig(),
    tie_embeddings=False,
)


@pytest.mark.parametrize("config", [DecoderConfig(layers=2, tie_embeddings=False), PAPERS])
@pytest.mark.parametrize(
    "sites",
    [MemorySites(layers=(1,), width=8), MemorySites(input="over_encoding", width=8, orders=2)],
)
def test_what_is_no_hidden_matrix_of_a_decoder_does_not_decay(
    sites: MemorySites, config: DecoderConfig
) -> None:

    def make() -> Decoder:
        return Decoder(config, sites, rngs=nnx.Rngs(params=0, memory=1))

    undecayed = {"gain", "key_bias", "value_bias", "embedding", "head", "convolution", "router"}
    found = roles(nnx.state(nnx.eval_shape(make), nnx.Param))
    for path, role in jax.tree.leaves_with_path(found):
        connection = "_connection" in jax.tree_util.keystr(path)
        assert isinstance(role, Connection) == connection
        assert isinstance(role, Matrix) != (connection or path[-1].key in undecayed), path


STEP_DECAY = OptimizerConfig(learning_rate=2.0, warmup_steps=4, decay="steps")


def test_the_step_schedule_takes_its_steps() -> None:
    """By finished steps, of 30: warm-up to step 5, constant to 24, 0.316 to 27, then 0.1."""
    schedule = make_schedule(STEP_DECAY, 30)
    expected = [0.4, 0.8, 1.2, 1.6] + [2.0] * 20 + [0.632] * 3 + [0.2] * 5
    done = np.arange(32)
    np.testing.assert_allclose(schedule(done), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(done), expected, rtol=1e-6)
    np.testing.assert_allclose([schedule(int(step)) for step in done], expected, rtol=1e-6)


@pytest.mark.parametrize("steps", [7, 10, 50_000])
def test_the_step_schedule_falls_at_80_and_90_percent(steps: int) -> None:
    schedule = make_schedule(STEP_DECAY, steps)
    done = np.arange(4, steps)
    rates = np.where(done * 100 < 80 * steps, 2.0, np.where(done * 100 < 90 * steps, 0.632, 0.2))
    np.testing.assert_allclose(schedule(done), rates, rtol=1e-6)


def test_both_schedules_warm_up_alike() -> None:
    cosine = make_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=4), 1000)
    done = np.arange(5)
    np.testing.assert_allclose(make_schedule(STEP_DECAY, 1000)(done), cosine(done), rtol=1e-6)


@pytest.mark.parametrize("written", [1, 40, 79, 80, 85, 95])
def test_exact_row_adam_owes_idle_rows_the_steps_of_the_schedule(written: int) -> None:
    """Dense Adam in float64 with one gradient, at step `written` of 100."""
    schedule = make_schedule(STEP_DECAY, 100)
    config = RowAdamConfig(form="exact", factor=1.0)
    adam = make_row_adam(config, schedule, 100)
    nothing = jnp.zeros((1, 1))
    row = RowState(nothing, nothing, nothing, jnp.zeros(1, jnp.int32))
    row = adam.update(row, jnp.full((1, 1), 0.3), jnp.int32(written - 1))
    rates = np.asarray(schedule(np.arange(100)), np.float64)
    value = mean = square = 0.0
    for step in range(1, 101):
        gradient = 0.3 if step == written else 0.0
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        root = np.sqrt(square / (1 - 0.999**step)) + 1e-8
        value -= rates[step - 1] * mean / (1 - 0.9**step) / root
        if step >= written:
            np.testing.assert_allclose(adam.current(row, jnp.int32(step)), value, rtol=3e-5)


def test_another_schedule_is_no_other_program() -> None:
    one, other = (
        make_row_adam(RowAdamConfig(form="exact"), make_schedule(config, steps), steps)
        for config, steps in ((STEP_DECAY, 30), (OptimizerConfig(warmup_steps=9), 1000))
    )
    shapes = [jax.tree.map(jnp.shape, adam) for adam in (one, other)]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    assert jax.tree.leaves(shapes[0]) == jax.tree.leaves(shapes[1])
    done = jnp.int32(29)
    np.testing.assert_allclose(one.learning_rate(done), make_schedule(STEP_DECAY, 30)(29))
    np.testing.assert_allclose(one.learning_rate(done + 400), one.learning_rate(done + 1))
