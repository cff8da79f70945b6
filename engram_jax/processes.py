"""The processes of a run: joining, the leader process, and failing together."""

import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state  # its client has no public name
from jax.experimental import multihost_utils

from engram_jax.errors import InputError

# A process that does not answer for this long is considered dead, and the others end. A process
# waits this long for the others before it exits.
_TIMEOUT_SECONDS = 50

# Key of the number of a failed process, in the store of the coordination service.
_FAILED = "engram_jax/failed"
_POLL_SECONDS = 1.0

_RESUME = " A run that had begun resumes from its last checkpoint."
_exiting = threading.Lock()

# Errors of XLA if another process has ended.
_LOST_CONNECTION = re.compile(
    r"gloo|closed by peer|connection|heartbeat|UNAVAILABLE", re.IGNORECASE
)


def join_processes() -> None:
    """Joins the other processes of a TPU slice, or of a SLURM, MPI or Kubernetes job.

    Elsewhere, environment variables describe them: JAX_COORDINATOR_ADDRESS (host:port of process
    0), JAX_NUM_PROCESSES, and JAX_PROCESS_ID (from 0).

    Raises:
        InputError: there is nothing to join, or one of these variables has an invalid value.
    """
    if ":" not in (address := os.environ.get("JAX_COORDINATOR_ADDRESS", ":")):
        raise InputError(f"JAX_COORDINATOR_ADDRESS is {address!r}; set it to host:port.")
    try:
        jax.distributed.initialize(
            num_processes=_number_of("JAX_NUM_PROCESSES"),
            process_id=_number_of("JAX_PROCESS_ID"),
            heartbeat_timeout_seconds=_TIMEOUT_SECONDS,
            shutdown_timeout_seconds=_TIMEOUT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed finds no other processes to join ({error}): run this under SLURM or "
            "MPI, on every worker of a TPU slice, or with JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID; on one machine, leave the flag out."
        ) from error


def _number_of(variable: str) -> int | None:
    """The number in an environment variable; None: it is not set."""
    text = os.environ.get(variable)
    if text is not None and not text.isdecimal():
        raise InputError(f"{variable} is {text!r}; set it to a number, or unset it.")
    return None if text is None else int(text)


@contextmanager
def end_together() -> Iterator[None]:
    """A `with` block, after which a process that failed ends all processes.

    Without it, the other processes would wait in their next collective operation, and this process
    would wait for them. The others end within seconds, with one sentence and status 2. With one
    process, this does nothing.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    threading.Thread(target=_watch_others, daemon=True).start()
    try:
        yield
    except SystemExit as ending:
        if ending.code in (None, 0):
            raise
        _end_all(ending.code)
    except BaseException as error:
        of_xla = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
        if of_xla and _LOST_CONNECTION.search(str(error)):
            time.sleep(5 * _POLL_SECONDS)  # the watcher says why, if the other process told it
            _end_all(f"error: Another process ended ({str(error).splitlines()[0]}).{_RESUME}")
        traceback.print_exc()
        _end_all(1)


def _watch_others() -> None:
    """Ends this process if another one has failed."""
    while (store := _store()) is not None:
        time.sleep(_POLL_SECONDS)
        try:
            failed = store.key_value_try_get(_FAILED)
        except jax.errors.JaxRuntimeError:  # no process has failed
            continue
        if int(failed) != global_state.process_id:
            time.sleep(2 * _POLL_SECONDS)  # this process may be about to end for the same reason
            _exit(f"error: Process {failed} failed, so this one ends; see its output.{_RESUME}", 2)


def _end_all(code: str | int | None) -> None:
    """Tells the other processes to end, and ends this one."""
    try:
        _store().key_value_set(_FAILED, str(global_state.process_id))
    except (jax.errors.JaxRuntimeError, AttributeError):  # another one was first, or all have left
        pass
    finally:
        _exit(code if isinstance(code, str) else None, code if isinstance(code, int) else 1)


def _store() -> Any:
    """The key-value store of the coordination service, which is a part of process 0."""
    return global_state.client


def _exit(message: str | None, status: int) -> None:
    """Ends the process without waiting for the others, as Python's normal exit does in JAX.

    Only the first thread that calls this says something.
    """
    _exiting.acquire()
    try:
        if message:
            print(message, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if global_state.process_id == 0:  # without the store, the others would not learn the reason
            time.sleep(4 * _POLL_SECONDS)
    finally:
        os._exit(status)


def is_leader() -> bool:
    """Whether this is the leader process, which writes folders, logs and manifests."""
    return jax.process_index() == 0


def all_agree(here: bool) -> bool:
    """Whether `here` is true on all processes. All processes must call this."""
    if jax.process_count() == 1:
        return here
    return bool(np.all(gather(np.asarray(here))))


def gather(here: np.ndarray) -> np.ndarray:
    """Stacks the arrays of all processes, [P, …]. All processes must call this.

    The arrays have one shape, and elements of at most 32 bits.
    """
    return np.asarray(multihost_utils.process_allgather(here))


def first_text(here: str | None) -> str | None:
    """The text of the first process that has one; None if no process has one.

    All processes must call this. Only 500 bytes are sent.
    """
    if jax.process_count() == 1:
        return here
    mine = np.frombuffer((here or "").encode()[:500].ljust(500, b"\0"), np.uint8)
    texts = [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in gather(mine)]
    return next((text for text in texts if text), None)


@contextmanager
def collective(what: str) -> Iterator[None]:
    """A `with` block that fails on all processes if it fails on one. All processes must enter it.

    If the block itself waits for other processes, as a collective write does, it must raise on all
    processes or on none.

    Raises:
        InputError: another process failed to do `what`; that process raises its own error.
    """
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    if not all_agree(failure is None):
        raise failure or InputError(f"Another process could not {what}; see its error.")


def check_same_everywhere(numbers: Sequence[int], message: str) -> None:
    """Checks that all processes give the same numbers. All processes must call this.

    Raises:
        InputError: they do not; on all processes, with this message.
    """
    if jax.process_count() == 1:
        return
    mine = np.full(64, -1, np.int32)
    mine[: len(numbers)] = numbers[-64:]
    if not all_agree(bool(np.all(multihost_utils.broadcast_one_to_all(mine) == mine))):
        raise InputError(message)
