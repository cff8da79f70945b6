"""What the devices run for a configuration: decoder, optimizers, state, and how they lie on a mesh.

Needs no text, no tokenizer and no folder, nor the devices themselves: of a TPU slice that is not
there it gives shapes and shardings to compile for. `run.Run` is a program with a folder.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from engram_jax.compression import VocabularyProjection
from engram_jax.config import Config
from engram_jax.data.packing import Batch
from engram_jax.errors import InputError
from engram_jax.hashing import NgramHash
from engram_jax.memory import lookup
from engram_jax.memory.layout import LANES, Table, init_table
from engram_jax.memory.lookup import OwnGradients, ReadRows
from engram_jax.memory.plan import MemoryPlan, Planner, SlotPlan
from engram_jax.memory.row_adam import RowAdam, make_row_adam
from engram_jax.model import Decoder, ExpertBias, Report
from engram_jax.optimizer import make_optimizer, make_schedule
from engram_jax.parameters import roles
from engram_jax.platforms import NEEDS, foreign_kernels
from engram_jax.sharding import (
    BATCH_ABT,
    ROWS_SU,
    TABLE_RW,
    TOKEN_AXES,
    WHOLE,
    AnyMesh,
    optimizer_sharding,
    parameter_sharding,
    platform_of,
)
from engram_jax.train_state import TrainState, Weights
from engram_jax.typing import Parameters, PyTree


class MicroBatch(NamedTuple):
    """One of the A micro-batches of a step, or all of them, stacked.

    Attributes:
        batch: its tokens, without a plan.
        slots: where they find their rows, by layer id.
    """

    batch: Batch
    slots: dict[int, SlotPlan]


def micro_batches(batch: Batch) -> MicroBatch:
    """The A micro-batches of a step's batch, stacked."""
    return MicroBatch(batch._replace(plan=None), batch.plan.slots if batch.plan else {})


