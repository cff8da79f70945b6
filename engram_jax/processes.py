"""The processes of one run: who leads, and how they fail together instead of waiting for ever."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from engram_jax.errors import InputError


def is_leader() -> bool:
    """Whether this process writes what one must write: folders, logs, manifests."""
    return jax.process_index() == 0


def all_agree(here: bool) -> bool:
    """Whether `here` holds on all processes, which meet at this point."""
    if jax.process_count() == 1:
        return here
    return bool(np.all(multihost_utils.process_allgather(np.asarray(here))))


@contextmanager
def collective(what: str) -> Iterator[None]:
    """Runs the same block on all processes; if it raises on one, it raises on all.

    A block that itself waits for the others, as a collective write does, is left by all or none.

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
