"""Locks, atomic creation of files and folders, and careful reading of small files."""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from engram_jax.errors import InputError


def parse_json(text: str | bytes) -> Any:
    """Parses JSON.

    Raises:
        ValueError: it is not JSON, or too deeply nested.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is too deeply nested") from error


def has_name_twice(text: str, name: str) -> bool:
    """Whether a JSON object has several values of a name. Of these, readers take different ones.

    Args:
        text: the object, which is valid JSON.
        name: a name of its first level.
    """
    if text.count(f'"{name}"') < 2:
        return False
    return [other for other, _ in json.loads(text, object_pairs_hook=list)].count(name) > 1


def expand_home(path: str | Path) -> Path:
    """The path, with ~ and ~USER replaced by a home folder.

    Raises:
        InputError: there is no such folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{path} begins with the home folder of a user that does not exist here; correct it."
        ) from error


def is_irregular(path: Path) -> bool:
    """Whether a path is a pipe, socket or device, which must not be waited for."""
    return path.exists() and not (path.is_file() or path.is_dir())


def read_regular(path: Path, most: int | None = None) -> bytes:
    """Returns the content of a file, which must have at most `most` bytes.

    Raises:
        OSError: it cannot be read or is too large, or is a pipe or device, whose content may never
            end.
    """
    if is_irregular(path):
        raise OSError(errno.EINVAL, "no regular file", str(path))
    if most is not None and path.stat().st_size > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return path.read_bytes()


def check_utf8(path: Path, what: str) -> None:
    """Checks that a path can be written into JSON, logs and messages.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"The path of {what}, {str(path)!r}, is not UTF-8; rename it.") from error


def check_run_path(folder: Path) -> None:
    """Refuses a path in which Orbax could not find again what it has written.

    It finds the files of an array by a pattern that contains the absolute path.

    Raises:
        InputError: it is such a path, a remote folder, or not UTF-8.
    """
    check_utf8(folder.absolute(), "the run folder")
    if re.match(r"\w+:/", str(folder)):  # pathlib writes gs://bucket as gs:/bucket
        raise InputError(f"{folder} is a remote folder, which is not supported; use a local one.")
    if found := sorted(set("[]*?\\") & set(str(folder.absolute()))):
        raise InputError(
            f"The path {folder.absolute()} contains {' '.join(found)}, so checkpoints in it could "
            "not be read again; choose another --run folder."
        )


@contextmanager
def hold_lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a lock on the file `path`. The end of the process releases it, too.

    Yields whether it holds the lock. Some network file systems do not support locks. There, this
    does nothing, and yields False.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
        InputError: the file cannot be written or locked.
    """
    with ExitStack() as stack:
        is_locked = True
        try:
            if is_irregular(path):
                raise InputError(f"{path} is no regular file, so it cannot be locked; remove it.")
            file = stack.enter_context(path.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise InputError(
                    f"Cannot write and lock {path} ({error.strerror}); choose another folder, or "
                    "give write permission."
                ) from error
            is_locked = False
        yield is_locked


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to. At the end, that file replaces `path` atomically.

    If writing fails, `path` is unchanged. The temporary name is of this process alone. It has the
    same suffix, because some writers choose the format by it.
    """
    partial = path.with_name(f"partial-{os.getpid()}-{path.name}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder to write to. At the end, it is renamed to `folder`.

    If writing fails, it is removed, and there is no `folder`.

    Raises:
        InputError: `folder` is a file, or not empty, at the beginning or at the end.
    """
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; name another folder.")
    partial = folder.with_name(f"partial-{os.getpid()}-{folder.name}")
    partial.mkdir(parents=True)
    try:
        yield partial
        try:
            partial.replace(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise InputError(
                f"Another program has written to {folder} meanwhile; name another folder."
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flushes the renames in a folder to the disk, so that they survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder; what cannot be removed of a folder stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
