"""Two processes with four CPU devices each, compared with one process with eight devices or one.

The two processes are started once. The one process is the test process.
"""

import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import numpy as np
import pytest
from programs import ROOT, fork
from tiny_runs import (
    draw_on_the_mesh,
    losses,
    on_devices,
    share_programs,
    tiny_config,
    vary,
    with_backbone,
)

from engram_jax import processes, trainer
from engram_jax.config import Config, TrainConfig
from engram_jax.errors import InputError
from engram_jax.files import hold_lock
from engram_jax.formats.export import export_run
from engram_jax.layers.engram import EngramConfig
from engram_jax.memory import lookup
from engram_jax.memory.row_adam import RowAdamConfig
from engram_jax.processes import collective
from engram_jax.program import Program
from engram_jax.run import Run
from engram_jax.sharding import MeshConfig
from engram_jax.train_state import Weights
from engram_jax.train_step import TrainStep, make_train_step
from engram_jax.trainer import train

RANKS = range(2)
STEPS = 6


def tiny(data: Path, *, steps: int, alone: bool = False, backbone: bool = False) -> Config:
    schedule = TrainConfig(
        steps=steps, seed=1, log_every=1, evaluate_every=2, evaluate_tokens=100, checkpoint_every=2
    )
    config = vary(tiny_config(data), memory={"adam": RowAdamConfig(form="exact")})
    mesh = MeshConfig() if alone else MeshConfig(fsdp=2)
    if backbone:
        config, mesh = with_backbone(config, layers=1), MeshConfig(fsdp=4, expert=2)
    return replace(config, train=schedule, mesh=mesh)


def train_all(data: Path, folder: Path, first: Path, *, alone: bool = False) -> None:
    """Trains in `folder`: a run, a run that starts from `first`, and the paper's backbone."""
    train(Run.start(tiny(data, steps=STEPS, alone=alone), folder / "first"))
    run = Run.start(tiny(data, steps=STEPS, alone=alone), folder / "next", start_from=first)
    train(run)
    write_memory(first, run, folder / f"memory-{jax.process_index()}.npz")
    if not alone:
        backbone = tiny(data, steps=2, backbone=True)
        train(Run.start(backbone, folder / "backbone"))
        # Every sequence on all devices, each with three positions.
        engram, mesh = EngramConfig(kernel=2), MeshConfig(context=8)
        long = vary(replace(backbone, mesh=mesh), model={"engram": engram})
        train(Run.start(long, folder / "long"))


def train_on_memory(data: Path, folder: Path, export: Path) -> None:
    """Trains on the rows of an export: with files of changed rows, then on the devices."""
    for placement in ("file", "device"):
        memory = {"start_from": str(export), "placement": placement}
        train(Run.start(vary(tiny(data, steps=STEPS), memory=memory), folder))
        with collective("lose the last checkpoint"):
            if placement == "file" and jax.process_index() == 0:
                shutil.rmtree(folder / "checkpoints" / f"{STEPS:08}")


