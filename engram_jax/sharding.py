"""The device mesh, and the sharding of arrays on it.

Tokens are split over all axes of the mesh: B over "data", "fsdp" and "expert", and T over "context"
(context parallelism). Parameters are split over "fsdp" only, and every block gathers its parameters
just before it runs (ZeRO-3). So most layers are written as if for one device. Experts are also
split over "expert" (expert parallelism). They are not gathered over that axis: the tokens are
exchanged instead. Only two layers read other positions of a sequence, and thus of other devices:
attention (`layers/context.py`) and Engram's convolution (`layers/engram.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from engram_jax.batch_part import BatchPart
from engram_jax.errors import InputError
from engram_jax.parameters import Matrix, Plain, Role, role_of
from engram_jax.typing import PyTree

type AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

BATCH_AXES = ("data", "fsdp", "expert")
TOKEN_AXES = (*BATCH_AXES, "context")


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes.

    Attributes:
        data: replicas of the parameters; −1 uses all devices that remain after the other axes.
        fsdp: devices over which each replica of the parameters is split; with model.remat, gathered
            parameters are not kept for the backward pass. The TPU compiler uses an all-gather in
            groups of up to 32 chips. Over a complete slice of 64 or 256 chips it uses an all-reduce
            of zero-padded parts instead, which sends twice as many bytes.
        expert: devices over which the experts of a layer are split (expert parallelism).
        context: devices over which each sequence is split, for long sequences (context
            parallelism). On a TPU, attention (splash) works in blocks. Elsewhere its scores are one
            array of T² / context numbers per sequence and head, so only the rest saves memory.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        if min(self.fsdp, self.expert, self.context) < 1 or (self.data < 1 and self.data != -1):
            raise InputError(
                f"mesh.data {self.data}, mesh.fsdp {self.fsdp}, mesh.expert {self.expert} and "
                f"mesh.context {self.context} must be at least 1; data may be -1 for all devices "
                "that remain after the others."
            )


# Shardings of a run's arrays. Letters of a name are the array's axes: A, B, T, S and U as in
# typing.py; R and W are the rows and words of a table.
REPLICATED = jax.P()
TOKENS_BT = jax.P(BATCH_AXES, "context")
BATCH_ABT = jax.P(None, *TOKENS_BT)
TABLE_RW = jax.P(TOKEN_AXES)
ROWS_SU = jax.P(TOKEN_AXES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh, with explicit axes "data", "fsdp", "expert" and "context".

    Args:
        config: sizes of the axes.
        devices: devices of the mesh; None: all devices of all processes.

    Raises:
        InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    others = config.fsdp, config.expert, config.context
    parts = math.prod(others)
    data = len(devices) // parts if config.data == -1 else config.data
    if data * parts != len(devices):
        raise InputError(
            f"Mesh data {config.data} × fsdp {config.fsdp} × expert {config.expert} × context "
            f"{config.context} does not fit {len(devices)} devices; choose sizes whose product is "
            "the number of devices, or data -1."
        )
    # Devices are ordered by process, because each process builds one contiguous part of the batch.
    # (jax.make_mesh orders TPUs by topology, which interleaves processes.)
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.array(ordered).reshape(data, *others)
    return jax.sharding.Mesh(grid, TOKEN_AXES, axis_types=(AxisType.Explicit,) * 4)


def fit_mesh(config: MeshConfig, rows: int) -> MeshConfig:
    """The mesh for reading a run of another mesh on the devices that are here.

    Sequences, experts and parameters are split as in the run, or over as many devices as there are.
    One process uses the largest power of two of its devices that divides a batch. Several processes
    use all of theirs.

    Args:
        config: the mesh of the run.
        rows: rows of a batch.
    """
    count = len(jax.devices())
    if jax.process_count() == 1:
        count = math.gcd(rows * config.context, 1 << (count.bit_length() - 1))
    context = math.gcd(config.context, count)
    expert = math.gcd(config.expert, count // context)
    fsdp = math.gcd(config.fsdp, count // (context * expert))
    return MeshConfig(count // (context * expert * fsdp), fsdp, expert, context)


def row_parts(mesh: AnyMesh) -> int:
    """Number of parts of B."""
    return mesh.size // mesh.shape["context"]


def batch_part(mesh: AnyMesh) -> BatchPart:
    """This process's part of every micro-batch.

    Args:
        mesh: a mesh with devices.

    Raises:
        InputError: the devices that share a sequence are not whole processes or a part of one.
    """
    local, context = len(mesh.local_devices), mesh.shape["context"]
    sharing = max(1, context // local)
    if local * sharing % context:
        raise InputError(
            f"mesh.context {context} does not fit processes of {local} devices; choose a "
            "divisor or a multiple of their number."
        )
    return BatchPart(jax.process_index(), jax.process_count(), sharing)


def make_abstract_mesh(config: MeshConfig) -> jax.sharding.AbstractMesh:
    """A mesh without devices, for tracing and lowering; data −1 is 1."""
    sizes = (max(config.data, 1), config.fsdp, config.expert, config.context)
    return jax.sharding.AbstractMesh(sizes, TOKEN_AXES, axis_types=(AxisType.Explicit,) * 4)


def in_explicit_mesh() -> bool:
    """Whether arrays have explicit shardings here: in a mesh, and not inside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and all(kind is AxisType.Explicit for kind in mesh.axis_types)