@dataclass(frozen=True)
class Program:
    """What the devices run. Make one with `Program.build`, or with `Program.of_sizes`.

    Attributes:
        config: the configuration.
        ngram_hash: the hash; None for a model without memory.
        mesh: the device mesh.
        graph: the decoder without its parameters; `nnx.merge(graph, params)` gives the decoder.
        roles: what every parameter is to optimizer and mesh.
        schedule: learning rate by step.
        optimizer: optimizer of the dense parameters.
    """

    config: Config
    ngram_hash: NgramHash | None
    mesh: AnyMesh
    graph: Any
    roles: PyTree
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation

    @classmethod
    def build(cls, config: Config, ngram_hash: NgramHash | None, mesh: AnyMesh) -> "Program":
        """The program of a configuration.

        Raises:
            InputError: sizes do not divide the mesh, or its devices lack what is asked for.
        """
        if ngram_hash is not None and any(rows % mesh.size for rows in ngram_hash.padded_rows):
            raise InputError(
                f"A table's rows, multiples of 4,096, do not divide over {mesh.size} devices; use "
                "a power of two of them."
            )
        words, platform = config.memory.layout.words, platform_of(mesh)
        if ngram_hash is not None and platform == "tpu" and words % LANES:
            raise InputError(
                f"Rows of {config.memory.row_width} make records of {words} words, which do not "
                f"fill the {LANES} lanes of a TPU: it would copy the tables at every step. Raise "
                "memory.row_width; in float32, 22 is the least, and 42, 85 and 127 fill their "
                "lines best."
            )
        for part, chosen in foreign_kernels(config, platform).items():
            raise InputError(
                f"--{part} {chosen} needs a {NEEDS[chosen].upper()}, and this runs on {platform}; "
                "leave the flag out."
            )
        rows = config.data.batch_size // config.train.accumulation
        if rows % mesh.size:
            raise InputError(
                f"A micro-batch of {rows} rows does not divide over {mesh.size} devices; choose "
                "data.batch_size as a multiple of devices × train.accumulation."
            )
        graph, shapes = nnx.split(nnx.eval_shape(lambda: _make_decoder(config, jax.random.key(0))))
        schedule = make_schedule(config.optimizer, config.train.steps)
        return Program(
            config=config,
            ngram_hash=ngram_hash,
            mesh=mesh,
            graph=graph,
            roles=roles(shapes),
            schedule=schedule,
            optimizer=make_optimizer(config.optimizer, schedule, roles(shapes)),
        )

    @classmethod
    def of_sizes(cls, config: Config, mesh: AnyMesh) -> "Program":
        """The program without a tokenizer, to count and compile it; its hash projects no ids.

        Raises:
            InputError: as `build`.
        """
        if not config.memory.layers:
            return cls.build(config, None, mesh)
        identity = VocabularyProjection.identity(config.model.vocabulary)
        return cls.build(config, NgramHash.build(config.memory.hash_spec(0), identity), mesh)

    def use_mesh(self) -> AbstractContextManager[object]:
        """The context in which everything here is traced and run."""
        context: AbstractContextManager[object] = jax.set_mesh(self.mesh)  # type: ignore[arg-type]
        return context

    def planner(self) -> Planner | None:
        """The planner of this process's batches; None for a model without memory."""
        if self.ngram_hash is None:
            return None
        local = len(self.mesh.local_devices)
        return Planner(self.ngram_hash, shards=self.mesh.size, local_shards=local)

    def put(self, batch: Batch) -> Batch:
        """Sends this process's part of a batch to the devices, split as the step wants it."""
        places = self.batch_sharding(batch)
        if jax.process_count() == 1:  # all arrays at once, in half the time
            return jax.device_put(batch, places)
        return jax.tree.map(
            lambda array, place: jax.make_array_from_process_local_data(place, array), batch, places
        )

    def batch_sharding(self, batch: Batch) -> Any:
        """How the arrays of such a batch lie on the mesh."""
        places = jax.tree.map(lambda _: jax.NamedSharding(self.mesh, BATCH_ABT), batch)
        if batch.plan is not None:
            by_device = jax.NamedSharding(self.mesh, ROWS_SU)
            rows = jax.tree.map(lambda _: by_device, batch.plan.rows)
            places = places._replace(plan=places.plan._replace(rows=rows))
        return places

    @cached_property
    def row_adam(self) -> RowAdam:
        """The optimizer of the tables' rows; its arrays lie on every device."""
        whole = jax.NamedSharding(self.mesh, WHOLE)
        return jax.tree.map(
            lambda array: jax.device_put(array, whole), make_config_row_adam(self.config)
        )

    def abstract_row_adam(self) -> RowAdam:
        """Shapes, dtypes and shardings of `row_adam`."""
        whole = jax.NamedSharding(self.mesh, WHOLE)
        return jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=whole),
            make_config_row_adam(self.config),
        )

    def read_rows(
        self, weights: Weights, plan: MemoryPlan | None, row_adam: RowAdam
    ) -> dict[int, ReadRows]:
        """Reads the distinct rows of a batch from every table, as the next forward pass sees them.

        Args:
            weights: the tables, and how many steps they are behind.
            plan: the batch's plan; None is for a model without tables.
            row_adam: the row optimizer, which gives each row's pending update.
        """
        if plan is None:
            return {}
        gather = self.config.memory.gather
        return {
            layer: lookup.read_rows(table, plan.rows[layer], row_adam, weights.step, gather)
            for layer, table in weights.tables.items()
        }

    def forward(
        self,
        params: Parameters,
        rows: Mapping[int, Float[Array, "S U F"]],
        micro_batch: MicroBatch,
        expert_bias: ExpertBias,
    ) -> tuple[Float[Array, "B T V"], Report]:
        """Logits of a micro-batch, and the report of the blocks.

        Args:
            params: the dense parameters.
            rows: each device's distinct rows by layer id; a layer that is missing adds nothing.
            micro_batch: tokens, and where they find their rows.
            expert_bias: what balances the experts, by layer id.
        """
        batch, slots = micro_batch
        memory = {
            layer: lookup.expand(of_layer, slots[layer], self.config.memory.gather)
            for layer, of_layer in rows.items()
        }
        decoder = nnx.merge(self.graph, params)
        return decoder(batch.tokens, memory, batch.segments, batch.positions, expert_bias)

    def own_gradients(
        self,
        tables: Mapping[int, Table],
        plan: MemoryPlan | None,
        gradients: Mapping[int, Float[Array, "S U F"]],
    ) -> dict[int, OwnGradients]:
        """Brings the row gradients of all devices to the rows' owners, by layer id."""
        if plan is None:
            return {}
        return {
            layer: lookup.own_gradients(tables[layer], plan.rows[layer], gradient)
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
        """All tables after the step; those without gradients (frozen ones) stay as they are.

        Args:
            state: the state before the step.
            plan: the batch's plan.
            read: what `read_rows` gave for this step.
            gradients: of each device's distinct rows, by layer id.
            by_owner: what `own_gradients` made of them.
            scale: factor of all gradients (clipping).
            row_adam: the row optimizer.
        """
        if plan is None:
            return {}
        return state.tables | {
            layer: lookup.update_rows(
                state.tables[layer],
                plan.rows[layer],
                gradient,
                by_owner[layer],
                read[layer].own,
                scale,
                row_adam,
                state.step,
            )
            for layer, gradient in gradients.items()
        }

    def exchange_metrics(self, tables: Mapping[int, Table], plan: MemoryPlan) -> dict[str, Array]:
        """Distinct rows asked for, rounds of the exchange and load of the fullest shard."""
        metrics: dict[str, Array] = {}
        for layer, rows in plan.rows.items():
            metrics[f"rows_asked_{layer}"] = jnp.sum(rows.distinct)
            metrics[f"exchange_rounds_{layer}"] = jnp.max(rows.rounds)
            metrics[f"shard_load_{layer}"] = lookup.shard_load(tables[layer], rows)
        return metrics

    def initial_state(self) -> TrainState:
        """The state before the first step, made where it lies."""
        with self.use_mesh():
            return self.initializer()(jax.random.key(self.config.train.seed))

    def initializer(self) -> Callable[[jax.Array], TrainState]:
        """The jitted function from a random key to the state before the first step.

        Call it inside the mesh. What it draws is for the compiler to split: with explicit axes,
        every device would draw every table and parameter whole.
        """
        return jax.jit(
            jax.sharding.auto_axes(
                self._make_state, axes=TOKEN_AXES, out_sharding=self._shardings()
            )
        )

    def first_state(self, weights: Weights) -> TrainState:
        """The state before the first step with these weights."""
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

    def _make_state(self, key: jax.Array) -> TrainState:
        params_key, tables_key = jax.random.split(key)
        params: Parameters = nnx.to_pure_dict(nnx.split(_make_decoder(self.config, params_key))[1])
        memory = self.config.memory
        tables = {
            layer: init_table(
                *(jax.random.fold_in(tables_key, layer), rows, memory.layout, layer),
                memory.init_scale,
            )
            for layer, rows in zip(
                memory.layers, self.ngram_hash.padded_rows if self.ngram_hash else [], strict=True
            )
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
        return jax.eval_shape(self._make_state, jax.eval_shape(jax.random.key, 0))

    def _shardings(self) -> Any:
        shapes = self._shapes
        table = jax.NamedSharding(self.mesh, TABLE_RW)
        whole = jax.NamedSharding(self.mesh, WHOLE)
        params = parameter_sharding(self.mesh, shapes.params, self.roles)
        return TrainState(
            step=whole,  # type: ignore[arg-type]  # a tree of shardings
            params=params,
            optimizer=optimizer_sharding(self.mesh, shapes.optimizer, params),
            tables=jax.tree.map(lambda _: table, shapes.tables),
            expert_bias=jax.tree.map(lambda _: whole, shapes.expert_bias),
        )


def _make_decoder(config: Config, key: jax.Array) -> Decoder:
    params, memory = jax.random.split(key)
    return Decoder(config.model, config.memory.sites, rngs=nnx.Rngs(params=params, memory=memory))


def make_config_row_adam(config: Config) -> RowAdam:
    """The row optimizer of a configuration."""
    adam = config.memory.adam
    if config.memory.frozen:
        adam = replace(adam, form="lazy")  # no pending updates
    schedule = make_schedule(config.optimizer, config.train.steps)
    return make_row_adam(adam, schedule, config.train.steps)