def be_one_of_two(rank: int, port: int, data: Path, folder: Path, first: Path, held: Path) -> None:
    """All work of a pair of processes; its message about `held` is written to a file."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    share_programs()
    jax.distributed.initialize(f"127.0.0.1:{port}", len(RANKS), rank)
    train_all(data, folder, first)
    train_on_memory(data, folder / "memory", first.parent / "export")
    # Resumes from the checkpoint of two processes, with tables in files of the processes.
    with collective("lose the last checkpoint"):
        if rank == 0:
            shutil.copytree(folder / "first", folder / "again")
            shutil.rmtree(folder / "again" / "checkpoints" / f"{STEPS:08}")
    outside = vary(tiny(data, steps=STEPS), memory={"placement": "file"})
    train(Run.start(outside, folder / "again"))
    evaluate(folder)
    train_until_signal(tiny(data, steps=STEPS), folder / "stopped", rank)
    try:
        train(Run.start(tiny(data, steps=2), held))
    except InputError as error:
        (folder / f"error-{rank}.txt").write_text(str(error))


def train_until_signal(config: Config, folder: Path, rank: int) -> None:
    """Trains until SIGTERM, which only the second process gets, in its first step."""

    def make_signalled(program: Program) -> TrainStep:
        train_step, signals = make_train_step(program), [signal.SIGTERM] * rank

        def signalled(*arguments: Any) -> Any:
            if signals:
                os.kill(os.getpid(), signals.pop())
            return train_step(*arguments)

        return signalled

    with (
        patch.object(trainer, "make_train_step", make_signalled),
        patch.object(trainer, "AGREE_EVERY", 3),
    ):
        train(Run.start(config, folder))


def evaluate(folder: Path) -> None:
    """Evaluates the first run on all devices, with its parameters split over two of them."""
    sys.path.insert(0, str(ROOT))
    import eval

    eval.main(eval.parse_options([str(folder / "first"), "--sample-tokens", "0"]))


def write_memory(start: Path, run: Run, path: Path) -> None:
    """Writes this process's part of the memory of the first batch, under another run's weights."""
    with (
        run.program.use_mesh(),
        run.batches() as batches,
    ):
        source = Run.open(start).checkpoints
        weights = replace(run, checkpoints=source).restore_weights(STEPS)
        batch = run.program.put(next(batches))
        plans, slots = batch.plan.rows, batch.plan.slots

        def read(weights: Weights, plans: Any, slots: Any) -> jax.Array:
            rows = lookup.read_rows(weights.tables[1], plans[1], run.program.row_adam, weights.step)
            return lookup.expand(rows.values, jax.tree.map(lambda array: array[0], slots[1]))

        memory = jax.jit(read)(weights, plans, slots)
    shards = {
        str(part.index[0].start or 0): np.asarray(part.data) for part in memory.addressable_shards
    }
    np.savez(path, **shards)


def read_memory(folder: Path) -> np.ndarray:
    """The results of `write_memory` in all processes of a run, in the order of the batch."""
    shards = {}
    for path in folder.glob("memory-*.npz"):
        shards |= {int(name): array for name, array in np.load(path).items()}
    return np.concatenate([shards[start] for start in sorted(shards)])


class Trained(NamedTuple):
    """Folders of equal runs: on one device, and on eight with one process and with two."""

    data: Path
    alone: Path
    one: Path
    two: Path


@pytest.fixture(scope="module")
def draws_on_the_mesh() -> Iterator[None]:
    """Runs begin with the weights that programs draw, as in the two processes."""
    with patch.object(Program, "initial_state", draw_on_the_mesh):
        yield


@pytest.fixture(scope="module")
def trained(draws_on_the_mesh: None, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folders = Trained(*(tmp_path_factory.mktemp(name) for name in Trained._fields))
    data, first, held = folders.data, folders.one / "first", folders.one / "held"
    train_all(data, folders.one, first)
    run = Run.open(first)
    export_run(run, run.restore_weights(), first.parent / "export")
    train_on_memory(data, folders.one / "memory", first.parent / "export")
    with on_devices(1):
        train_all(data, folders.alone, first, alone=True)
    evaluate(folders.one)
    train(Run.start(tiny(data, steps=2), held))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with hold_lock(held / "lock"):  # which only the first process acquires
        parts = [fork(be_one_of_two, rank, port, data, folders.two, first, held) for rank in RANKS]
        for part in parts:
            part.join(timeout=600)
    assert [part.exitcode for part in parts] == [0, 0]
    return folders


def assert_equal_losses(found: Path, expected: Path, *, steps: int, rel: float = 1e-5) -> None:
    for kind in ("train", "held_out"):
        lines = losses(expected, kind)
        assert len(lines) == (steps if kind == "train" else steps // 2)
        assert losses(found, kind) == [(step, pytest.approx(loss, rel=rel)) for step, loss in lines]


@pytest.mark.slow
def test_two_processes_train_as_one(trained: Trained) -> None:
    for folder, other in (
        (trained.one, trained.alone),
        (trained.two, trained.alone),
        (trained.two, trained.one),
    ):
        assert_equal_losses(folder / "first", other / "first", steps=STEPS)


@pytest.mark.slow
def test_two_processes_train_on_the_memory_of_an_export_as_one(trained: Trained) -> None:
    assert_equal_losses(trained.two / "memory", trained.one / "memory", steps=STEPS)
    first = losses(trained.one / "first", "train")[0]
    assert losses(trained.one / "memory", "train")[0] != first


@pytest.mark.slow
def test_two_processes_evaluate_as_one(trained: Trained) -> None:
    """All figures of eval.json: losses, health, gates and the statistics of the memory."""
    found, expected = (
        jax.tree.leaves_with_path(json.loads((folder / "first" / "eval.json").read_text()))
        for folder in (trained.two, trained.one)
    )
    assert [path for path, _ in found] == [path for path, _ in expected]
    for (path, of_two), (_, of_one) in zip(found, expected, strict=True):
        near = isinstance(of_one, float)
        assert of_two == (pytest.approx(of_one, rel=1e-4, abs=1e-6) if near else of_one), path
    for name in ("gates.html", "memory.png"):
        assert (trained.two / "first" / name).is_file()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_a_checkpoint(trained: Trained) -> None:
    saved = {path.name for path in (trained.two / "stopped" / "checkpoints").iterdir()}
    assert saved == {"00000002", "00000003"}


@pytest.mark.slow
def test_two_processes_start_from_what_one_saved(trained: Trained) -> None:
    assert_equal_losses(trained.two / "next", trained.one / "next", steps=STEPS)
    expected = read_memory(trained.alone)
    assert expected.shape == (8, 24, 4 * 8) and np.any(expected)
    for folder in (trained.one, trained.two):
        np.testing.assert_array_equal(read_memory(folder), expected)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["backbone", "long"])
def test_two_processes_train_the_papers_backbone_as_one(trained: Trained, run: str) -> None:
    """Experts are split within a process. Muon exchanges pieces of matrices between processes.

    In the other run, both processes have all rows, and each has a half of every sequence.
    """
    assert_equal_losses(trained.two / run, trained.one / run, steps=2, rel=1e-4)


@pytest.mark.slow
def test_what_two_processes_saved_goes_on_with_two_and_with_one(trained: Trained) -> None:
    for process in ("two", "one"):
        folder = trained.two / "again"
        if process == "one":
            shutil.rmtree(folder / "checkpoints" / f"{STEPS:08}")
            train(Run.start(tiny(trained.data, steps=STEPS), folder))
        assert_equal_losses(folder, trained.one / "first", steps=STEPS)


@pytest.mark.slow
def test_processes_end_together_if_one_cannot_go_on(trained: Trained) -> None:
    own, others = ((trained.two / f"error-{rank}.txt").read_text() for rank in RANKS)
    assert own.startswith("Another process is training in")
    assert others.startswith("Another process could not train in")


def test_a_block_that_fails_in_one_process_fails_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a simulated answer of another process."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for other in (True, False):
        monkeypatch.setattr(
            processes.multihost_utils,
            "process_allgather",
            lambda here, other=other: np.array([here, other]),
        )
        with pytest.raises(KeyError), collective("count"):
            raise KeyError
        refused = nullcontext() if other else pytest.raises(InputError, match="not count")
        with refused, collective("count"):
            pass
        assert processes.all_agree(True) == other and not processes.all_agree(False)
