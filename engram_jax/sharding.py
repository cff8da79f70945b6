"""The device mesh, and how arrays lie on it.

Tokens are split over all axes of the mesh; parameters over "fsdp" alone, and every block gathers
its own just before it runs (ZeRO-3), so most layers are written as if for one device. Experts are
also dealt to "expert", and stay where they are along it: their tokens come to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from engram_jax.errors import InputError
from engram_jax.parameters import Matrix, Plain, Role, role_of
from engram_jax.typing import PyTree

type AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

TOKEN_AXES = ("data", "fsdp", "expert")


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes.

    Attributes:
        data: copies of the parameters; −1 takes all devices that the other axes leave.
        fsdp: devices that each copy of the parameters is split over; with model.remat, gathered
            parameters are not kept for the backward pass. The TPU compiler gathers in
            groups of up to 32 chips; over a whole slice of 64 or 256 it sums zeros instead, which
            sends twice as much.
        expert: devices that the experts of a layer are dealt to.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        if min(self.fsdp, self.expert) < 1 or (self.data < 1 and self.data != -1):
            raise InputError(
                f"mesh.data {self.data}, mesh.fsdp {self.fsdp} and mesh.expert {self.expert} must "
                "be at least 1; data may be -1 for all devices that the others leave."
            )


# Where the arrays of a run lie; the letters spell their axes, those of a table rows and words.
WHOLE = jax.P()
BATCH_ABT = jax.P(None, TOKEN_AXES)
TABLE_RW = jax.P(TOKEN_AXES)
ROWS_SU = jax.P(TOKEN_AXES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh, with explicit axes "data", "fsdp" and "expert".

    Args:
        config: sizes of the axes.
        devices: what it is made of; None takes all devices of all processes.

    Raises:
        InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    parts = config.fsdp * config.expert
    data = len(devices) // parts if config.data == -1 else config.data
    if data * parts != len(devices):
        raise InputError(
            f"Mesh data {config.data} × fsdp {config.fsdp} × expert {config.expert} does not fit "
            f"{len(devices)} devices; choose sizes whose product is the number of devices, or data "
            "-1."
        )
    # Process p's devices must follow those of p−1: a process builds one contiguous slice of the
    # batch. (jax.make_mesh orders TPUs by topology and interleaves processes.)
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.array(ordered).reshape(data, config.fsdp, config.expert)
    return jax.sharding.Mesh(grid, TOKEN_AXES, axis_types=(AxisType.Explicit,) * 3)


def make_abstract_mesh(config: MeshConfig) -> jax.sharding.AbstractMesh:
    """A mesh of so many devices that need not be there; data −1 is 1."""
    sizes = (max(config.data, 1), config.fsdp, config.expert)
    return jax.sharding.AbstractMesh(sizes, TOKEN_AXES, axis_types=(AxisType.Explicit,) * 3)


def platform_of(mesh: AnyMesh) -> str:
    """The platform of a mesh's devices, such as "cpu" or "tpu"; of no mesh, the default one.

    Programs for TPU are compiled on CPUs, so the mesh knows better than the default backend.
    """
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()
    return str(mesh.devices.flat[0].platform)


def parameter_sharding(mesh: AnyMesh, shapes: PyTree, roles: PyTree) -> PyTree:
    """Splits every parameter along its longest axis that divides; others are copied.

    Over "fsdp"; stacks of experts are dealt to "expert", and each expert is split over "fsdp".

    Args:
        mesh: the mesh.
        shapes: arrays or their shapes.
        roles: their roles, in the same tree (see `parameters.roles`).
    """

    def shard(leaf: Any, role: Role) -> NamedSharding:
        spec: list[str | None] = [None] * len(leaf.shape)
        axes, parts = range(len(leaf.shape)), mesh.shape["fsdp"]
        if isinstance(role, Matrix) and role.experts:
            spec[0], axes = "expert", range(1, len(leaf.shape))
        fitting = [axis for axis in axes if leaf.shape[axis] % parts == 0]
        longest = max(fitting, key=lambda axis: leaf.shape[axis], default=None)
        if longest is not None and parts > 1:
            spec[longest] = "fsdp"
        return NamedSharding(mesh, jax.P(*spec))

    return jax.tree.map(shard, shapes, roles)


def optimizer_sharding(mesh: AnyMesh, shapes: PyTree, parameters: PyTree) -> PyTree:
    """Places what an optimizer keeps of a parameter as the parameter is, and the rest whole.

    Args:
        mesh: the mesh.
        shapes: the optimizer's state or its shapes, in trees like that of the parameters.
        parameters: shardings of the parameters.
    """
    places = dict(jax.tree.leaves_with_path(parameters))

    def place(path: tuple[Any, ...], _: Any) -> NamedSharding:
        ends = (places.get(path[start:]) for start in range(len(path)))
        return next(filter(None, ends), NamedSharding(mesh, WHOLE))

    return jax.tree.map_with_path(place, shapes)


def gather_parameters[T](module: T, dtype: jnp.dtype, axes: Sequence[str]) -> T:
    """A copy of a module whose parameters lie whole on every device; experts stay dealt out.

    Matrices, embedding and head come in the dtype of the computation: in bfloat16 that halves what
    is sent. On the way back their gradients are summed over "fsdp" in that dtype, every device
    taking the part that it keeps, and that part over the other axes in float32.

    Args:
        module: a module, or a parameter.
        dtype: dtype of the computation.
        axes: mesh axes that the tokens are split over: gradients have to be summed over these.
    """
    spread = not jax.sharding.get_abstract_mesh().empty

    def gather(variable: nnx.Variable) -> nnx.Variable:
        value, role = variable[...], role_of(variable)
        if isinstance(role, Plain):
            return variable.replace(jax.sharding.reshard(value, jax.P()) if spread else value)
        if not spread:
            return variable.replace(value.astype(dtype))
        # "Reduced" over an axis: whole along it, and the gradient will be a sum not yet taken.
        spec = jax.typeof(value).sharding.spec
        copied = set(axes) - set(spec_axes(spec))
        value = jax.sharding.reshard(value, jax.P(*spec, reduced=copied)).astype(dtype)
        dealt = "expert" if isinstance(role, Matrix) and role.experts else None
        whole = jax.P(dealt, reduced=set(axes) - {dealt})
        return variable.replace(jax.sharding.reshard(value, whole))

    return jax.tree.map(gather, module, is_leaf=lambda node: isinstance(node, nnx.Variable))


def split_axes(array: jax.Array) -> tuple[str, ...]:
    """The mesh axes that an array is split over; none outside a mesh, or on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    # (One device is not only simpler: JAX cannot lower "reduced" there.)
    return () if mesh.size <= 1 else spec_axes(jax.typeof(array).sharding.spec)


def spec_axes(spec: jax.P) -> tuple[str, ...]:
    """The mesh axes that a partition names."""
    return tuple(jax.tree.leaves(tuple(spec)))


def extend_spec(array: jax.Array, *axes: str | None) -> jax.P | None:
    """The array's own partition with more axes behind; None outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return jax.P(*jax.typeof(array).sharding.spec, *axes)
