"""The error type for invalid input, and how programs end on it."""

import errno
import io
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Timer
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Training saves a checkpoint and stops on these.
STOP_SIGNALS = (
    *(signal.SIGINT, signal.SIGTERM),
    *(signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
)


_OF_ENVIRONMENT = re.compile("Unable to initialize backend")  # of JAX_PLATFORMS
_OF_MEMORY = re.compile("RESOURCE_EXHAUSTED: .*?([Oo]ut of memory|allocat)", re.DOTALL)


class InputError(ValueError):
    """The user's input is invalid. The message names the cause and the remedy.

    Entry points print only the message, and exit with status 2. Any other exception is a bug, and
    is printed with its traceback.
    """


class UnbreakableErrors(io.TextIOBase):
    """The error output, without errors: a closed terminal or a full log must not end a run.

    Args:
        stream: the output; None: the value of `sys.stderr` at each call.
    """

    def __init__(self, stream: Any = None) -> None:
        self._stream = stream

    @property
    def _now(self) -> Any:
        return self._stream or sys.stderr

    encoding = property(lambda self: getattr(self._now, "encoding", None))

    def write(self, text: str) -> int:
        """Writes as much as is possible."""
        with suppress(OSError, ValueError, AttributeError):
            self._now.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes as much as is possible."""
        with suppress(OSError, ValueError, AttributeError):
            self._now.flush()

    def fileno(self) -> int:
        """The number of the file."""
        return int(self._now.fileno())

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return bool(self._now.isatty())


@contextmanager
def one_sentence() -> Iterator[None]:
    """On an error that the user can correct, ends the program with one sentence and status 2.

    Ctrl-C ends it with status 130, also in a moment when Python ignores exceptions. Output that the
    terminal's encoding does not have, such as ± in ASCII, is escaped.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # so that imports end without traceback
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdout is None:  # it is closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (stays open until the process ends)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (stays open until the process ends)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stderr is sys.__stderr__:
        sys.stderr = UnbreakableErrors(sys.stderr)
    try:
        _check_limits()
        with suppress(PermissionError):
            os.getcwd()  # if the folder is gone, it is said now, and not at the end of a run
        with _interrupts_again():
            yield
    except InputError as error:
        problem = str(error)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that flushing works
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        path = error.filename
        if error.errno in (errno.EMFILE, errno.ENFILE):
            problem = "Too many files are open; raise the limit (ulimit -n), or use fewer workers."
        elif error.errno in DISK_FULL:
            problem = f"Cannot write {path or 'a file'} ({error.strerror}); free some space and "
            problem += "run again."
        elif path is not None:
            problem = f"Cannot use {path} ({error.strerror}); check the path and its permissions."
        elif isinstance(error, FileNotFoundError):  # of os.getcwd
            problem = "The current folder does not exist any more; change to another one."
        else:
            raise
    except (RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        if isinstance(error, MemoryError) or _OF_MEMORY.match(str(error)):
            why = f" ({reason})" if reason else ""
            problem = f"The memory is full{why}; lower sizes such as data.batch_size, or give less "
            problem += "input."
        elif _OF_ENVIRONMENT.match(str(error)):
            problem = f"{reason}; correct the name."
        else:
            raise
    else:
        return
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def _interrupts_again() -> Iterator[None]:
    """Ctrl-C comes again, a little later, if Python ignores it.

    It does so in destructors and callbacks, as in JAX's callback of the garbage collector.
    """
    report, pending = sys.unraisablehook, []

    def send_again(ignored: Any) -> None:
        if not issubclass(ignored.exc_type, KeyboardInterrupt):
            report(ignored)
            return
        pending.append(Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)))
        pending[-1].start()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = report
        for timer in pending:
            timer.join()


def _check_limits() -> None:
    """Checks the limits of this process, because native code ends without a reason above them.

    Raises:
        InputError: one is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < _MOST_FILES:
        allowed = _MOST_FILES if hard == unlimited else min(hard, _MOST_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
        if max(soft, allowed) < _LEAST_FILES:
            raise InputError(
                f"Only {hard} files may be open; raise the limit (ulimit -n) to {_LEAST_FILES}."
            )
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != unlimited and address_space < _LEAST_ADDRESS_SPACE:
        raise InputError(
            f"Only {address_space / 1e9:.1f} GB of virtual memory is allowed; raise the limit "
            f"(ulimit -v) to {_LEAST_ADDRESS_SPACE / 1e9:.0f} GB or more."
        )


# A tiny run was seen to fail with 24 files, to fail with 40 and four workers, and with 1 GB.
_LEAST_FILES, _MOST_FILES, _LEAST_ADDRESS_SPACE = 128, 4096, 2 * 10**9


def disk_reason(error: BaseException) -> str | None:
    """Why a write failed, if it was a full disk, a quota, or a limit on file size; else None.

    TensorStore raises ValueError with the operating system's error number in the text.
    """
    texts = [f"os_error_code='{getattr(cause, 'errno', '')}' {cause}" for cause in _causes(error)]
    found = (n for n in DISK_FULL if any(f"os_error_code='{n}'" in text for text in texts))
    return next(map(os.strerror, found), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
