"""Two processes of four CPU devices each, as on a pod, against one process of eight, or of one."""

import multiprocessing
import socket
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from tiny_runs import losses, tiny_config, vary

from engram_jax.config import Config, TrainConfig
from engram_jax.errors import InputError
from engram_jax.files import hold_lock
from engram_jax.memory.row_adam import RowAdamConfig
from engram_jax.run import Run
from engram_jax.sharding import MeshConfig
from engram_jax.trainer import train

pytestmark = pytest.mark.slow


def tiny(data: Path, steps: int, devices: int) -> Config:
    schedule = TrainConfig(
        steps=steps, seed=1, log_every=1, evaluate_every=2, evaluate_tokens=100, checkpoint_every=2
    )
    mesh = MeshConfig(fsdp=2 if devices > 1 else 1)
    config = replace(tiny_config(data), train=schedule, mesh=mesh)
    return vary(config, memory={"adam": RowAdamConfig(form="exact")})


def train_part(
    rank: int,
    count: int,
    devices: int,
    port: int,
    data: Path,
    folder: Path,
    steps: int,
    start: Path | None,
) -> None:
    """One of `count` processes, which have some devices together."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices // count)
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", count, rank)
    try:
        train(Run.start(tiny(data, steps, devices), folder, start_from=start))
    except InputError as error:
        (folder.parent / f"error-{rank}.txt").write_text(str(error))


def train_in(
    count: int,
    data: Path,
    folder: Path,
    *,
    devices: int = 8,
    steps: int = 20,
    start: Path | None = None,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    arguments = count, devices, port, data, folder, steps, start
    parts = [context.Process(target=train_part, args=(r, *arguments)) for r in range(count)]
    for part in parts:
        part.start()
    for part in parts:
        part.join(timeout=300)
    assert [part.exitcode for part in parts] == [0] * count


def test_two_processes_train_resume_and_start_from_as_one(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    train_in(1, data, tmp_path / "alone", devices=1)
    for count in (1, 2):
        train_in(count, data, tmp_path / f"first-{count}")
        train_in(count, data, tmp_path / f"next-{count}", steps=6, start=tmp_path / "first-1")
    for name, other, steps in (
        ("first-1", "alone", 20),
        ("first-2", "alone", 20),
        ("first-2", "first-1", 20),
        ("next-2", "next-1", 6),
    ):
        for kind in ("train", "held_out"):
            found, expected = (losses(tmp_path / run, kind) for run in (name, other))
            assert len(found) == (steps if kind == "train" else steps // 2)
            assert found == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in expected]
    # What two processes saved, one goes on with.
    (tmp_path / "first-2" / "checkpoints" / "00000020").rename(tmp_path / "gone")
    train_in(1, data, tmp_path / "first-2")
    expected = losses(tmp_path / "first-1")
    assert losses(tmp_path / "first-2") == [
        (step, pytest.approx(loss, rel=1e-5)) for step, loss in expected
    ]


def test_processes_end_together_if_one_cannot_go_on(tmp_path: Path) -> None:
    data, folder = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    train_in(1, data, folder, steps=2)
    with hold_lock(folder / "lock"):  # which only the first process asks for
        train_in(2, data, folder, steps=2)
    own, others = ((tmp_path / f"error-{rank}.txt").read_text() for rank in (0, 1))
    assert own.startswith("Another process is training in")
    assert others.startswith("Another process could not train in")
