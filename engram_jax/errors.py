"""The error type for invalid input, and how programs end on it."""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(ValueError):
    """The user's input is invalid. The message names the cause and the remedy.

    Entry points print only the message, and exit with status 2. Any other exception is a bug, and
    is printed with its traceback.
    """


@contextmanager
def one_sentence() -> Iterator[None]:
    """On an error that the user can correct, ends the program with one sentence and status 2."""
    try:
        yield
    except InputError as error:
        problem = str(error)
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that flushing works
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        problem = f"The disk is full ({error.filename or error}): free some space and run again."
    else:
        return
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)
