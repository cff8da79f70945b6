"""The mesh, and the sharding of parameters."""

from collections.abc import Iterator
from functools import partial
from itertools import permutations
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType

from engram_jax.costs.ahead_of_time import topology_mesh
from engram_jax.errors import InputError
from engram_jax.parameters import Matrix, Plain
from engram_jax.sharding import (
    TOKEN_AXES,
    MeshConfig,
    batch_part,
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
        (MeshConfig(1, 32, 8), 256, 8, 1, MeshConfig(1, 1, 8)),
        (MeshConfig(8, 32), 256, 8, 1, MeshConfig(1, 8)),
        (MeshConfig(context=16), 1, 8, 1, MeshConfig(1, context=8)),
        (MeshConfig(fsdp=8, context=2), 4, 8, 1, MeshConfig(1, 4, context=2)),
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


type Coordinates = np.ndarray[tuple[int, int], np.dtype[np.int64]]


def spread(coordinates: Coordinates, sizes: tuple[int, ...], wraps: list[bool]) -> float:
    """Mean hops between two chips of a group, summed over the mesh axes; the inner axes count 4×.

    Blocks gather their parameters and exchange their tokens over the inner axes, and gradients are
    summed over "data" only once a step.
    """
    extent, total = coordinates.max(axis=0) + 1, 0.0
    for axis, weight in enumerate((1, 4, 4)):
        groups = np.moveaxis(coordinates.reshape(*sizes, 3), axis, 2).reshape(-1, sizes[axis], 3)
        hops = np.abs(groups[:, :, None] - groups[:, None])
        hops = np.where(wraps, np.minimum(hops, extent - hops), hops)
        total += weight * hops.sum(axis=-1).mean()
    return total


def whole_process_orders(coordinates: Coordinates) -> Iterator[Coordinates]:
    """All orders by bits of the coordinates in which a process's 2 × 2 chips are contiguous."""
    sizes = (coordinates.max(axis=0) + 1) // (2, 2, 1)
    bits = [axis for axis, size in enumerate(sizes) for _ in range(int(size).bit_length() - 1)]
    for order in sorted(set(permutations(bits))):
        found, strides = np.zeros_like(coordinates), [1, 1, 1]
        for place, axis in enumerate((0, 1, *order)):
            bit = np.arange(len(found)) >> place & 1
            found[:, axis] += bit * strides[axis]
            strides[axis] *= 2
        yield found


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    ("topology", "wraps", "ratios"),
    [
        ("v5p:2x2x1", False, {(1, 4, 1): 1, (2, 2, 1): 1, (1, 2, 2): 1}),
        ("v5p:2x2x2", False, {(1, 8, 1): 1, (2, 4, 1): 1, (1, 4, 2): 1}),
        ("v5p:4x4x4", True, {(4, 16, 1): 1, (8, 8, 1): 1, (1, 16, 4): 1, (2, 8, 4): 1.154}),
        ("v5p:4x8x8", True, {(8, 32, 1): 1, (1, 32, 8): 1, (16, 16, 1): 1.083, (2, 16, 8): 1.05}),
        ("v5e:8x8", False, {(2, 32, 1): 1, (1, 8, 8): 1}),
        ("v5e:16x16", True, {(8, 32, 1): 1, (1, 32, 8): 1, (16, 16, 1): 1.139}),
    ],
)
def test_chips_that_exchange_are_near_each_other(
    topology: str, wraps: bool, ratios: dict[tuple[int, int, int], float]
) -> None:
    """Distances relative to the best order in which a process's chips are contiguous."""
    for shape, ratio in ratios.items():
        chips = list(topology_mesh(topology, MeshConfig(*shape)).devices.flat)
        processes = [chip.process_index for chip in chips]
        assert processes == sorted(processes)  # process p builds part p of a batch
        coordinates = np.array([chip.coords for chip in chips])
        around = [wraps and size > 2 for size in coordinates.max(axis=0) + 1]
        orders = whole_process_orders(coordinates)
        best = min(spread(order, shape, around) for order in orders)
        assert spread(coordinates, shape, around) / best == pytest.approx(ratio, abs=0.001)


@pytest.mark.usefixtures("libtpu")
def test_inner_axes_stay_within_a_slice() -> None:
    slices = topologies.get_topology_desc("v5p:2x2x2", platform="tpu", num_slices=2).devices
    mesh = make_mesh(MeshConfig(data=4, fsdp=4), slices[::-1])
    groups = mesh.devices.reshape(4, 4)
    assert [{chip.slice_index for chip in group} for group in groups] == [{0}, {0}, {1}, {1}]


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


@pytest.mark.parametrize(("local", "context", "sharing"), [(8, 4, 1), (4, 8, 2), (4, 4, 1)])
def test_processes_share_the_sequences_that_their_devices_share(
    local: int, context: int, sharing: int
) -> None:
    mesh = Mock(jax.sharding.Mesh, local_devices=range(local), shape={"context": context})
    assert batch_part(mesh).sharing == sharing
    mesh.local_devices = range(6)
    with pytest.raises(InputError, match=rf"context {context} does not fit processes of 6"):
        batch_part(mesh)
