"""The training loop: runs steps, and writes checkpoints, metrics and held-out losses."""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from tqdm import tqdm

from engram_jax.checkpoint import Checkpoints
from engram_jax.data.corpus import Corpus
from engram_jax.data.packing import SentBatch
from engram_jax.data.pipeline import prefetch_to_device
from engram_jax.errors import STOP_SIGNALS, UnbreakableErrors
from engram_jax.evaluation.health import HealthStudy, warn_of_inert
from engram_jax.evaluation.held_out import Score, evaluate_held_out, make_scorer, pool
from engram_jax.files import expand_home
from engram_jax.formats.start_memory import start_with
from engram_jax.identity import check_saved_by
from engram_jax.memory.row_feed import RowFeed
from engram_jax.memory.store import Stores
from engram_jax.metrics import MetricsLog, read_metrics
from engram_jax.placement import bytes_of_all, open_feed
from engram_jax.processes import all_agree, collective, is_leader
from engram_jax.progress import say_at_first
from engram_jax.run import Run
from engram_jax.train_state import TrainState
from engram_jax.train_step import Metrics, make_train_step

AGREE_EVERY = 10  # steps between agreements of several processes


class Diverged(RuntimeError):
    """The loss or the gradient is not finite."""


def train(run: Run, *, profile: bool = False) -> TrainState:
    """Trains to the configured number of steps, from the newest checkpoint if there is one.

    A signal (one of `STOP_SIGNALS`, such as Ctrl-C) saves a checkpoint and returns early. On GPU
    and TPU, the steps go on while another checkpoint is written. The returned state has no tables
    if they are in host memory or in a file.

    Args:
        run: the run.
        profile: write a trace of ten steps to the run folder.

    Raises:
        InputError: invalid input, such as too little disk space.
        Diverged: NaN or Inf; the message names the step and the last good checkpoint.
    """
    config, program = run.config.train, run.program
    with program.use_mesh(), run.exclusively(), ExitStack() as stack:
        corpora = run.corpora()
        _require_space(run)
        feed = stack.enter_context(open_feed(program, run.folder))
        state = _first_state(run, feed.stores if feed else None)
        step = int(state.step)
        _require_space(run, feed)
        saved = step if run.checkpoints.steps() else None
        train_step = say_at_first(make_train_step(program), "Compiling the training step.")
        evaluate = _Evaluation(run, corpora, feed)
        progress = stack.enter_context(_open_progress(run, step, feed))
        stopped = stack.enter_context(_stop_signal())
        stack.enter_context(_complete_last(run.checkpoints))
        batches = stack.enter_context(run.batches(step))
        trace = stack.enter_context(_Trace(run.folder / "profile", step + 5 if profile else None))
        # If the run was killed after saving this step but before evaluating it, evaluate it now.
        if step and evaluate.is_due(step) and all_agree(not is_leader() or _lacks_score(run, step)):
            evaluate(state, progress)
        for sent, following in pairwise(prefetch_to_device(batches, program.send)):
            if step == config.steps:
                break
            if stopped(step):
                progress.say_stopping(step)
                break
            if _agrees_before(step):
                run.checkpoints.finish(wait=False)
            trace.before(step)
            state = _with_rows(feed, state, sent, following)
            state, metrics = train_step(state, sent.batch, program.row_adam)
            step += 1
            progress.update(step, metrics)
            if is_due(step, config.checkpoint_every, config.steps):
                _save(run, feed, state, progress)
                saved = step
            if evaluate.is_due(step):
                progress.drain()
                evaluate(state, progress)
        if step != saved:
            _save(run, feed, state, progress)
        progress.drain()
    return state if feed is None else replace(state, tables={})


