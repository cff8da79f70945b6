"""Runs programs, and functions in other processes, without importing JAX for each."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Ended(NamedTuple):
    """How a program ended."""

    status: int
    out: str
    err: str


def run_program(capfd: pytest.CaptureFixture[str], file: str, *words: str) -> Ended:
    """Runs a program of the repository's root in this process, like `python FILE WORDS…`."""
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [file, *words])
        patch.chdir(ROOT)
        try:
            runpy.run_path(file, run_name="__main__")
        except SystemExit as ended:
            status = ended.code
    return Ended(status, *capfd.readouterr())


def fork(function: Callable[..., object], *arguments: object) -> BaseProcess:
    """Starts a process, as a fork of a process that has imported JAX but not initialized it."""
    process = _preloaded().Process(target=function, args=arguments)
    process.start()
    return process


def run_program_in_fork(folder: Path, file: str, *words: str) -> Ended:
    """Like `run_program`, in a new process. The output is in `folder`."""
    process = fork(_run_redirected, folder, file, words)
    process.join(timeout=300)
    return Ended(process.exitcode, *((folder / name).read_text() for name in ("out", "err")))


def _preloaded() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["engram_jax.trainer", "pytest"])
    return context


def _run_redirected(folder: Path, file: str, words: tuple[str, ...]) -> None:
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), stream.fileno())
    sys.argv = [file, *words]
    os.chdir(ROOT)
    runpy.run_path(file, run_name="__main__")
