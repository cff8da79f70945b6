"""The training loop: runs steps, and writes checkpoints, metrics and held-out losses."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import FrameType

import jax

from engram_jax.checkpoint import Checkpoints
from engram_jax.data.corpus import Corpus
from engram_jax.data.packing import SentBatch
from engram_jax.data.pipeline import prefetch_to_device
from engram_jax.errors import STOP_SIGNALS
from engram_jax.evaluation.health import HealthStudy, warn_of_inert
from engram_jax.evaluation.held_out import evaluate_held_out, make_scorer
from engram_jax.files import expand_home
from engram_jax.formats.start_memory import start_with
from engram_jax.identity import check_saved_by
from engram_jax.memory.row_feed import RowFeed
from engram_jax.memory.store import Stores
from engram_jax.metrics import read_metrics
from engram_jax.placement import bytes_of_all, open_feed
from engram_jax.processes import all_agree, collective, is_leader
from engram_jax.progress import say_at_first
from engram_jax.run import Run
from engram_jax.train_state import TrainState
from engram_jax.train_step import make_train_step
from engram_jax.training_progress import TrainingProgress, is_due, open_progress

AGREE_EVERY = 10  # steps between agreements of several processes


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
        progress = stack.enter_context(open_progress(run, step, feed))
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


def _save(run: Run, feed: RowFeed | None, state: TrainState, progress: TrainingProgress) -> None:
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

    def __call__(self, state: TrainState, progress: TrainingProgress) -> None:
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


def _lacks_score(run: Run, step: int) -> bool:
    return all(line["step"] != step for line in read_metrics(run.folder, "held_out"))


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
