"""Muon compared with NumPy's singular value decomposition; meshes compared with one device."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from engram_jax import muon
from engram_jax.muon import orthogonalize, orthogonalize_all, scale_by_muon
from engram_jax.parameters import Matrix
from engram_jax.sharding import MeshConfig, make_mesh, parameter_sharding

type Parameters = dict[str, np.ndarray]

EXPERTS = Matrix(stacked=1, experts=True)
# Shape, role and (matrices, inputs, outputs). On eight devices they are split along inputs,
# outputs, one of two such axes, the axis of a stack, or not at all. The number of matrices of a
# kind is mostly not a multiple of the number of devices.
PARAMETERS = {
    "query": ((16, 3, 4), Matrix(), (1, 16, 12)),
    "by_head": ((3, 4, 16), Matrix(inputs=2), (1, 12, 16)),
    "by_feature": ((2, 8, 6), Matrix(inputs=2), (1, 16, 6)),
    "gate": ((8, 16, 24), EXPERTS, (8, 16, 24)),
    "up": ((8, 16, 24), EXPERTS, (8, 16, 24)),
    "down": ((8, 24, 16), EXPERTS, (8, 24, 16)),
    "few": ((3, 32, 8), Matrix(stacked=1), (3, 32, 8)),
    "also_few": ((8, 32, 8), Matrix(stacked=1), (8, 32, 8)),
    "many": ((16, 4, 6), Matrix(stacked=1), (16, 4, 6)),
    "indivisible": ((7, 5), Matrix(), (1, 7, 5)),
    "like_many": ((4, 6), Matrix(), (1, 4, 6)),
}
ROLES = {name: role for name, (_, role, _) in PARAMETERS.items()}
GROUP = muon._GROUP_BYTES
MESHES = [
    ((2, 2, 2), GROUP),
    ((2, 2, 2), 1),
    *(pytest.param(sizes, GROUP, marks=pytest.mark.slow) for sizes in ((1, 8, 1), (2, 4, 1))),
    pytest.param((1, 1, 8), GROUP, marks=pytest.mark.slow),
]

apply = jax.jit(lambda parameters: orthogonalize_all(parameters, ROLES, 5))


def draw(inputs: int, outputs: int, least: float, seed: int = 0) -> np.ndarray:
    """A matrix whose singular values go from 1 down to `least`."""
    generator, rank = np.random.default_rng(seed), min(inputs, outputs)
    left, right = (np.linalg.qr(generator.normal(size=(n, rank)))[0] for n in (inputs, outputs))
    return left * np.geomspace(1, least, rank) @ right.T


def draw_all() -> Parameters:
    """Small singular values would magnify the rounding of float32 up to 485 times, 3.4445⁵."""
    return {
        name: np.stack([draw(inputs, outputs, 0.5, seed) for seed in range(count)])
        .reshape(shape)
        .astype(np.float32)
        for name, (shape, _, (count, inputs, outputs)) in PARAMETERS.items()
    }


def update_in_float64(matrix: np.ndarray) -> np.ndarray:
    """Singular values under the quintic, singular vectors as they were, times the scale."""
    left, values, right = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    values /= np.sqrt(np.sum(values**2))
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return 0.2 * np.sqrt(max(matrix.shape)) * (left * values) @ right


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16), (1, 9)])
def test_singular_values_become_about_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = draw(*shape, least=0.03)
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    found = np.asarray(orthogonalize(jnp.asarray(matrix, jnp.float32), 5), np.float64)
    inside = left.T @ found @ right.T
    values = np.diag(inside)
    assert values.min() > 0.6 and values.max() < 1.3
    np.testing.assert_allclose(inside, np.diag(values), atol=2e-5)
    np.testing.assert_allclose(left * values @ right, found, atol=2e-5)


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_matrix_of_a_parameter_is_updated_apart(name: str) -> None:
    shape, _, (count, inputs, outputs) = PARAMETERS[name]
    given = draw_all()
    found = apply(given)[name]
    assert found.shape == shape
    matrices = given[name].reshape(count, inputs, outputs)
    expected = np.stack([update_in_float64(matrix) for matrix in matrices])
    np.testing.assert_allclose(np.reshape(found, expected.shape), expected, atol=3e-6)


@pytest.mark.parametrize("shape", [(64, 8), (8, 64), (32, 32)])
def test_the_root_mean_square_is_adams(shape: tuple[int, int]) -> None:
    """0.2, times the root mean square of singular values about one."""
    found = orthogonalize_all({"w": jnp.asarray(draw(*shape, 0.1))}, {"w": Matrix()}, 5)["w"]
    assert 0.2 * 0.68 < float(jnp.sqrt(jnp.mean(found**2))) < 0.2 * 1.14


def test_the_momentum_is_nesterovs() -> None:
    gradients = [draw(6, 9, 0.3, seed).astype(np.float32) for seed in range(4)]
    transformation = scale_by_muon({"w": Matrix()}, momentum=0.9, steps=5)
    state = transformation.init({"w": jnp.zeros((6, 9))})
    mean = np.zeros((6, 9))
    for gradient in gradients:
        found, state = transformation.update({"w": jnp.asarray(gradient)}, state)
        mean = 0.9 * mean + gradient
        expected = update_in_float64(0.9 * mean + gradient)
        np.testing.assert_allclose(found["w"], expected, atol=3e-6)
    # Without Nesterov momentum, the last update is different.
    assert np.abs(update_in_float64(mean) - expected).max() > 0.01


def test_zero_momentum_moves_nothing() -> None:
    """Of a complete parameter, and of an expert that no token chose."""
    gradients = {name: np.zeros_like(array) for name, array in draw_all().items()}
    gradients["gate"][1:] = draw_all()["gate"][1:]
    for name, found in apply(gradients).items():
        np.testing.assert_array_equal(found[:1] if name == "gate" else found, 0)
        assert np.all(np.isfinite(found))
    assert np.all(np.any(apply(gradients)["gate"][1:], axis=(1, 2)))


def assert_a_mesh_updates_as_one_device(
    given: Parameters, sizes: tuple[int, int, int], steps: int, limit: float
) -> None:
    """Compares to `limit` × the largest update of every parameter."""
    apply = partial(orthogonalize_all, roles=ROLES, steps=steps)
    expected = jax.device_get(jax.jit(apply)(given))
    mesh = make_mesh(MeshConfig(*sizes))
    places = parameter_sharding(mesh, given, ROLES)
    with jax.set_mesh(mesh):
        found = jax.jit(apply)(jax.device_put(given, places))
    for name, array in found.items():
        assert array.sharding.is_equivalent_to(places[name], array.ndim)
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(array / scale, expected[name] / scale, atol=limit, err_msg=name)


@pytest.mark.parametrize(("sizes", "group_bytes"), MESHES)
def test_a_mesh_updates_as_one_device(
    sizes: tuple[int, int, int], group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all parameters of a kind in one group, and with a group for each.

    With two iterations, because five magnify rounding differences above 1e-6.
    """
    monkeypatch.setattr(muon, "_GROUP_BYTES", group_bytes)
    assert_a_mesh_updates_as_one_device(draw_all(), sizes, steps=2, limit=1e-6)


