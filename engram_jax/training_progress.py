"""The progress of a training run: its bar, its log, and the check that its losses are finite."""

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
from tqdm import tqdm

from engram_jax.errors import UnbreakableErrors
from engram_jax.evaluation.held_out import Score, pool
from engram_jax.memory.row_feed import RowFeed
from engram_jax.metrics import MetricsLog
from engram_jax.processes import collective, is_leader
from engram_jax.run import Run
from engram_jax.train_step import Metrics


class Diverged(RuntimeError):
    """The loss or the gradient is not finite."""


def is_due(step: int, every: int, last: int) -> bool:
    """Whether an action is due that happens every `every` steps and at the last step."""
    return step == last or (every > 0 and step % every == 0)


@contextmanager
def open_progress(run: Run, step: int, feed: RowFeed | None) -> Iterator["TrainingProgress"]:
    """Opens the log and the progress bar of a run that starts or resumes at a step."""
    with ExitStack() as stack:
        log = None
        with collective("open the log"):
            if is_leader():
                log = stack.enter_context(MetricsLog(run.folder, resume_step=step))
        bar = tqdm(
            total=run.config.train.steps,
            initial=step,
            unit="step",
            file=UnbreakableErrors(),
            disable=not is_leader(),
            mininterval=0.5 if sys.stderr and sys.stderr.isatty() else 30,  # keeps log files short
        )
        yield TrainingProgress(run, log, stack.enter_context(bar), feed)


class TrainingProgress:
    """Logs metrics one step late, so that reading them does not make the device wait."""

    def __init__(
        self, run: Run, log: MetricsLog | None, bar: "tqdm[Any]", feed: RowFeed | None
    ) -> None:
        self._run, self._feed = run, feed
        self._log = log
        self._bar = bar
        self._pending: tuple[int, Metrics] | None = None
        self._clock: tuple[int, float] | None = None
        self._ended = time.time()  # when the newest step or pause ended
        self._compiles = True

    def restart_clock(self) -> None:
        """Starts a new measurement of tokens per second, after saving or evaluating."""
        self._clock = None
        self._skip_time()

    def update(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a dispatched step, and logs those of the step before."""
        self.drain()
        self._pending = step, metrics

    def drain(self) -> None:
        """Waits for the last dispatched step and checks it; logs it if that is due.

        Raises:
            Diverged: its loss or gradient is not finite.
        """
        if self._pending is None:
            return
        step, arrays = self._pending
        self._pending = None
        metrics = {name: array.item() for name, array in jax.device_get(arrays).items()}
        self._check_finite(step, metrics)
        config = self._run.config
        if self._clock is None:
            self._clock = step, time.perf_counter()
        if self._compiles:  # in the first step
            self._skip_time()
        self._compiles, self._ended = False, time.time()
        self._bar.update()
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
            counters = self._feed.counters() if self._feed else {}
            self._log.write(step, metrics | counters)

    def _skip_time(self) -> None:
        """Time since the newest step or pause does not count in the bar's time left."""
        now = time.time()
        if not self._bar.disable:
            self._bar.start_t += now - self._ended
            self._bar.last_print_t += now - self._ended
        self._ended = now

    def report(self, step: int, scores: Mapping[str, Score], warnings: Sequence[str]) -> None:
        """Logs held-out losses, and prints them and the warnings."""
        losses = {f"loss/{name}": score.loss for name, score in scores.items()}
        losses["loss"] = pool(list(scores.values())).loss
        if self._log:
            self._log.write(step, losses, kind="held_out")
            by_source = ", ".join(f"{name} {score.loss:.3f}" for name, score in scores.items())
            self._bar.write(
                f"step {step}: held-out loss {losses['loss']:.3f} ({by_source})", file=self._bar.fp
            )
            for warning in warnings:
                self._bar.write(f"warning: {warning}", file=self._bar.fp)
        self.restart_clock()

    def say_stopping(self, step: int) -> None:
        """Says that a signal ends the run before a step, and what a second signal does."""
        if not is_leader():
            return
        saved = self._run.checkpoints.steps()
        then = f"go on from the checkpoint of step {saved[-1]}" if saved else "begin again"
        self._bar.write(
            f"Stopping before step {step + 1} because of a signal, after saving a checkpoint. A "
            f"second signal ends the program at once, and the run would then {then}.",
            file=self._bar.fp,
        )

    def _check_finite(self, step: int, metrics: Mapping[str, float | int]) -> None:
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"]):
            return
        self._run.checkpoints.finish()
        # The state before this step may contain the cause, so its checkpoint is not called good.
        good = [saved for saved in self._run.checkpoints.steps() if saved < step - 1]
        newest = f"the last good checkpoint is that of step {good[-1]}" if good else "none is good"
        raise Diverged(
            f"Step {step} has loss {metrics['loss']} and gradient norm "
            f"{metrics['gradient_norm']}. Of the checkpoints in "
            f"{self._run.folder / 'checkpoints'}, {newest}. Check the batch of that step "
            f"(`next(run.batches({step - 1}))`), or start another run from a good checkpoint "
            "(--start-from, --start-step) with a lower optimizer.learning_rate."
        )
