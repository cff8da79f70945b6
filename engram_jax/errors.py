"""The error type for invalid input, and how programs end on it."""

import errno
import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# Errors of JAX and pathlib: JAX_PLATFORMS names no platform, and ~NAME names no user.
_OF_ENVIRONMENT = re.compile("Unable to initialize backend|Could not determine home directory")
_OF_MEMORY = re.compile("RESOURCE_EXHAUSTED: .*?([Oo]ut of memory|allocat)", re.DOTALL)


class InputError(ValueError):
    """The user's input is invalid. The message names the cause and the remedy.

    Entry points print only the message, and exit with status 2. Any other exception is a bug, and
    is printed with its traceback.
    """


@contextmanager
def one_sentence() -> Iterator[None]:
    """On an error that the user can correct, ends the program with one sentence and status 2.

    Ctrl-C ends it with status 130. Output that the terminal's encoding does not have, such as ± in
    ASCII, is escaped.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # so that imports end without traceback
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdout is None:  # it is closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
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
        if error.errno in DISK_FULL:
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
            problem = f"The memory is full ({reason}); lower data.batch_size or other sizes."
        elif _OF_ENVIRONMENT.match(str(error)):
            problem = f"{reason}; correct the name."
        else:
            raise
    else:
        return
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)
