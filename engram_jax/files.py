"""Files that several processes share: locks, and contents that appear whole or not at all."""

import errno
import fcntl
import os
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


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a path to write to; what is there at the end takes the place of `path`.

    If writing fails, `path` stays what it was. The name given keeps the suffix, by which some
    writers choose the format.
    """
    partial = path.with_name(f"partial-{path.name}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
