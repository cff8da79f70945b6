"""The training step and the loop around it."""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jaxtyping import Array
from tqdm import tqdm

from engram_jax.data.packing import Batch
from engram_jax.data.pipeline import make_batches, prefetch_to_device
from engram_jax.evaluation.held_out import Score, evaluate_held_out, make_scorer, pool
from engram_jax.layers.mixture_of_experts import balance
from engram_jax.loss import token_losses
from engram_jax.memory import lookup
from engram_jax.memory.plan import MemoryPlan
from engram_jax.metrics import MetricsLog, read_metrics
from engram_jax.model import Report
from engram_jax.processes import all_agree, collective, is_leader
from engram_jax.program import Program
from engram_jax.run import Run
from engram_jax.train_state import TrainState
from engram_jax.typing import Parameters

type Metrics = dict[str, Array]
type TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(program: Program) -> TrainStep:
    """One optimizer step as a jitted function; the state is donated.

    Gather the distinct rows once; run the micro-batches, which read them by plan; sum their
    gradients of parameters and rows in float32; clip both by their common norm; update.

    Call it inside `jax.set_mesh(program.mesh)`. Its metrics:

    - loss: nats a token; learning_rate: of what has no factor of its own.
    - gradient_norm: of parameters and rows together, before clipping; row_gradient_norm: of rows.
    - rows_asked_L, exchange_rounds_L, shard_load_L of the table of layer L: distinct rows, summed
      over devices; rounds that the exchange took (1, unless rows meet at few shards); rows that the
      fullest shard is asked for, over the mean.
    - expert_load_worst, expert_load_mean: load of a layer's fullest expert over the mean of its
      experts; the worst layer's, and the layers' mean.
    - mixing_error: largest error of a column sum of any H_res.
    """
    config, graph = program.config, program.graph
    optimizer, row_adam = program.optimizer, program.row_adam
    clip_norm, frozen = config.optimizer.clip_norm, config.memory.frozen
    gather, experts = config.memory.gather, config.model.experts
    balance_rate = experts.balance_rate if experts else 0.0

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        step, tables = state.step, state.tables
        plans, slots = batch.plan or MemoryPlan({}, {})
        read = {
            layer: lookup.read_rows(table, plans[layer], row_adam, step, gather)
            for layer, table in tables.items()
        }
        rows = {layer: of_layer.values for layer, of_layer in read.items()}
        trained = {} if frozen else rows
        targets = batch.target_mask.sum()

        def loss(
            params: Parameters, trained: dict[int, Array], part: tuple[Batch, Any]
        ) -> tuple[Array, Report]:
            batch, slots = part
            losses, report = token_losses(
                graph, params, rows | trained, slots, batch, state.expert_bias, gather
            )
            return jnp.sum(losses * batch.target_mask) / targets, report._replace(gates={})

        def accumulate(total: Any, part: tuple[Batch, Any]) -> tuple[Any, Report]:
            differentiate = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
            (value, report), gradients = differentiate(state.params, trained, part)
            return jax.tree.map(jnp.add, total, (value, gradients)), report

        nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, (state.params, trained)))
        parts = batch._replace(plan=None), slots
        (loss_value, (dense, by_row)), reports = jax.lax.scan(accumulate, nothing, parts)
        loads = {layer: jnp.sum(load, axis=0) for layer, load in reports.loads.items()}

        own = {
            layer: lookup.own_gradients(tables[layer], plans[layer], gradient)
            for layer, gradient in by_row.items()
        }
        rows_square_norm = sum((part.square_norm for part in own.values()), jnp.zeros(()))
        norm = jnp.sqrt(optax.tree.norm(dense, squared=True) + rows_square_norm)
        scale = jnp.minimum(1.0, clip_norm / norm)
        dense = jax.tree.map(lambda gradient: gradient * scale, dense)
        updates, optimizer_state = optimizer.update(dense, state.optimizer, state.params)
        new_state = TrainState(
            step=step + 1,
            params=optax.apply_updates(state.params, updates),
            optimizer=optimizer_state,
            tables=tables
            | {
                layer: lookup.update_rows(
                    *(tables[layer], plans[layer], gradient, own[layer], read[layer].own),
                    *(scale, row_adam, step),
                )
                for layer, gradient in by_row.items()
            },
            expert_bias={
                layer: balance(bias, loads[layer], balance_rate)
                for layer, bias in state.expert_bias.items()
            },
        )
        metrics = {
            "loss": loss_value,
            "gradient_norm": norm,
            "row_gradient_norm": jnp.sqrt(rows_square_norm),
            "learning_rate": program.schedule(step),
        }
        for layer, plan in plans.items():
            metrics[f"rows_asked_{layer}"] = jnp.sum(plan.distinct)
            metrics[f"exchange_rounds_{layer}"] = jnp.max(plan.rounds)
            metrics[f"shard_load_{layer}"] = lookup.shard_load(tables[layer], plan)
        if loads:
            largest = jnp.stack([jnp.max(load) / jnp.mean(load) for load in loads.values()])
            metrics["expert_load_worst"] = jnp.max(largest)
            metrics["expert_load_mean"] = jnp.mean(largest)
        if reports.mixing_error is not None:
            metrics["mixing_error"] = jnp.max(reports.mixing_error)
        return new_state, metrics

    return jax.jit(train_step, donate_argnums=0)


class Diverged(RuntimeError):
    """The loss or the gradient stopped being finite."""


def train(
    run: Run,
    *,
    profile: bool = False,
) -> TrainState:
    """Trains to the configured number of steps, from the newest checkpoint if there is one.

    Ctrl-C or SIGTERM saves a checkpoint and returns early.

    Args:
        run: the run.
        profile: write a trace of ten steps to the run folder.

    Raises:
        InputError: something the user gave does not fit.
        Diverged: NaN or Inf; names the step and the newest checkpoint.
    """
    config = run.config
    with jax.set_mesh(run.mesh), run.exclusively(), ExitStack() as stack:
        corpora = run.corpora()
        with collective("find room for the checkpoints"):
            run.checkpoints.require_space(run.abstract_state(), all_to_come=True)
        state = _first_state(run)
        step = int(state.step)
        train_step = make_train_step(run)
        scorer = make_scorer(run)
        log = None
        with collective("open the log"):
            if is_leader():
                log = stack.enter_context(MetricsLog(run.folder, resume_step=step))
        with (
            _stop_signal() as stopped,
            make_batches(
                corpora,
                config.data.weights,
                sequence_length=config.data.sequence_length,
                batch_size=config.data.batch_size,
                accumulation=config.train.accumulation,
                seed=config.train.seed,
                planner=run.planner(),
                first_batch=step,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                workers=config.data.workers,
                prefetch=config.data.prefetch,
            ) as batches,
            tqdm(
                total=config.train.steps,
                initial=step,
                unit="step",
                disable=not is_leader(),
                mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file wants few lines
            ) as bar,
        ):
            progress = _Progress(run, log, bar)
            traced = range(step + 5, step + 15)
            trace = ExitStack()
            saved = step if run.checkpoints.steps() else None

            def evaluate() -> None:
                scores = evaluate_held_out(
                    run, scorer, state.weights, corpora, max_tokens=config.train.evaluate_tokens
                )
                progress.report(step, scores)

            def evaluates(step: int) -> bool:
                return is_due(step, config.train.evaluate_every, config.train.steps)

            # A run that was killed between a save and the evaluation of that step lacks its line.
            if step and evaluates(step) and all_agree(not is_leader() or _lacks_score(run, step)):
                evaluate()
            for batch in prefetch_to_device(batches, run.put):
                if step == config.train.steps or stopped(step):
                    break
                if profile and step == traced.start:
                    trace.enter_context(jax.profiler.trace(run.folder / "profile"))
                state, metrics = train_step(state, batch)
                step += 1
                progress.update(step, metrics)
                if step == traced.stop:
                    trace.close()
                if is_due(step, config.train.checkpoint_every, config.train.steps):
                    progress.drain()
                    run.save(state)
                    saved = step
                    progress.restart_clock()
                if evaluates(step):
                    progress.drain()
                    evaluate()
            progress.drain()
            if step != saved:
                run.save(state)
            trace.close()
    return state