def _require_space(run: Run, feed: RowFeed | None = None) -> None:
    """Checks that the checkpoints to come fit on the disk."""
    rows = bytes_of_all(feed.stores) if feed else 0
    config, abstract = run.config.train, run.program.abstract_state()
    with collective("find disk space for the checkpoints"):
        left = config.steps - max(run.checkpoints.steps(), default=0)
        to_come = -(-left // (config.checkpoint_every or config.steps))
        run.checkpoints.require_space(abstract, max(to_come, 1), more_bytes=rows)


def _with_rows(
    feed: RowFeed | None, state: TrainState, sent: SentBatch, following: SentBatch
) -> TrainState:
    """The state with the rows of the next step, if the tables are outside the devices."""
    if feed is None:
        return state
    return replace(state, tables=feed.load(state.tables, sent.buffers, following.buffers))


def _save(run: Run, feed: RowFeed | None, state: TrainState, progress: "_Progress") -> None:
    """Saves a checkpoint of the newest step, after checking the step; may return before its end."""
    progress.drain()
    if feed:
        feed.flush(state.tables)
    run.save(state, feed.stores if feed else None, wait=False)
    progress.restart_clock()


class _Evaluation:
    """Evaluates held-out losses during training."""

    def __init__(self, run: Run, corpora: Sequence[Corpus], feed: RowFeed | None) -> None:
        self._run, self._corpora, self._feed = run, corpora, feed
        self._scorer = say_at_first(make_scorer(run.program), "Compiling the evaluation.")

    def is_due(self, step: int) -> bool:
        config = self._run.config.train
        return is_due(step, config.evaluate_every, config.steps)

    def __call__(self, state: TrainState, progress: "_Progress") -> None:
        """Scores the state and logs the losses."""
        health = HealthStudy()
        if self._feed:
            self._feed.flush(state.tables)
        scores = evaluate_held_out(
            self._run.program,
            self._scorer,
            state.weights,
            self._corpora,
            max_tokens=self._run.config.train.evaluate_tokens,
            watch=health,
            feed=self._feed,
        )
        progress.report(int(state.step), scores, warn_of_inert(health.report()))


class _Trace:
    """A profile of ten steps.

    Args:
        folder: where the profile is written.
        first: its first step; None: no profile.
    """

    STEPS = 10

    def __init__(self, folder: Path, first: int | None) -> None:
        self._folder, self._first = folder, first
        self._open = ExitStack()

    def before(self, step: int) -> None:
        """Starts or ends the profile, if that is due before this step."""
        if self._first is None:
            return
        if step == self._first:
            self._open.enter_context(jax.profiler.trace(self._folder))
        elif step == self._first + self.STEPS:
            self._open.close()

    def __enter__(self) -> "_Trace":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()


@contextmanager
def _open_progress(run: Run, step: int, feed: RowFeed | None) -> Iterator["_Progress"]:
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
        yield _Progress(run, log, stack.enter_context(bar), feed)


def _lacks_score(run: Run, step: int) -> bool:
    return all(line["step"] != step for line in read_metrics(run.folder, "held_out"))


def is_due(step: int, every: int, last: int) -> bool:
    """Whether an action is due that happens every `every` steps and at the last step."""
    return step == last or (every > 0 and step % every == 0)


class _Progress:
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


def _first_state(run: Run, stores: Stores | None = None) -> TrainState:
    """The state of the newest checkpoint, or a new state, random or with another run's weights.

    If the tables are outside the devices, `stores` are empty, and get the rows.
    """
    start_from, program = run.start_from, run.program
    if run.checkpoints.steps():
        if start_from is not None and is_leader():
            print(f"{run.folder} has checkpoints: resuming from them, not from {start_from}.")
        return run.restore(stores=stores)
    if start_from is None:
        state, memory = program.initial_state(), run.config.memory.start_from
        if memory is None:
            return state
        return start_with(program, state, expand_home(memory), stores)
    with collective(f"start from {start_from}"):
        other = run.fitting(start_from)
    # The other run's checkpoints, restored with the shapes and devices of this run.
    theirs = replace(run, checkpoints=other.checkpoints)
    weights = theirs.restore_weights(run.start_step, stores, reset_rows=True)
    check_saved_by(other.config, other.checkpoints.path(int(weights.step)), trains=False)
    state = program.state_from_weights(weights)
    if is_leader():
        print(f"{run.folder} begins with the weights of step {int(weights.step)} of {start_from}.")
    # Otherwise a run that is killed before its first checkpoint would start at random.
    run.save(state, stores)
    return state


def _agrees_before(step: int) -> bool:
    """Whether the processes agree on something before a step.

    Several do so only every ten steps, because agreeing waits for the devices.
    """
    return jax.process_count() == 1 or step % AGREE_EVERY == 0


@contextmanager
def _complete_last(checkpoints: Checkpoints) -> Iterator[None]:
    """A `with` block, after which no checkpoint is left unfinished.

    This also holds if one process fails. If one of several fails, the others cannot help it.
    """
    try:
        yield
    except Exception:
        if jax.process_count() == 1:
            checkpoints.finish()
        raise
    checkpoints.finish()


@contextmanager
def _stop_signal() -> Iterator[Callable[[int], bool]]:
    """Yields a function that tells whether to stop before a step, because of a signal.

    The signals are Ctrl-C, SIGTERM, SIGHUP (a closed terminal), and SIGUSR1, SIGUSR2 and SIGXCPU
    (of cluster schedulers), unless they are ignored, as SIGHUP by nohup.
    """
    requested = False

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        requested = True
        # A second signal has its usual effect.
        signal.signal(number, handlers[signal.Signals(number)])

    handlers = {}
    if threading.current_thread() is threading.main_thread():  # only there, Python allows it
        handlers = {
            number: signal.signal(number, request)
            for number in STOP_SIGNALS
            if signal.getsignal(number) != signal.SIG_IGN
        }

    def stopped(step: int) -> bool:
        if jax.process_count() == 1:
            return requested
        return _agrees_before(step) and not all_agree(not requested)

    try:
        yield stopped
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
