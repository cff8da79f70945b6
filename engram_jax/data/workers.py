"""Processes that build batches. A process that dies is replaced, and no batch is lost."""

import multiprocessing
import signal
import sys
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from engram_jax.errors import STOP_SIGNALS, InputError

# A new process does not inherit the pipes of the others. So the death of a process closes its pipe,
# and whoever reads from the pipe is told.
_CONTEXT = multiprocessing.get_context("spawn")

# A process that died this often, usually for lack of memory, is not replaced again.
_MAX_DEATHS = 3


class WorkerPool[Item](Iterator[Item]):
    """The items build(first), build(first + 1), …, built ahead by several processes.

    Call `close` at the end; otherwise the processes run until this object or Python ends.

    Args:
        build: a picklable function of a number.
        first: number of the first item.
        workers: number W of processes; the items number k·W + w are built by process w.
        ahead: number of items that this process holds ready. Each worker holds another one.

    Raises:
        InputError: the program is a script that a new process would run again from its start.
    """

    def __init__(self, build: Callable[[int], Item], first: int, workers: int, ahead: int) -> None:
        _check_guard()
        self._workers = [_Worker(build, index, workers) for index in range(workers)]
        self._close = weakref.finalize(self, _close_all, self._workers)
        self._number = first
        self._ready: deque[Future[Item]] = deque()
        for _ in range(max(1, ahead)):
            self._request()

    def _request(self) -> None:
        self._ready.append(self._workers[self._number % len(self._workers)].request(self._number))
        self._number += 1

    def __next__(self) -> Item:
        """Return the next item; raises what `build` raises."""
        item = self._ready.popleft().result()
        self._request()
        return item

    def close(self) -> None:
        """End the processes and threads."""
        self._close()


def _close_all(workers: "Sequence[_Worker[Any]]") -> None:
    for worker in workers:
        worker.close()


class _Worker[Item]:
    """A process that sends build(n), build(n + W), … through a pipe, and a thread that reads it."""

    def __init__(self, build: Callable[[int], Item], index: int, stride: int) -> None:
        self._build, self._index, self._stride = build, index, stride
        self._process: multiprocessing.process.BaseProcess | None = None
        self._deaths = 0
        self._closed = False
        self._thread = ThreadPoolExecutor(1, f"batches-{index}")

    def request(self, number: int) -> "Future[Item]":
        """Read item `number`. Numbers must come in the order n, n + W, …"""
        return self._thread.submit(self._receive, number)

    def _receive(self, number: int) -> Item:
        while not self._closed and self._deaths < _MAX_DEATHS:
            try:
                if self._process is None:
                    self._start(number)
                error, item = self._pipe.recv()
            except (OSError, EOFError) as problem:  # a new process can die, or not start at all
                self._note_death(number, problem)
                continue
            if error is not None:
                raise error
            return item
        if self._closed:
            raise EOFError("the worker is closed")
        return self._build(number)

    def _start(self, number: int) -> None:
        self._pipe, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_send_items, args=(theirs,), daemon=True)
        try:
            process.start()
        finally:
            theirs.close()  # now the process holds the only other end
        self._process = process
        if self._closed:  # by another thread
            process.kill()
        # Not as arguments of the process: if it died before it read them, writing them would never
        # end, because multiprocessing itself holds the reading end meanwhile.
        self._pipe.send((self._build, number, self._stride))

    def _note_death(self, number: int, problem: Exception) -> None:
        self._pipe.close()
        how = str(problem)
        if self._process is not None:
            self._process.join()
            code = self._process.exitcode
            how = f"exit code {code}{', as if memory was full' if code == -signal.SIGKILL else ''}"
            self._process = None
        if self._closed:
            return
        self._deaths += 1
        next_builder = "this process" if self._deaths == _MAX_DEATHS else "a new one"
        print(
            f"Data worker {self._index} died ({how}). Its batches, from number {number} on, are "
            f"built by {next_builder}.",
            file=sys.stderr,
        )

    def close(self) -> None:
        self._closed = True
        self._kill()
        self._thread.shutdown(cancel_futures=True)
        self._kill()  # the thread may have been starting another one

    def _kill(self) -> None:
        if (process := self._process) is not None:
            process.kill()
            process.join()


def _check_guard() -> None:
    # A new process imports the main module. Without the guard, that runs all of it again.
    file = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    if file.suffix == ".py" and file.is_file() and b"__main__" not in file.read_bytes():
        raise InputError(
            f"{file} starts processes that build batches, and each of them would run it again; put "
            'its main part under `if __name__ == "__main__":`, or set data.workers to 0.'
        )


def _send_items(pipe: Connection) -> None:
    """Receives (build, number, stride). Sends (None, item) for each item, or (error, None).

    The process ends after an error, or when its parent has closed the pipe or has ended. It ignores
    signals to the process group, because the parent may still need items.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    try:
        build, number, stride = pipe.recv()
        while True:
            pipe.send((None, build(number)))
            number += stride
    except (BrokenPipeError, ConnectionResetError, EOFError):
        pass
    except MemoryError:
        raise SystemExit(1) from None  # as if the operating system had killed it
    except Exception as error:
        error.add_note(traceback.format_exc())
        pipe.send((error, None))
