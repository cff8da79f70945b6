"""The weights of decoding: prepared once, so that a step reads every one of them once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import no_type_check

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from engram_jax.hashing_device import HashConstants
from engram_jax.memory.layout import Table
from engram_jax.memory.row_adam import RowAdam
from engram_jax.memory.store import RowStore
from engram_jax.memory.store_table import StoreTable, VerifiedTable, copy_hot_rows, open_table
from engram_jax.parameters import Plain, Role
from engram_jax.program import Program
from engram_jax.sharding import REPLICATED, TABLE_RW
from engram_jax.train_state import Weights
from engram_jax.typing import Parameters


@no_type_check  # no checks at run time: as a pytree it may also hold shapes or shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeWeights:
    """What decoding reads.

    Attributes:
        params: dense parameters, complete on every device; all except `Plain` ones are cast to the
            dtype of the computation. An untied head is empty here.
        head: the transposed output head. (On a CPU, x @ headᵀ takes 2 to 4 times as long.)
        tables: memory tables on the devices by layer id, as in training. Their values do not
            include pending updates, which reading applies to its copy.
        outside: tables outside the devices by layer id, likewise.
        step: number of finished optimizer steps.
        expert_bias: biases that balance the experts, by layer id.
        row_adam: the row optimizer, which computes pending updates.
        hash: constants of the hash; None without memory.
    """

    params: Parameters
    head: Float[Array, "D V"]
    tables: dict[int, Table]
    outside: dict[int, StoreTable]
    step: Int32[Array, ""]
    expert_bias: dict[int, Float[Array, "X"]]
    row_adam: RowAdam
    hash: HashConstants | None


def prepare(
    program: Program,
    weights: Weights,
    stores: Mapping[int, RowStore] | None = None,
    *,
    memory: bool = True,
    verify_rows: bool = False,
    hot_rows: Mapping[int, Int32[np.ndarray, "C"]] | None = None,
) -> DecodeWeights:
    """Prepares a run's weights. The tables are not copied.

    Args:
        program: the program.
        weights: parameters and tables.
        stores: the tables by layer id, if they are outside the devices.
        memory: keep the memory; without it, memory layers add nothing.
        verify_rows: let programs compare the rows that they read from stores (`VerifiedTable`).
        hot_rows: places of rows that are copied from stores to the devices, by layer id.
    """
    model = program.config.model

    def cast(leaf: Array, role: Role) -> Array:
        value = jax.sharding.reshard(leaf, jax.P())
        return value if isinstance(role, Plain) else value.astype(model.dtype)

    def prepare_params(params: Parameters) -> tuple[Parameters, Array]:
        whole: Parameters = jax.tree.map(cast, params, program.roles)
        head = whole["embedding" if model.tie_embeddings else "head"]
        return whole if model.tie_embeddings else whole | {"head": head[:0]}, head.T

    has_memory = memory and program.ngram_hash is not None
    assert isinstance(program.mesh, jax.sharding.Mesh)
    outside: dict[int, StoreTable] = {}
    for layer, store in (stores or {}).items():
        if has_memory:
            bare, places = open_table(store, program.mesh), (hot_rows or {}).get(layer)
            table = bare if places is None else copy_hot_rows(bare, store, places, program.mesh)
            outside[layer] = VerifiedTable(table, store) if verify_rows else table
    with program.use_mesh():
        params, head = jax.jit(prepare_params)(weights.params)
        constants = None
        if has_memory:
            constants = HashConstants.of(program.ngram_hash)  # type: ignore[arg-type]
            constants = jax.device_put(constants, jax.NamedSharding(program.mesh, REPLICATED))
        return DecodeWeights(
            params=params,
            head=head,
            tables=weights.tables if has_memory else {},
            outside=outside,
            step=weights.step,
            expert_bias=weights.expert_bias,
            row_adam=program.row_adam,
            hash=constants,
        )


# Partition specs: tables are split, the rest is complete on every device.
WEIGHT_SPECS = DecodeWeights(*(REPLICATED,) * 2, TABLE_RW, *(REPLICATED,) * 5)  # type: ignore[arg-type]
