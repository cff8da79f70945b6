"""The state of training, which a step changes."""

import math
from dataclasses import dataclass
from typing import Any, no_type_check

import jax
from jaxtyping import Array, Float, Int32

from engram_jax.memory.layout import Table
from engram_jax.typing import Parameters, PyTree


@no_type_check  # no checks at run time: as a pytree it may also hold shapes or shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weights:
    """The part of the state that a forward pass reads.

    Attributes:
        step: number of finished optimizer steps.
        params: dense parameters, as nested dicts with the modules' names.
        tables: memory tables by layer id; their values do not include pending updates.
        expert_bias: biases that balance the experts, by layer id.
    """

    step: Int32[Array, ""]
    params: Parameters
    tables: dict[int, Table]
    expert_bias: dict[int, Float[Array, "X"]]


@no_type_check  # as above
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The state of a run. Together with the configuration it determines all further steps.

    Attributes:
        step: number of finished optimizer steps, which is also the number of the next batch.
        params: dense parameters, as nested dicts with the modules' names.
        optimizer: optax state of the dense parameters.
        tables: memory tables by layer id.
        expert_bias: biases that balance the experts, by layer id.
    """

    step: Int32[Array, ""]
    params: Parameters
    optimizer: PyTree
    tables: dict[int, Table]
    expert_bias: dict[int, Float[Array, "X"]]

    @property
    def weights(self) -> Weights:
        """The part that a forward pass reads."""
        return Weights(self.step, self.params, self.tables, self.expert_bias)


def array_bytes(state: PyTree) -> int:
    """Total bytes of all arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def device_bytes(state: PyTree) -> int:
    """Bytes of one device's parts of all arrays; it has all of an array without a sharding.

    Args:
        state: arrays, or shapes with shardings.
    """

    def count(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        return math.prod(shape) * int(leaf.dtype.itemsize)

    return sum(map(count, jax.tree.leaves(state)))


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves by path, such as "params/blocks/0/norm/scale", in the order of the tree."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("Two leaves of the state have the same path.")
    return named
