"""Says what a program does while nothing else is seen: usually it compiles."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer

from tqdm import tqdm

from engram_jax.processes import is_leader

PATIENCE = 3.0  # seconds without a word


@contextmanager
def say_if_slow(sentence: str) -> Iterator[None]:
    """A `with` block of which the leader says `sentence` if it takes more than `PATIENCE`."""

    def say() -> None:
        tqdm.write(sentence, file=sys.stderr)  # above a progress bar, if there is one

    timer = Timer(PATIENCE, say)
    timer.daemon = True
    if is_leader():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def say_at_first[**Arguments, Result](
    function: Callable[Arguments, Result], sentence: str
) -> Callable[Arguments, Result]:
    """The function, whose first call says `sentence` if it is slow, because it compiles."""
    called = False

    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        nonlocal called
        if called:
            return function(*args, **kwargs)
        called = True
        with say_if_slow(sentence):
            return function(*args, **kwargs)

    return call
