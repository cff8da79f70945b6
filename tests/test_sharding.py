"""The mesh, and how parameters lie on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from engram_jax.errors import InputError
from engram_jax.sharding import (
    TOKEN_AXES,
    MeshConfig,
    extend_spec,
    gather_parameters,
    make_mesh,
    parameter_sharding,
)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1)),
        (MeshConfig(fsdp=4), (2, 4)),
        (MeshConfig(data=2, fsdp=4), (2, 4)),
        (MeshConfig(data=1, fsdp=8), (1, 8)),
    ],
)
def test_the_mesh_spans_all_devices(config: MeshConfig, shape: tuple[int, int]) -> None:
    mesh = make_mesh(config)
    assert mesh.devices.shape == shape and mesh.axis_names == TOKEN_AXES
    assert mesh.axis_types == (AxisType.Explicit,) * 2
    assert {device.id for device in mesh.devices.flat} == set(range(8))


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (4, 4), (1, 1), (-1, 16)])
def test_a_mesh_that_does_not_fit_is_refused(data: int, fsdp: int) -> None:
    with pytest.raises(InputError, match="8 devices"):
        make_mesh(MeshConfig(data, fsdp))


@pytest.mark.parametrize(("data", "fsdp"), [(0, 1), (-2, 1), (-1, 0), (1, -1)])
def test_impossible_sizes_are_refused(data: int, fsdp: int) -> None:
    with pytest.raises(InputError, match="at least 1"):
        MeshConfig(data, fsdp)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((16, 12), ("fsdp", None)),
        ((12, 16), (None, "fsdp")),
        ((7, 12), (None, "fsdp")),  # 7 is odd
        ((17, 8, 4), (None, "fsdp", None)),
        ((7, 3), (None, None)),
        ((5,), (None,)),
        ((), ()),
    ],
)
def test_parameters_are_split_along_their_longest_axis(shape: tuple, spec: tuple) -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert parameter_sharding(mesh, {"w": leaf})["w"].spec == jax.P(*spec)
    whole = parameter_sharding(make_mesh(MeshConfig()), {"w": leaf})["w"]
    assert whole.is_fully_replicated


def test_parameters_are_gathered_whole() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with jax.set_mesh(mesh):
        weight = jax.device_put(jnp.arange(16.0).reshape(8, 2), jax.P("fsdp", None))
        gathered = jax.jit(gather_parameters)({"w": weight})["w"]
        assert gathered.sharding.is_fully_replicated
        np.testing.assert_array_equal(gathered, weight)
        # The way back sums over all tokens and gives every device its own part.
        gradient = jax.jit(jax.grad(lambda w: jnp.sum(gather_parameters(w) ** 2)))(weight)
        assert gradient.sharding.spec == jax.P("fsdp", None)
        np.testing.assert_array_equal(gradient, 2 * np.arange(16.0).reshape(8, 2))


def test_outside_a_mesh_nothing_is_said_of_sharding() -> None:
    array = jnp.zeros(3)
    assert gather_parameters(array) is array
    assert extend_spec(array, None) is None