def platform_of(mesh: AnyMesh) -> str:
    """The platform of a mesh's devices, such as "cpu" or "tpu"; without devices, the default.

    The default backend can be the wrong answer, because programs for TPU can be compiled on a CPU.
    """
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()
    return str(mesh.devices.flat[0].platform)


def parameter_sharding(mesh: AnyMesh, shapes: PyTree, roles: PyTree) -> PyTree:
    """Splits every parameter over "fsdp", along its longest axis that "fsdp" divides.

    A parameter without such an axis is replicated. Stacks of experts are split over "expert", and
    each expert over "fsdp".

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
    """Shards an optimizer's state of a parameter like the parameter; the rest is replicated.

    Args:
        mesh: the mesh.
        shapes: the optimizer's state or its shapes, in trees like that of the parameters.
        parameters: shardings of the parameters.
    """
    places = dict(jax.tree.leaves_with_path(parameters))

    def place(path: tuple[Any, ...], _: Any) -> NamedSharding:
        ends = (places.get(path[start:]) for start in range(len(path)))
        return next(filter(None, ends), NamedSharding(mesh, REPLICATED))

    return jax.tree.map_with_path(place, shapes)


def gather_parameters[T](module: T, dtype: jnp.dtype, axes: Sequence[str]) -> T:
    """A copy of a module with complete parameters on every device; experts stay expert-parallel.

    Matrices, embedding and head are cast to the dtype of the computation before the gather; in
    bfloat16 that halves the bytes sent. In the backward pass their gradients are reduced and
    scattered over "fsdp" in that dtype. Each device's part is then summed over the other axes in
    float32.

    Args:
        module: a module, or a parameter.
        dtype: dtype of the computation.
        axes: mesh axes over which the tokens are split; gradients are summed over these.
    """
    in_mesh = not jax.sharding.get_abstract_mesh().empty

    def gather(variable: nnx.Variable) -> nnx.Variable:
        value, role = variable[...], role_of(variable)
        if isinstance(role, Plain):
            return variable.replace(jax.sharding.reshard(value, jax.P()) if in_mesh else value)
        if not in_mesh:
            return variable.replace(value.astype(dtype))
        # "Reduced" over an axis means: replicated over it, and the gradient is a sum over it that
        # is not computed yet.
        spec = jax.typeof(value).sharding.spec
        replicated = set(axes) - set(spec_axes(spec))
        value = jax.sharding.reshard(value, jax.P(*spec, reduced=replicated)).astype(dtype)
        stays_split = "expert" if isinstance(role, Matrix) and role.experts else None
        gathered = jax.P(stays_split, reduced=set(axes) - {stays_split})
        return variable.replace(jax.sharding.reshard(value, gathered))

    return jax.tree.map(gather, module, is_leaf=lambda node: isinstance(node, nnx.Variable))


def split_axes(array: jax.Array) -> tuple[str, ...]:
    """The mesh axes over which an array is split; none outside a mesh, or on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    # On one device JAX cannot lower "reduced".
    return () if mesh.size <= 1 else spec_axes(jax.typeof(array).sharding.spec)


def position_axis(array: jax.Array) -> str | None:
    """The mesh axis over which T of an array [B, T, …] is split; None: T is complete."""
    mesh = jax.sharding.get_abstract_mesh()
    if not in_explicit_mesh():
        return None
    axis: str | None = jax.typeof(array).sharding.spec[1]
    return axis if axis is not None and mesh.shape[axis] > 1 else None


def spec_axes(spec: jax.P) -> tuple[str, ...]:
    """The mesh axes in a partition spec."""
    return tuple(jax.tree.leaves(tuple(spec)))


def extend_spec(array: jax.Array, *axes: str | None) -> jax.P | None:
    """The array's partition spec with `axes` appended; None outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return jax.P(*jax.typeof(array).sharding.spec, *axes)
