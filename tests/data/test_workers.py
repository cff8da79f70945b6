"""Processes that build items, and what happens when they die."""

import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from multiprocessing import resource_tracker, util
from pathlib import Path

import numpy as np
import pytest

from engram_jax.data.workers import WorkerPool
from engram_jax.errors import InputError

LARGE = 1 << 18  # int32 words; far above the 64 KiB that a pipe holds, so sending waits for reading


def build(number: int, *, words: int = 1, deadly: tuple[int, ...] = (), marks: str = "") -> object:
    """Item `number`. A process other than the test's dies the first times it builds deadly ones."""
    if number in deadly and multiprocessing.parent_process() is not None:
        mark = Path(marks) / f"{number}-{os.getpid()}"
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 7 and words == 7:
        raise InputError("there is no item 7")
    return np.full(words, number, np.int32)


def numbers(pool: WorkerPool, count: int) -> list[int]:
    items = [next(pool) for _ in range(count)]
    assert all(np.all(item == item[0]) for item in items)
    return [int(item[0]) for item in items]


def children() -> list[int]:
    return [child.pid for child in multiprocessing.active_children()]


def test_workers_killed_at_any_moment_cost_no_item(capfd: pytest.CaptureFixture[str]) -> None:
    """Most of them while they send an item, which is when Grain's pool waits for ever."""
    pool = WorkerPool(partial(build, words=LARGE), 3, workers=2, ahead=2)
    assert numbers(pool, 4) == [3, 4, 5, 6]
    time.sleep(0.5)  # both are now waiting to send
    for child in children():
        os.kill(child, signal.SIGKILL)
    assert numbers(pool, 6) == [7, 8, 9, 10, 11, 12]
    assert len(children()) == 2
    pool.close()
    assert not children()
    errors = capfd.readouterr().err
    assert errors.count("exit code -9") == 2 and "are built by a new one" in errors


def test_a_worker_that_dies_again_and_again_is_replaced_by_this_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pool = WorkerPool(partial(build, deadly=(4,), marks=str(tmp_path)), 0, workers=1, ahead=1)
    assert numbers(pool, 8) == list(range(8))
    pool.close()
    assert len(list(tmp_path.iterdir())) == 3  # three processes died
    assert "are built by this process" in capfd.readouterr().err


def test_an_error_of_the_builder_reaches_the_caller() -> None:
    pool = WorkerPool(partial(build, words=7), 6, workers=2, ahead=1)
    assert numbers(pool, 1) == [6]
    with pytest.raises(InputError, match="no item 7"):
        next(pool)
    pool.close()


def test_signals_to_the_process_group_do_not_end_workers() -> None:
    pool = WorkerPool(build, 0, workers=1, ahead=1)
    assert numbers(pool, 3) == [0, 1, 2]
    before = children()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(before[0], number)
    assert numbers(pool, 4) == [3, 4, 5, 6]
    assert children() == before
    del pool  # ends the processes, too
    assert not children()


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.5])
def test_a_pool_is_closed_while_its_workers_start(seconds: float) -> None:
    pool = WorkerPool(build, 0, workers=2, ahead=2)
    time.sleep(seconds)
    pool.close()
    assert not children()


def test_a_worker_killed_before_it_has_read_its_arguments_is_replaced(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its arguments do not fit in a pipe, so that writing them waits for someone who reads."""
    start, killed = util.spawnv_passfds, []

    def kill_first(*arguments: object) -> int:
        process = start(*arguments)
        if not killed:
            os.kill(process, signal.SIGKILL)
            killed.append(process)
        return process

    resource_tracker.ensure_running()  # it is started by the same function
    monkeypatch.setattr(util, "spawnv_passfds", kill_first)
    pool = WorkerPool(partial(build, marks="x" * LARGE), 0, workers=1, ahead=1)
    assert numbers(pool, 3) == [0, 1, 2]
    pool.close()
    assert "exit code -9" in capfd.readouterr().err


def test_a_script_without_a_guard_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text("from engram_jax import Run\n")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    with pytest.raises(InputError, match=r"script\.py .* `if __name__ == \"__main__\":`"):
        WorkerPool(build, 0, workers=1, ahead=1)