def test_a_mesh_updates_as_one_device_by_all_iterations() -> None:
    """In float64, where the magnified rounding of five iterations is still small."""
    with jax.enable_x64(True):
        given = {name: array.astype(np.float64) for name, array in draw_all().items()}
        assert_a_mesh_updates_as_one_device(given, (2, 2, 2), steps=5, limit=1e-12)


def test_devices_share_the_work() -> None:
    """Eleven equal matrices over eight devices: two rounds, each of one matrix per device."""
    mesh = make_mesh(MeshConfig(fsdp=8))
    roles = {str(number): Matrix() for number in range(11)}
    place = jax.NamedSharding(mesh, jax.P(("fsdp", "expert"), None))
    shapes = dict.fromkeys(roles, jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=place))
    with jax.set_mesh(mesh):
        update = jax.jit(partial(orthogonalize_all, roles=roles, steps=5))
        text = update.lower(shapes).compile().as_text()
    assert len(re.findall(r" all-to-all(?:-start)?\(", text)) == 2
    assert not re.search(r"all-gather|all-reduce|collective-permute", text)
    assert '"known_trip_count":{"n":"2"}' in text
    assert len(re.findall(r" dot\(", text)) == 3  # of the iteration


def test_momentum_lies_as_its_parameter() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    transformation = scale_by_muon(ROLES, momentum=0.95, steps=5)
    places = parameter_sharding(mesh, draw_all(), ROLES)
    with jax.set_mesh(mesh):
        given = jax.device_put(draw_all(), places)
        state = jax.jit(transformation.init)(given)
        _, state = jax.jit(transformation.update)(given, state)
    assert isinstance(state[0], optax.TraceState)
    for name, momentum in state[0].trace.items():
        assert momentum.dtype == jnp.float32
        assert momentum.sharding.is_equivalent_to(places[name], momentum.ndim)


def test_a_matrix_split_along_two_axes_is_refused() -> None:
    mesh = make_mesh(MeshConfig(fsdp=4, expert=2))
    with jax.set_mesh(mesh):
        array = jax.device_put(jnp.zeros((8, 8)), jax.NamedSharding(mesh, jax.P("fsdp", "expert")))
        with pytest.raises(ValueError, match="split along one axis"):
            orthogonalize_all({"w": array}, {"w": Matrix()}, 5)
