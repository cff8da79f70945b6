"""The program of a configuration: decoder, optimizers, state, and their sharding on a mesh.

A program needs no text, tokenizer or folder. It does not need the devices either: for a TPU slice
it gives shapes and shardings, which are enough to compile. `run.Run` has a program and a folder.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, UInt32

from engram_jax.compression import VocabularyProjection
from engram_jax.config import Config
from engram_jax.data.packing import Batch, MicroBatch, SentBatch, split_buffers
from engram_jax.errors import InputError
from engram_jax.hashing import NgramHash
from engram_jax.memory import lookup
from engram_jax.memory.layout import Table, init_table
from engram_jax.memory.lookup import OwnGradients, ReadRows
from engram_jax.memory.plan import MemoryPlan, Planner
from engram_jax.memory.row_adam import RowAdam, RowAdamConfig, make_row_adam
from engram_jax.memory.store import TableInfo
from engram_jax.model import Decoder, ExpertBias, Report
from engram_jax.optimizer import OptimizerConfig, make_optimizer, make_schedule
from engram_jax.parameters import roles
from engram_jax.platforms import check_devices, check_training_batch
from engram_jax.sharding import (
    BATCH_ABT,
    REPLICATED,
    ROWS_SU,
    TABLE_RW,
    TOKEN_AXES,
    AnyMesh,
    optimizer_sharding,
    parameter_sharding,
)
from engram_jax.train_state import TrainState, Weights
from engram_jax.typing import Parameters, PyTree

_RANDOM = "threefry2x32"  # equal seeds give equal values, whatever JAX_DEFAULT_PRNG_IMPL is


@dataclass(frozen=True)
class Program:
    """The computations of a configuration. Create one with `Program.build` or `Program.of_sizes`.

    Attributes:
        config: the configuration.
        ngram_hash: the hash; None for a model without memory.
        mesh: the device mesh.
        graph: the decoder without its parameters; `nnx.merge(graph, params)` gives the decoder.
        roles: the role of every parameter (see `parameters`).
        optimizer: optimizer of the dense parameters, at learning rate 1. The training step
            multiplies its updates by `RowAdam.learning_rate`, which is an argument, and no constant
            of the compiled program.
    """

    config: Config
    ngram_hash: NgramHash | None
    mesh: AnyMesh
    graph: Any
    roles: PyTree
    optimizer: optax.GradientTransformation

    @classmethod
    def build(cls, config: Config, ngram_hash: NgramHash | None, mesh: AnyMesh) -> "Program":
        """The program of a configuration.

        Raises:
            InputError: the mesh does not divide the tables, or its devices do not support the named
                implementations.
        """
        check_devices(config, ngram_hash, mesh)
        graph, shapes = nnx.split(
            nnx.eval_shape(lambda: _make_decoder(config, jax.random.key(0, impl=_RANDOM)))
        )
        return Program(
            config=config,
            ngram_hash=ngram_hash,
            mesh=mesh,
            graph=graph,
            roles=roles(shapes),
            optimizer=make_optimizer(config.optimizer, optax.constant_schedule(1.0), roles(shapes)),
        )

    @classmethod
    def of_sizes(cls, config: Config, mesh: AnyMesh) -> "Program":
        """The program of a configuration without a tokenizer, for counting and compiling.

        Its hash does not merge token ids (the projection is the identity).

        Raises:
            InputError: as in `build`, or the mesh does not divide a micro-batch.
        """
        check_training_batch(config, mesh)
        if not config.memory.layers:
            return cls.build(config, None, mesh)
        identity = VocabularyProjection.identity(config.model.vocabulary)
        return cls.build(config, NgramHash.build(config.memory.hash_spec(0), identity), mesh)

    def use_mesh(self) -> AbstractContextManager[object]:
        """The context in which all computations of the program must be traced and run."""
        context: AbstractContextManager[object] = jax.set_mesh(self.mesh)  # type: ignore[arg-type]
        return context

    def planner(self) -> Planner | None:
        """The planner of this process's batches; None for a model without memory."""
        if self.ngram_hash is None:
            return None
        buffered, shards = not self.tables_on_device, self.mesh.size
        return Planner(
            self.ngram_hash,
            shards=shards,
            local_shards=shards if buffered else len(self.mesh.local_devices),
            context=self.mesh.shape["context"],
            buffered=buffered,
        )

    @property
    def tables_on_device(self) -> bool:
        """Whether no table is outside the devices; also of a model without memory."""
        return self.ngram_hash is None or self.config.memory.placement == "device"

    @property
    def can_decode(self) -> bool:
        """Whether one process has all parameters and complete sequences on every device.

        A model whose parameters are split may be too large for one device.
        """
        return jax.process_count() == 1 and self.mesh.shape["data"] == self.mesh.size

    def on_device(self) -> "Program":
        """This program with its tables on the devices."""
        memory = replace(self.config.memory, placement="device")
        return replace(self, config=replace(self.config, memory=memory))

    def tables(self) -> dict[int, TableInfo]:
        """All tables, by layer id, wherever they are."""
        if self.ngram_hash is None:
            return {}
        memory, facts = self.config.memory, self.ngram_hash.fingerprint
        return {
            layer: TableInfo(
                layer, rows, memory.layout, self.config.train.seed, memory.init_scale, facts
            )
            for layer, rows in zip(memory.layers, self.ngram_hash.padded_rows, strict=True)
        }

    def send(self, batch: Batch) -> SentBatch:
        """Sends a batch to the devices, except for the plan's buffers (see `memory.row_feed`)."""
        batch, buffers = split_buffers(batch)
        return SentBatch(self.put(batch), buffers)

    def put(self, batch: Batch) -> Batch:
        """Sends this process's part of a batch to the devices, with the sharding of the step."""
        batch, _ = split_buffers(batch)
        shardings = self.batch_sharding(batch)
        if jax.process_count() == 1:  # one call for all arrays takes half the time
            return jax.device_put(batch, shardings)
        return jax.tree.map(
            lambda array, sharding: jax.make_array_from_process_local_data(sharding, array),
            *(batch, shardings),
        )

    def batch_sharding(self, batch: Batch) -> Any:
        """The shardings of the arrays of a batch."""
        shardings = jax.tree.map(lambda _: jax.NamedSharding(self.mesh, BATCH_ABT), batch)
        if batch.plan is not None:
            by_device = jax.NamedSharding(self.mesh, ROWS_SU)
            rows = jax.tree.map(lambda _: by_device, batch.plan.rows)
            shardings = shardings._replace(plan=shardings.plan._replace(rows=rows))
        return shardings

    @cached_property
    def row_adam(self) -> RowAdam:
        """The optimizer of the tables' rows; its arrays are replicated.

        The first use puts arrays on the devices of all processes. So all must make it together, and
        outside of traced functions, whose tracers would be kept.
        """
        replicated = jax.NamedSharding(self.mesh, REPLICATED)
        return jax.tree.map(
            lambda array: jax.device_put(array, replicated), make_config_row_adam(self.config)
        )

    def abstract_row_adam(self) -> RowAdam:
        """Shapes, dtypes and shardings of `row_adam`."""
        replicated = jax.NamedSharding(self.mesh, REPLICATED)
        return jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=replicated),
            make_config_row_adam(self.config),
        )

    def read_rows(
        self, weights: Weights, plan: MemoryPlan | None, row_adam: RowAdam
    ) -> dict[int, ReadRows]:
        """Reads the distinct rows of a batch from every table, including their pending updates.

        Args:
            weights: the tables, and the number of finished steps.
            plan: the batch's plan; None: a model without tables.
            row_adam: the row optimizer, which computes pending updates.

        Raises:
            InputError: there are tables, and no plan.
        """
        if weights.tables and plan is None:
            raise InputError(
                "The batch has no plan of the rows to read; give make_batches a planner "
                "(`program.planner()`)."
            )
        gather, rows = self.config.memory.gather, plan.rows if plan else {}
        return {
            layer: lookup.read_rows(table, rows[layer], row_adam, weights.step, gather)
            for layer, table in weights.tables.items()
        }

    def forward(
        self,
        params: Parameters,
        rows: Mapping[int, Float[Array, "S U F"]],
        micro_batch: MicroBatch,
        expert_bias: ExpertBias,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "V D"], Report]:
        """The last hidden states of a micro-batch, the output head, and diagnostics of the blocks.

        Args:
            params: the dense parameters.
            rows: each device's distinct rows by layer id; a layer that is missing adds nothing.
            micro_batch: tokens, and the slots of their rows.
            expert_bias: biases that balance the experts, by layer id.
        """
        batch, slots = micro_batch
        memory = {
            layer: lookup.expand(of_layer, slots[layer], self.config.memory.gather)
            for layer, of_layer in rows.items()
        }
        decoder = nnx.merge(self.graph, params)
        return decoder.hidden_states(
            batch.tokens, memory, batch.segments, batch.positions, expert_bias
        )

    def send_gradients(
        self,
        tables: Mapping[int, Table],
        plan: MemoryPlan | None,
        gradients: Mapping[int, Float[Array, "S U F"]],
    ) -> dict[int, OwnGradients]:
        """Sends the row gradients of all devices to the owners of the rows, by layer id."""
        rows = plan.rows if plan else {}
        return {
            layer: lookup.send_gradients(tables[layer], rows[layer], gradient)
            for layer, gradient in gradients.items()
        }

    def update_rows(
        self,
        state: TrainState,
        plan: MemoryPlan | None,
        read: Mapping[int, ReadRows],
        gradients: Mapping[int, Float[Array, "S U F"]],
        by_owner: Mapping[int, OwnGradients],
        scale: Float[Array, ""],
        row_adam: RowAdam,
    ) -> dict[int, Table]:
        """All tables after the step. Tables without gradients (frozen ones) do not change.

        Args:
            state: the state before the step.
            plan: the batch's plan.
            read: result of `read_rows` for this step.
            gradients: gradients of each device's distinct rows, by layer id. Later rounds of the
                exchange send them again.
            by_owner: result of `send_gradients` for these gradients.
            scale: factor of all gradients (clipping).
            row_adam: the row optimizer.
        """
        rows = plan.rows if plan else {}
        return state.tables | {
            layer: lookup.update_rows(
                state.tables[layer],
                rows[layer],
                gradient,
                by_owner[layer],
                read[layer].own,
                scale,
                row_adam,
                state.step,
            )
            for layer, gradient in gradients.items()
        }

    def initial_state(self) -> TrainState:
        """The random state before the first step, created on the devices."""
        with self.use_mesh():
            return self.initializer()(np.uint32(self.config.train.seed))

    def initializer(self) -> Callable[[UInt32[Any, ""]], TrainState]:
        """The jitted function from a seed to the state before the first step.

        Call it inside `use_mesh()`. It uses auto axes, so that the compiler splits the drawing of
        random numbers. With explicit axes, every device would draw complete tables and parameters.
        """
        return jax.jit(
            jax.sharding.auto_axes(
                self._make_state, axes=TOKEN_AXES, out_sharding=self._shardings()
            )
        )

    def state_from_weights(self, weights: Weights) -> TrainState:
        """The state before the first step of a run that starts with given weights."""
        shardings, params = self._shardings(), weights.params
        return TrainState(
            step=jax.device_put(jnp.zeros((), jnp.int32), shardings.step),
            params=params,
            optimizer=jax.jit(self.optimizer.init, out_shardings=shardings.optimizer)(params),
            tables=weights.tables,
            expert_bias=weights.expert_bias,
        )

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return jax.tree.map(
            lambda leaf, sharding: leaf.update(sharding=sharding),
            self._shapes,
            self._shardings(),
        )

    def _make_state(self, seed: UInt32[Any, ""]) -> TrainState:
        params_key, _ = jax.random.split(jax.random.key(seed, impl=_RANDOM))
        params: Parameters = nnx.to_pure_dict(nnx.split(_make_decoder(self.config, params_key))[1])
        tables = {
            layer: init_table(seed, table.rows, table.layout, layer, table.scale)
            for layer, table in self.tables().items()
            if self.tables_on_device
        }
        model = self.config.model
        routed = model.experts.routed if model.experts else 0
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            optimizer=self.optimizer.init(params),
            tables=tables,
            expert_bias={layer: jnp.zeros(routed) for layer in model.expert_layers},
        )

    @cached_property
    def _shapes(self) -> Any:
        return jax.eval_shape(self._make_state, np.uint32(0))

    def _shardings(self) -> Any:
        shapes = self._shapes
        table = jax.NamedSharding(self.mesh, TABLE_RW)
        replicated = jax.NamedSharding(self.mesh, REPLICATED)
        params = parameter_sharding(self.mesh, shapes.params, self.roles)
        return TrainState(
            step=replicated,  # type: ignore[arg-type]  # a tree of shardings
            params=params,
            optimizer=optimizer_sharding(self.mesh, shapes.optimizer, params),
            tables=jax.tree.map(lambda _: table, shapes.tables),
            expert_bias=jax.tree.map(lambda _: replicated, shapes.expert_bias),
        )


def _make_decoder(config: Config, key: jax.Array) -> Decoder:
    params, memory = jax.random.split(key)
    return Decoder(config.model, config.memory.sites, rngs=nnx.Rngs(params=params, memory=memory))


def make_config_row_adam(config: Config) -> RowAdam:
    """The row optimizer of a configuration."""
    adam = config.memory.adam
    if config.memory.frozen:
        adam = replace(adam, form="lazy")  # no pending updates
    return _make_row_adam(adam, config.optimizer, config.train.steps)


@lru_cache(maxsize=4)  # with exact Adam, 37 µs per step of the run
def _make_row_adam(adam: RowAdamConfig, optimizer: OptimizerConfig, steps: int) -> RowAdam:
    return make_row_adam(adam, make_schedule(optimizer, steps), steps)
