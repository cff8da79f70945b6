"""The device mesh, and how arrays lie on it.

Tokens are split over both axes of the mesh; parameters over "fsdp" alone, and every block gathers
its own just before it runs (ZeRO-3), so layers are written as if for one device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding

from engram_jax.errors import InputError
from engram_jax.typing import PyTree

TOKEN_AXES = ("data", "fsdp")


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes.

    Attributes:
        data: copies of the parameters; −1 takes all devices that fsdp leaves.
        fsdp: devices that each copy of the parameters is split over.
    """

    data: int = -1
    fsdp: int = 1

    def __post_init__(self) -> None:
        if self.fsdp < 1 or (self.data < 1 and self.data != -1):
            raise InputError(
                f"mesh.data {self.data} and mesh.fsdp {self.fsdp} must be at least 1; "
                "data may be -1 for all devices that fsdp leaves."
            )


# Where the arrays of a run lie; the letters spell their axes.
WHOLE = jax.P()
BATCH_ABT = jax.P(None, TOKEN_AXES)
TABLE_RF = jax.P(TOKEN_AXES)
ROWS_SU = jax.P(TOKEN_AXES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh, with explicit axes "data" and "fsdp".

    Args:
        config: sizes of the axes.
        devices: what it is made of; None takes all devices of all processes.

    Raises:
        InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    data = len(devices) // config.fsdp if config.data == -1 else config.data
    if data * config.fsdp != len(devices):
        raise InputError(
            f"Mesh data {config.data} × fsdp {config.fsdp} does not fit {len(devices)} devices; "
            "choose sizes whose product is the number of devices, or data -1."
        )
    # Process p's devices must follow those of p−1: a process builds one contiguous slice of the
    # batch. (jax.make_mesh orders TPUs by topology and interleaves processes.)
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.array(ordered).reshape(data, config.fsdp)
    return jax.sharding.Mesh(grid, TOKEN_AXES, axis_types=(AxisType.Explicit,) * 2)


def parameter_sharding(mesh: jax.sharding.Mesh, shapes: PyTree) -> PyTree:
    """Splits every parameter along its longest axis that "fsdp" divides; others are copied."""
    parts = mesh.shape["fsdp"]

    def shard(leaf: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        longest = max(axes, key=lambda axis: leaf.shape[axis], default=None)
        spec = ["fsdp" if axis == longest else None for axis in range(len(leaf.shape))]
        return NamedSharding(mesh, jax.P(*spec) if parts > 1 else jax.P())

    return jax.tree.map(shard, shapes)


def gather_parameters[T](module: T) -> T:
    """A copy of a module whose parameters lie whole on every device."""
    if jax.sharding.get_abstract_mesh().empty:
        return module
    return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, jax.P()), module)


def extend_spec(array: jax.Array, *axes: str | None) -> jax.P | None:
    """The array's own partition with more axes behind; None outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return jax.P(*jax.typeof(array).sharding.spec, *axes)
