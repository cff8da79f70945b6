"""Everything that a training step changes."""

from dataclasses import dataclass
from typing import no_type_check

import jax
from jaxtyping import Array, Float, Int32

from engram_jax.memory.layout import Table
from engram_jax.typing import Parameters, PyTree


@no_type_check  # at run time: as a pytree it also holds shapes and shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weights:
    """The part of the state that a forward pass reads.

    Attributes:
        step: optimizer steps behind it.
        params: dense parameters, as nested dicts with the modules' names.
        tables: memory tables by layer id; pending updates of idle rows are not in their values.
        expert_bias: by layer id, what balances the experts of a layer.
    """

    step: Int32[Array, ""]
    params: Parameters
    tables: dict[int, Table]
    expert_bias: dict[int, Float[Array, "X"]]


@no_type_check  # as above
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The state of a run; together with (config, seed) it determines everything that follows.

    Attributes:
        step: optimizer steps done, which is also the number of the next batch.
        params: dense parameters, as nested dicts with the modules' names.
        optimizer: optax state of the dense parameters.
        tables: memory tables by layer id.
        expert_bias: by layer id, what balances the experts of a layer.
    """

    step: Int32[Array, ""]
    params: Parameters
    optimizer: PyTree
    tables: dict[int, Table]
    expert_bias: dict[int, Float[Array, "X"]]

    @property
    def weights(self) -> Weights:
        """What a forward pass reads of it."""
        return Weights(self.step, self.params, self.tables, self.expert_bias)
