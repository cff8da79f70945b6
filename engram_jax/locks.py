"""Locks on files, for processes of one machine or one shared file system."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def hold_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds a lock, which ends with the process at the latest; `path` is the file that carries it.

    On file systems without locks, which some networks have, nothing is held.

    Raises:
        BlockingIOError: somebody holds it, and `wait` is False.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield
