"""One optimizer step: read rows, forward, backward, clip, update."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from engram_jax.data.packing import Batch, MicroBatch, micro_batches
from engram_jax.layers.mixture_of_experts import balance
from engram_jax.loss import token_losses
from engram_jax.memory import lookup
from engram_jax.memory.lookup import ReadRows
from engram_jax.memory.row_adam import RowAdam
from engram_jax.model import Report
from engram_jax.program import Program
from engram_jax.train_state import TrainState, Weights
from engram_jax.typing import Parameters

type Metrics = dict[str, Array]
# `RowAdam` also has the learning rates of the dense parameters.
type TrainStep = Callable[[TrainState, Batch, RowAdam], tuple[TrainState, Metrics]]


class Gradients(NamedTuple):
    """Gradients of what a step minimizes: the mean loss, and the z-loss if there is one.

    Attributes:
        params: gradients of the dense parameters, summed over devices.
        rows: by layer id, each device's part of the gradients of its distinct rows. A row that
            several devices read occurs several times: see `Program.send_gradients`. Empty for
            frozen tables.
    """

    params: Parameters
    rows: dict[int, Float[Array, "S U F"]]


class Norms(NamedTuple):
    """Norms of the gradients, before clipping.

    Attributes:
        all: norm over parameters and rows.
        rows: norm over rows.
    """

    all: Float[Array, ""]
    rows: Float[Array, ""]


def make_train_step(program: Program) -> TrainStep:
    """The jitted function (state, batch, row optimizer) → (next state, metrics).

    The state is donated. Pass `program.row_adam` as the row optimizer. It is an argument because
    its arrays would otherwise be megabytes of constants in the compiled program.

    Call that function inside `program.use_mesh()`. `step_metrics` lists the metrics.
    """

    def train_step(
        state: TrainState, batch: Batch, row_adam: RowAdam
    ) -> tuple[TrainState, Metrics]:
        read = program.read_rows(state.weights, batch.plan, row_adam)
        loss, gradients, report = forward_backward(program, state.weights, read, batch)
        new_state, norms = apply_updates(
            program, state, read, batch, gradients, report.loads, row_adam
        )
        rate = row_adam.learning_rate(state.step)
        return new_state, step_metrics(state, batch, loss, rate, norms, report)

    return jax.jit(train_step, donate_argnums=0)


def forward_backward(
    program: Program, weights: Weights, read: Mapping[int, ReadRows], batch: Batch
) -> tuple[Float[Array, ""], Gradients, Report]:
    """Runs the micro-batches of a step one after another, and sums their gradients in float32.

    Args:
        program: the program.
        weights: parameters and expert biases.
        read: the step's distinct rows by layer id, which all micro-batches use.
        batch: the step's batch.

    Returns:
        The mean loss over the step's targets in nats, without z-loss; the gradients; and
        diagnostics of the blocks, with expert loads summed over micro-batches, and one mixing error
        and one health per micro-batch.
    """
    rows = {layer: of_layer.values for layer, of_layer in read.items()}
    trainable = {} if program.config.memory.frozen else rows
    target_count = jnp.maximum(batch.target_mask.sum(), 1.0)  # a batch may have no target

    def loss_share(
        params: Parameters, trainable: dict[int, Array], micro_batch: MicroBatch
    ) -> tuple[Array, tuple[Array, Report]]:
        losses, report = token_losses(
            program, params, rows | trainable, micro_batch, weights.expert_bias
        )
        mask = micro_batch.batch.target_mask
        loss = minimized = jnp.sum(losses.cross_entropy * mask) / target_count
        if z_loss := program.config.optimizer.z_loss:
            squares = losses.log_normalizer**2
            minimized += z_loss * (jnp.sum(squares * mask) / target_count)
        # Gates are dropped, because the scan would keep those of all micro-batches.
        return minimized, (loss, report._replace(gates={}))

    def accumulate(total: Any, micro_batch: MicroBatch) -> tuple[Any, Report]:
        differentiate = jax.value_and_grad(loss_share, argnums=(0, 1), has_aux=True)
        (_, (loss, report)), gradients = differentiate(weights.params, trainable, micro_batch)
        return jax.tree.map(jnp.add, total, (loss, gradients)), report

    zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, (weights.params, trainable))
    (loss, gradients), reports = jax.lax.scan(accumulate, zeros, micro_batches(batch))
    loads = {layer: jnp.sum(load, axis=0) for layer, load in reports.loads.items()}
    return loss, Gradients(*gradients), reports._replace(loads=loads)


def apply_updates(
    program: Program,
    state: TrainState,
    read: Mapping[int, ReadRows],
    batch: Batch,
    gradients: Gradients,
    loads: Mapping[int, Array],
    row_adam: RowAdam,
) -> tuple[TrainState, Norms]:
    """Clips all gradients by their common norm and applies them. Returns the next state and norms.

    Args:
        program: the program.
        state: the state before the step.
        read: the step's distinct rows by layer id.
        batch: the step's batch.
        gradients: see `forward_backward`.
        loads: how many tokens chose each expert, by layer id.
        row_adam: the row optimizer, which also has the learning rates of the dense parameters.
    """
    by_owner = program.send_gradients(state.tables, batch.plan, gradients.rows)
    rows_square_norm = sum((own.square_norm for own in by_owner.values()), jnp.zeros(()))
    norm = jnp.sqrt(optax.tree.norm(gradients.params, squared=True) + rows_square_norm)
    scale = jnp.minimum(1.0, program.config.optimizer.clip_norm / norm)
    clipped = jax.tree.map(lambda gradient: gradient * scale, gradients.params)
    updates, optimizer_state = program.optimizer.update(clipped, state.optimizer, state.params)
    updates = optax.tree.scale(row_adam.learning_rate(state.step), updates)
    experts = program.config.model.experts
    new_state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        optimizer=optimizer_state,
        tables=program.update_rows(
            state, batch.plan, read, gradients.rows, by_owner, scale, row_adam
        ),
        expert_bias={
            layer: balance(bias, loads[layer], experts.balance_rate if experts else 0.0)
            for layer, bias in state.expert_bias.items()
        },
    )
    return new_state, Norms(norm, jnp.sqrt(rows_square_norm))


def step_metrics(
    state: TrainState,
    batch: Batch,
    loss: Float[Array, ""],
    learning_rate: Float[Array, ""],
    norms: Norms,
    report: Report,
) -> Metrics:
    """The metrics of a step.

    - loss: in nats per token.
    - learning_rate: the schedule's value, without the factors of parameters and rows.
    - gradient_norm, row_gradient_norm: over all gradients, and over rows only; before clipping.
    - rows_asked_L: distinct rows of layer L's table that devices request, summed over devices.
    - exchange_rounds_L: rounds of the exchange (1, unless a pair of devices exceeds the capacity).
    - shard_load_L: rows requested from the fullest shard, relative to the mean.
    - expert_load_worst, expert_load_mean: load of a layer's fullest expert, relative to the mean of
      its experts; the maximum over layers, and the mean over layers.
    - mixing_error: largest error of a column sum of any H_res (`layers/hyper_connections.py`).
    - gates_open_L, gates_closed_L, memory_strength_L: of the mean `MemoryHealth` of micro-batches.
    """
    metrics: Metrics = {
        "loss": loss,
        "gradient_norm": norms.all,
        "row_gradient_norm": norms.rows,
        "learning_rate": learning_rate,
    }
    if batch.plan is not None:
        for layer, rows in batch.plan.rows.items():
            metrics[f"rows_asked_{layer}"] = jnp.sum(rows.distinct)
            metrics[f"exchange_rounds_{layer}"] = jnp.max(rows.rounds)
            metrics[f"shard_load_{layer}"] = lookup.shard_load(state.tables[layer], rows)
    if report.loads:
        largest = jnp.stack([jnp.max(load) / jnp.mean(load) for load in report.loads.values()])
        metrics["expert_load_worst"] = jnp.max(largest)
        metrics["expert_load_mean"] = jnp.mean(largest)
    if report.mixing_error is not None:
        metrics["mixing_error"] = jnp.max(report.mixing_error)
    for layer, by_micro_batch in report.health.items():
        health = jax.tree.map(jnp.mean, by_micro_batch)
        metrics[f"gates_open_{layer}"] = health.open
        metrics[f"gates_closed_{layer}"] = health.closed
        metrics[f"memory_strength_{layer}"] = health.strength
    return metrics
