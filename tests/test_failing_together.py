"""Several processes of which one fails: all end at once, and each says why."""

import os
import resource
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from programs import fork

from engram_jax.checkpoint import Checkpoints
from engram_jax.errors import InputError, one_sentence
from engram_jax.processes import all_agree, check_same_everywhere, end_together, join_processes


def be_one_of(count: int, rank: int, port: int, folder: Path, failure: str) -> None:
    output = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 2)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    os.environ["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
    os.environ |= {"JAX_NUM_PROCESSES": f"{count}", "JAX_PROCESS_ID": f"{rank}"}
    join_processes()
    with end_together(), one_sentence():
        all_agree(True)  # connects the processes
        if failure == "all stop":
            jax.distributed.shutdown()  # as a program does at its end, but not a fork
            return
        if failure == "full disk of 1":
            save_twice(rank, folder / "checkpoints")
        if failure == "different checkpoints":
            check_same_everywhere([2, 4] if rank else [2, 6], "They differ.")
        if rank == int(failure[-1]):
            if "killed" in failure:
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"input": InputError("No."), "bug": KeyError("bug"), "keys": KeyboardInterrupt()}[
                failure.split()[0]
            ]
        all_agree(True)  # waits for the other process


def save_twice(rank: int, folder: Path) -> None:
    """Saves in the background while steps donate the state, then where process 1 cannot write."""
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))
    train_step = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
    rows = np.arange(1 << 20, dtype=np.float32)
    state = {"rows": jax.make_array_from_callback(rows.shape, split, lambda part: rows[part])}
    checkpoints = Checkpoints(folder, keep=1, identity={}, background=True)
    checkpoints.save(0, state, config={}, wait=False)
    state = train_step(state)
    while not checkpoints.steps():
        state = train_step(state)
        checkpoints.finish(wait=False)
        all_agree(True)  # the second process sees the folder that the first one has renamed
    abstract = {"rows": jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=split)}
    _, found = checkpoints.restore(abstract)
    for part in found["rows"].addressable_shards:
        np.testing.assert_array_equal(part.data, rows[part.index])
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    checkpoints.save(1, state, config={}, wait=False)
    checkpoints.finish()


@pytest.mark.parametrize(
    ("failure", "codes", "messages"),
    [
        pytest.param(
            *("input of 0", [2, 2], ["error: No.", "error: Process 0 failed"]),
            marks=pytest.mark.slow,
        ),
        ("input of 1", [2, 2], ["error: Process 1 failed", "error: No."]),
        pytest.param(
            *("bug of 1", [2, 1], ["error: Process 1 failed", "KeyError: 'bug'"]),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("keys of 1", [2, 130], ["error: Process 1 failed", "Interrupted."]),
            marks=pytest.mark.slow,
        ),
        ("killed 1", [1, -9], ["error: Another process ended", ""]),
        ("different checkpoints", [2, 2], ["error: They differ.", "error: They differ."]),
        pytest.param(
            "full disk of 1",
            [2, 2],
            ["error: Another process could not write the", "error: Cannot write the checkpoint"],
            marks=pytest.mark.slow,
        ),
        ("all stop", [0, 0], ["", ""]),
        pytest.param(
            "input of 2",
            [2] * 4,
            [*["error: Process 2 failed"] * 2, "error: No.", "error: Process"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_process_that_fails_ends_all(
    tmp_path: Path, failure: str, codes: list[int], messages: list[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    count = len(codes)
    parts = [fork(be_one_of, count, rank, port, tmp_path, failure) for rank in range(count)]
    for part in parts:
        part.join(timeout=60)
    assert time.monotonic() - start < 30
    assert [part.exitcode for part in parts] == codes
    for rank, message in enumerate(messages):
        errors = (tmp_path / f"{rank}.txt").read_text()
        assert message in errors and errors.count("error: ") == message.count("error: ")


@pytest.mark.parametrize(
    ("variable", "value"),
    [("COORDINATOR_ADDRESS", "host"), ("NUM_PROCESSES", "two"), ("PROCESS_ID", "-1")],
)
def test_variables_of_processes(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"JAX_{variable}", value)
    with pytest.raises(InputError, match=f"JAX_{variable} is '{value}'"):
        join_processes()