def _lacks_score(run: Run, step: int) -> bool:
    return all(line["step"] != step for line in read_metrics(run.folder, "held_out"))


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last, happens now."""
    return step == last or (every > 0 and step % every == 0)


class _Progress:
    """Writes metrics one step late, so that reading them never waits for the device."""

    def __init__(self, run: Run, log: MetricsLog | None, bar: "tqdm[Any]") -> None:
        self._run = run
        self._log = log
        self._bar = bar
        self._pending: tuple[int, Metrics] | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begins a new span of tokens per second."""
        self._clock: tuple[int, float] | None = None

    def update(self, step: int, metrics: Metrics) -> None:
        """Takes a dispatched step's metrics; reads those of the step before."""
        self.drain()
        self._pending = step, metrics

    def drain(self) -> None:
        """Waits for the last step, checks it and logs it.

        Raises:
            Diverged: its loss or gradient is not finite.
        """
        if self._pending is None:
            return
        step, arrays = self._pending
        self._pending = None
        metrics = {name: array.item() for name, array in jax.device_get(arrays).items()}
        self._check_finite(step, metrics)
        self._bar.update()
        config = self._run.config
        if self._clock is None:
            self._clock = step, time.perf_counter()
        if not is_due(step, config.train.log_every, config.train.steps):
            return
        first, since = self._clock
        if step > first:
            tokens = (step - first) * config.data.batch_size * config.data.sequence_length
            metrics["tokens_per_second"] = tokens / (time.perf_counter() - since)
            self._clock = step, time.perf_counter()
        self._bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}, {metrics.get('tokens_per_second', 0):,.0f} tokens/s"
        )
        if self._log:
            self._log.write(step, metrics)

    def report(self, step: int, scores: Mapping[str, Score]) -> None:
        """Logs held-out losses."""
        losses = {f"loss/{name}": score.loss for name, score in scores.items()}
        losses["loss"] = pool(list(scores.values())).loss
        if self._log:
            self._log.write(step, losses, kind="held_out")
            by_source = ", ".join(f"{name} {score.loss:.3f}" for name, score in scores.items())
            self._bar.write(f"step {step}: held-out loss {losses['loss']:.3f} ({by_source})")
        self.restart_clock()

    def _check_finite(self, step: int, metrics: Mapping[str, float | int]) -> None:
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"]):
            return
        # The state that this step began with may be to blame, and with it a checkpoint of it.
        good = [saved for saved in self._run.checkpoints.steps() if saved < step - 1]
        newest = f"the last good checkpoint is that of step {good[-1]}" if good else "none is good"
        raise Diverged(
            f"Step {step} has loss {metrics['loss']} and gradient norm "
            f"{metrics['gradient_norm']}; {newest} in {self._run.folder / 'checkpoints'}. "
            "Look at the batch of that step, or begin another run there at a lower "
            "optimizer.learning_rate (--start-from, --start-step)."
        )


def _first_state(run: Run) -> TrainState:
    """The newest checkpoint's state, or a new one, perhaps with another run's weights."""
    start_from = run.start_from
    if run.checkpoints.steps():
        if start_from is not None and is_leader():
            print(f"{run.folder} has checkpoints: it goes on with them, not from {start_from}.")
        return run.restore()
    if start_from is None:
        return run.initial_state()
    with collective(f"start from {start_from}"):
        other = run.fitting(start_from)
    # Their checkpoints, in the shapes and on the devices of this run.
    weights = replace(run, checkpoints=other.checkpoints).restore_weights(run.start_step)
    tables = {
        layer: lookup.settle(table, run.row_adam, weights.step)
        for layer, table in weights.tables.items()
    }
    state = run.first_state(replace(weights, tables=tables))
    if is_leader():
        print(f"{run.folder} begins with the weights of step {int(weights.step)} of {start_from}.")
    run.save(state)  # or a run killed before its first checkpoint would forget where it came from
    return state


@contextmanager
def _stop_signal() -> Iterator[Callable[[int], bool]]:
    """Gives a function of the step that tells whether to stop before it (SIGINT, SIGTERM).

    Several processes agree on it every ten steps, because asking waits for the devices.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        # A second signal acts at once.
        signal.signal(number, handlers[signal.Signals(number)])

    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, ask) for number in signals}

    def stopped(step: int) -> bool:
        if jax.process_count() == 1:
            return asked
        return step % 10 == 0 and bool(np.any(multihost_utils.process_allgather(np.array(asked))))

    try:
        yield stopped
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
