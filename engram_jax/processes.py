"""The processes of a run: the leader process, and collective failure instead of a deadlock."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from engram_jax.errors import InputError


def is_leader() -> bool:
    """Whether this is the leader process, which writes folders, logs and manifests."""
    return jax.process_index() == 0


def all_agree(here: bool) -> bool:
    """Whether `here` is true on all processes. All processes must call this."""
    if jax.process_count() == 1:
        return here
    return bool(np.all(multihost_utils.process_allgather(np.asarray(here))))


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
