"""Two processes of four CPU devices each, as on a pod, against one process of eight, or of one."""

import multiprocessing
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_runs import losses, tiny_config, vary, with_backbone

from engram_jax.config import Config, TrainConfig
from engram_jax.data.pipeline import make_batches
from engram_jax.errors import InputError
from engram_jax.files import hold_lock
from engram_jax.memory import lookup
from engram_jax.memory.row_adam import RowAdamConfig
from engram_jax.run import Run
from engram_jax.sharding import MeshConfig
from engram_jax.train_state import Weights
from engram_jax.trainer import train

pytestmark = pytest.mark.slow


def tiny(data: Path, steps: int, devices: int, backbone: bool) -> Config:
    schedule = TrainConfig(
        steps=steps, seed=1, log_every=1, evaluate_every=2, evaluate_tokens=100, checkpoint_every=2
    )
    config = vary(tiny_config(data), memory={"adam": RowAdamConfig(form="exact")})
    mesh = MeshConfig(fsdp=2 if devices > 1 else 1)
    if backbone:
        config, mesh = with_backbone(config), MeshConfig(fsdp=4, expert=2)
    return replace(config, train=schedule, mesh=mesh)


def train_part(
    rank: int,
    count: int,
    devices: int,
    port: int,
    data: Path,
    folder: Path,
    steps: int,
    start: Path | None,
    backbone: bool,
) -> None:
    """One of `count` processes, which have some devices together."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices // count)
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", count, rank)
    try:
        run = Run.start(tiny(data, steps, devices, backbone), folder, start_from=start)
        train(run)
        if start is not None:
            write_memory(start, run, folder.parent / f"memory-{folder.name}-{rank}.npz")
    except InputError as error:
        (folder.parent / f"error-{rank}.txt").write_text(str(error))


def write_memory(start: Path, run: Run, path: Path) -> None:
    """Writes this process's part of the memory of the first batch, under another run's weights."""
    with (
        jax.set_mesh(run.mesh),
        make_batches(
            run.corpora(),
            sequence_length=run.config.data.sequence_length,
            batch_size=run.config.data.batch_size,
            planner=run.planner(),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ) as batches,
    ):
        source = Run.open(start).checkpoints
        weights = replace(run, checkpoints=source).restore_weights(20)
        batch = run.put(next(batches))
        plans, slots = batch.plan

        def read(weights: Weights, plans: Any, slots: Any) -> jax.Array:
            rows = lookup.read_rows(weights.tables[1], plans[1], run.row_adam, weights.step).values
            return lookup.expand(rows, jax.tree.map(lambda array: array[0], slots[1]))

        memory = jax.jit(read)(weights, plans, slots)
    shards = {
        str(part.index[0].start or 0): np.asarray(part.data) for part in memory.addressable_shards
    }
    np.savez(path, **shards)


def read_memory(folder: Path) -> np.ndarray:
    """What `write_memory` wrote in all processes of a run, in the order of the batch."""
    shards = {}
    for path in folder.parent.glob(f"memory-{folder.name}-*.npz"):
        shards |= {int(name): array for name, array in np.load(path).items()}
    return np.concatenate([shards[start] for start in sorted(shards)])


def train_in(
    count: int,
    data: Path,
    folder: Path,
    *,
    devices: int = 8,
    steps: int = 20,
    start: Path | None = None,
    backbone: bool = False,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    arguments = count, devices, port, data, folder, steps, start, backbone
    parts = [context.Process(target=train_part, args=(r, *arguments)) for r in range(count)]
    for part in parts:
        part.start()
    for part in parts:
        part.join(timeout=300)
    assert [part.exitcode for part in parts] == [0] * count


def test_two_processes_train_the_papers_backbone_as_one(tmp_path: Path) -> None:
    """Experts are dealt within a process; between the two, Muon trades pieces of matrices."""
    data = tmp_path / "data"
    data.mkdir()
    for count in (1, 2):
        train_in(count, data, tmp_path / f"in-{count}", steps=4, backbone=True)
    for kind in ("train", "held_out"):
        found, expected = (losses(tmp_path / run, kind) for run in ("in-2", "in-1"))
        assert [step for step, _ in found] == [step for step, _ in expected] != []
        np.testing.assert_allclose([x for _, x in found], [x for _, x in expected], rtol=1e-4)


def test_two_processes_train_resume_and_start_from_as_one(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    train_in(1, data, tmp_path / "alone", devices=1)
    for count in (1, 2):
        train_in(count, data, tmp_path / f"first-{count}")
        train_in(count, data, tmp_path / f"next-{count}", steps=6, start=tmp_path / "first-1")
    train_in(1, data, tmp_path / "next-alone", devices=1, steps=6, start=tmp_path / "first-1")
    expected = read_memory(tmp_path / "next-alone")
    assert expected.shape == (8, 24, 4 * 8) and np.any(expected)
    for count in (1, 2):
        np.testing.assert_array_equal(read_memory(tmp_path / f"next-{count}"), expected)
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
