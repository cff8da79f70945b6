"""The one error that speaks to users, and how programs end."""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(ValueError):
    """What the user gave cannot work; the message names the thing and the remedy.

    Entry points print the message alone and leave with status 2. Anything else that is raised is a
    bug and keeps its traceback.
    """


@contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the program with a sentence and status 2 on what its user can mend."""
    try:
        yield
    except InputError as error:
        problem = str(error)
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor fail when flushing
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        problem = f"The disk is full ({error.filename or error}): free some space and start again."
    else:
        return
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)
