"""The mesh, and the sharding of parameters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from engram_jax.errors import InputError
from engram_jax.parameters import Matrix, Plain
from engram_jax.sharding import (
    TOKEN_AXES,
    MeshConfig,
    extend_spec,
    fit_mesh,
    gather_parameters,
    make_mesh,
    optimizer_sharding,
    parameter_sharding,
)


@pytest.mark.parametrize(
    ("config", "rows", "devices", "processes", "found"),
    [
        (MeshConfig(), 8, 1, 1, MeshConfig(1)),
        (MeshConfig(), 8, 8, 1, MeshConfig(8)),
        (MeshConfig(fsdp=4), 8, 8, 1, MeshConfig(2, 4)),
        (MeshConfig(1, 32, 8), 256, 8, 1, MeshConfig(8)),
        (MeshConfig(1, 2, 2), 8, 8, 1, MeshConfig(2, 2, 2)),
        (MeshConfig(), 12, 8, 1, MeshConfig(4)),  # 8 do not divide a batch
        (MeshConfig(), 48, 6, 1, MeshConfig(4)),  # 6 do not divide a table
        (MeshConfig(fsdp=4), 12, 8, 2, MeshConfig(2, 4)),  # of all processes
    ],
)
def test_a_run_of_another_mesh_fits_the_devices_that_are_here(
    monkeypatch: pytest.MonkeyPatch,
    config: MeshConfig,
    rows: int,
    devices: int,
    processes: int,
    found: MeshConfig,
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [None] * devices)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    assert fit_mesh(config, rows) == found


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(fsdp=4), (2, 4, 1, 1)),
        (MeshConfig(data=2, fsdp=4), (2, 4, 1, 1)),
        (MeshConfig(data=1, fsdp=8), (1, 8, 1, 1)),
        (MeshConfig(fsdp=2, expert=2), (2, 2, 2, 1)),
        (MeshConfig(fsdp=2, context=2), (2, 2, 1, 2)),
    ],
)
def test_the_mesh_spans_all_devices(config: MeshConfig, shape: tuple[int, ...]) -> None:
    mesh = make_mesh(config)
    assert mesh.devices.shape == shape and mesh.axis_names == TOKEN_AXES
    assert mesh.axis_types == (AxisType.Explicit,) * 4
    assert {device.id for device in mesh.devices.flat} == set(range(8))


@pytest.mark.parametrize(
    "sizes", [(3, 1, 1), (-1, 3, 1), (4, 4, 1), (1, 1, 1), (-1, 16, 1), (-1, 4, 4), (-1, 2, 2, 4)]
)
def test_a_mesh_that_does_not_fit_is_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="8 devices"):
        make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize(
    "sizes", [(0, 1, 1), (-2, 1, 1), (-1, 0, 1), (1, -1, 1), (1, 1, 0), (1, 1, 1, 0)]
)
def test_impossible_sizes_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        MeshConfig(*sizes)


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
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    for config in (MeshConfig(data=2, fsdp=4), MeshConfig(data=2, fsdp=2, expert=2)):
        found = parameter_sharding(make_mesh(config), {"w": leaf}, {"w": Matrix()})
        assert found["w"].spec == jax.P(*spec)
    whole = parameter_sharding(make_mesh(MeshConfig()), {"w": leaf}, {"w": Plain()})["w"]
    assert whole.is_fully_replicated


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((6, 12, 8), ("expert", "fsdp", None)),
        ((32, 3, 8), ("expert", None, "fsdp")),  # never along the axis of the experts
        ((6, 3, 5), ("expert", None, None)),
    ],
)
def test_experts_are_dealt_out(shape: tuple, spec: tuple) -> None:
    mesh = make_mesh(MeshConfig(fsdp=4, expert=2))
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    experts = parameter_sharding(mesh, {"w": leaf}, {"w": Matrix(stacked=1, experts=True)})["w"]
    assert experts.spec == jax.P(*spec)


def test_an_optimizers_state_lies_as_its_parameters() -> None:
    mesh = make_mesh(MeshConfig(fsdp=8))
    params = {"a": {"w": jnp.zeros((16, 4))}, "w": jnp.zeros((4, 8)), "gain": jnp.zeros(3)}
    roles = {"a": {"w": Matrix()}, "w": Matrix(), "gain": Plain()}
    shardings = parameter_sharding(mesh, params, roles)
    labels = {"a": {"w": "one"}, "w": "other", "gain": "other"}
    optimizer = optax.partition(
        {"one": optax.sgd(1.0, momentum=0.9), "other": optax.adam(1.0)}, labels
    )
    state = jax.eval_shape(optimizer.init, params)
    places = optimizer_sharding(mesh, state, shardings)
    assert jax.tree.structure(places) == jax.tree.structure(state)
    found = {
        (jax.tree_util.keystr(path[-2:], simple=True, separator="/"), leaf.shape): place.spec
        for (path, leaf), place in zip(
            jax.tree.leaves_with_path(state), jax.tree.leaves(places), strict=True
        )
    }
    assert found[("a/w", (16, 4))] == jax.P("fsdp", None)
    assert found[("mu/w", (4, 8))] == found[("nu/w", (4, 8))] == jax.P(None, "fsdp")
    assert found[("mu/gain", (3,))] == jax.P(None)
    assert all(spec == jax.P() for (_, shape), spec in found.items() if not shape)


def test_parameters_are_gathered_whole_and_experts_stay() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    with jax.set_mesh(mesh):
        weight = jax.device_put(jnp.arange(16.0).reshape(8, 2), jax.P("fsdp", None))
        experts = jax.device_put(jnp.arange(16.0).reshape(2, 4, 2), jax.P("expert", "fsdp"))
        role = Matrix(stacked=1, experts=True)
        module = {"w": nnx.Param(weight), "experts": nnx.Param(experts, role=role)}
        gather = partial(gather_parameters, dtype=jnp.dtype("bfloat16"), axes=mesh.axis_names)
        gathered = jax.jit(gather)(module)
        assert gathered["w"][...].sharding.is_fully_replicated
        spec = jax.P("expert", None, None, reduced={"data", "fsdp", "context"})
        assert gathered["experts"][...].sharding.spec == spec
        np.testing.assert_array_equal(gathered["w"][...], weight)
        np.testing.assert_array_equal(gathered["experts"][...], experts)  # small whole numbers
        assert gathered["w"].dtype == jnp.float32 and gathered["experts"].dtype == jnp.bfloat16

        # The backward pass sums over all tokens, and gives every device its part.
        def square(module: dict[str, nnx.Param]) -> jax.Array:
            return jnp.sum(gather(module)["w"][...] ** 2)

        gradient = jax.jit(jax.grad(square))(module)["w"][...]
        assert gradient.sharding.spec == jax.P("fsdp", None)
        np.testing.assert_array_equal(gradient, 2 * np.arange(16.0).reshape(8, 2))


def test_outside_a_mesh_nothing_is_said_of_sharding() -> None:
    array = jnp.zeros(3)
    np.testing.assert_array_equal(gather_parameters(nnx.Param(array), array.dtype, ())[...], array)
    assert extend_spec(array, None) is None
