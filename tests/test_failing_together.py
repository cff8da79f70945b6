"""Two processes of which one fails: both end at once, and each says why."""

import os
import socket
import sys
import time
from pathlib import Path

import jax
import pytest
from programs import fork

from engram_jax.errors import InputError, one_sentence
from engram_jax.processes import check_same_everywhere, end_together


def be_one_of_two(rank: int, port: int, folder: Path, failure: str) -> None:
    output = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 2)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    with end_together(normal=[130]), one_sentence():
        jax.devices()
        if failure == "different checkpoints":
            check_same_everywhere([2, 4] if rank else [2, 6], "They differ.")
        if failure == "all stop":
            sys.exit(130)
        if rank == int(failure[-1]):
            raise InputError("No.") if "input" in failure else KeyError("bug")
        time.sleep(100)  # as in a collective operation


@pytest.mark.parametrize(
    ("failure", "codes", "messages"),
    [
        ("input of 0", [2, 2], ["error: No.", "error: Process 0 failed"]),
        ("input of 1", [2, 2], ["error: Process 1 failed", "error: No."]),
        ("bug of 1", [2, 1], ["error: Process 1 failed", "KeyError: 'bug'"]),
        ("different checkpoints", [2, 2], ["error: They differ.", "error: They differ."]),
        ("all stop", [130, 130], ["", ""]),
    ],
)
def test_a_process_that_fails_ends_both(
    tmp_path: Path, failure: str, codes: list[int], messages: list[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    parts = [fork(be_one_of_two, rank, port, tmp_path, failure) for rank in (0, 1)]
    for part in parts:
        part.join(timeout=60)
    assert time.monotonic() - start < 30
    assert [part.exitcode for part in parts] == codes
    for rank, message in enumerate(messages):
        assert message in (tmp_path / f"{rank}.txt").read_text()
