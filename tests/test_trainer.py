"""The loop: equal results on all meshes, written files, divergence."""

import io
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import TrainWhole, assert_identical, losses, on_devices, vary
from tqdm import tqdm

from engram_jax import trainer, training_progress
from engram_jax.config import Config
from engram_jax.data.packing import Batch
from engram_jax.errors import STOP_SIGNALS, UnbreakableErrors
from engram_jax.metrics import read_metrics
from engram_jax.run import Run
from engram_jax.trainer import _stop_signal, train
from engram_jax.training_progress import Diverged, TrainingProgress


@pytest.mark.usefixtures("one_device")
def test_loss_falls(tiny: Config, tmp_path: Path) -> None:
    config = vary(tiny, train={"steps": 30}, optimizer={"warmup_steps": 5})
    run = Run.start(config, tmp_path / "run")
    state = train(run)
    curve = losses(run.folder)
    assert [step for step, _ in curve] == list(range(1, 31)) and state.step == 30
    assert abs(curve[0][1] - np.log(8192)) < 0.5
    assert curve[-1][1] < curve[0][1] - 2
    held_out = losses(run.folder, "held_out")
    assert [step for step, _ in held_out] == [30] and held_out[0][1] < curve[0][1] - 1.5
    assert run.checkpoints.steps() == [30]


@pytest.mark.parametrize(
    ("steps", "seed", "shape"),
    [
        (6, 1, (2, 4)),
        *(pytest.param(20, 7, shape, marks=pytest.mark.slow) for shape in ((1, 8), (8, 1))),
    ],
)
def test_a_mesh_gives_the_losses_of_one_device(
    tiny: Config, train_whole: TrainWhole, steps: int, seed: int, shape: tuple[int, int]
) -> None:
    """With seeds 1 and 5, gate scores near 0 (see conftest.py) occur within 20 steps."""
    config = vary(tiny, train={"steps": steps, "seed": seed})
    alone, _ = train_whole(config, 1, 1)
    run, state = train_whole(config, *shape)
    mesh = run.program.mesh
    assert mesh.devices.shape == (*shape, 1, 1)
    for table in state.tables.values():
        shards = [shard.data.shape[0] for shard in table.records.addressable_shards]
        assert shards == [len(table.records) // mesh.size] * mesh.size
    kernel = state.params["blocks"][0]["feed_forward"]["up"]
    assert kernel.addressable_shards[0].data.size == kernel.size // shape[1]
    expected, found = read_metrics(alone.folder), read_metrics(run.folder)
    assert len(expected) == len(found) == steps
    # Several devices request the same rows.
    for one, many in zip(expected, found, strict=True):
        assert one["rows_asked_1"] < many["rows_asked_1"] <= 8 * one["rows_asked_1"]
        assert one["shard_load_1"] == 1 < many["shard_load_1"] <= 8
    tolerances = {"loss": 1e-5, "gradient_norm": 1e-4, "row_gradient_norm": 1e-4}
    for name, rtol in tolerances.items():
        of_one, of_many = ([line[name] for line in lines] for lines in (expected, found))
        np.testing.assert_allclose(of_many, of_one, rtol=rtol, err_msg=name)
    held_out = (losses(of.folder, "held_out") for of in (run, alone))
    np.testing.assert_allclose(*held_out, rtol=1e-5)


def test_two_runs_on_one_mesh_are_the_same_bit_for_bit(
    tiny: Config, trained: Run, tmp_path: Path
) -> None:
    with on_devices(2, 4):
        again = Run.start(tiny, tmp_path / "again")
    assert again.program.mesh == trained.program.mesh
    assert_identical(train(again), trained.restore())
    assert losses(again.folder) == losses(trained.folder)


@pytest.mark.usefixtures("one_device")
def test_evaluations_and_checkpoints_change_nothing(
    tiny: Config, train_whole: TrainWhole, tmp_path: Path
) -> None:
    plain, expected = train_whole(tiny, 1, 1)
    busy = Run.start(
        vary(tiny, train={"evaluate_every": 2, "checkpoint_every": 1}), tmp_path / "busy"
    )
    assert_identical(train(busy), expected)
    assert losses(busy.folder) == losses(plain.folder)
    assert [step for step, _ in losses(busy.folder, "held_out")] == [2, 4, 6]
    assert busy.checkpoints.steps() == [5, 6]


@pytest.mark.usefixtures("one_device")
def test_a_run_that_saves_in_the_background_resumes_bit_for_bit(
    tiny: Config, train_whole: TrainWhole, tmp_path: Path
) -> None:
    _, expected = train_whole(tiny, 1, 1)
    config = vary(tiny, train={"checkpoint_every": 2})
    run = Run.start(config, tmp_path / "run")
    run.checkpoints._background = True
    assert_identical(train(run), expected)
    assert run.checkpoints.steps() == [4, 6]
    shutil.rmtree(run.checkpoints.path(6))
    assert_identical(train(Run.start(config, tmp_path / "run")), expected)


@pytest.mark.usefixtures("one_device")
def test_profile_writes_a_trace(tiny: Config, tmp_path: Path) -> None:
    run = Run.start(tiny, tmp_path / "run")
    train(run, profile=True)  # ends during the ten traced steps
    assert list((run.folder / "profile").rglob("*.xplane.pb"))


@pytest.mark.usefixtures("one_device")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("background", [False, True])
def test_divergence_names_the_step_and_the_last_good_checkpoint(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    """A checkpoint that is being written is completed first."""
    if background:
        monkeypatch.setattr(trainer, "_agrees_before", lambda step: False)
    run = Run.start(vary(tiny, train={"checkpoint_every": 2}), tmp_path / "run")
    run.checkpoints._background = background
    put = run.program.put
    batches = 0

    def put_poison(batch: Batch) -> Batch:
        nonlocal batches
        batches += 1
        if batches == 6:
            batch = batch._replace(target_mask=batch.target_mask * np.float32("nan"))
        return put(batch)

    object.__setattr__(run.program, "put", put_poison)
    with pytest.raises(Diverged, match=r"Step 6 has loss nan.*checkpoint is that of step 4"):
        train(run)
    assert [step for step, _ in losses(run.folder)] == [1, 2, 3, 4, 5]
    assert run.checkpoints.steps() == [2, 4]


@pytest.mark.usefixtures("one_device")
def test_a_learning_rate_that_ruins_the_weights(tiny: Config, tmp_path: Path) -> None:
    """Step 1 is finite and saved, but the weights after it are not finite."""
    config = vary(tiny, optimizer={"learning_rate": 1e30}, train={"checkpoint_every": 1})
    run = Run.start(config, tmp_path / "run")
    with pytest.raises(Diverged, match=r"Step 2 has loss nan.*none is good.*learning_rate"):
        train(run)


def test_an_error_output_that_is_gone_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    for stream in (Full(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert UnbreakableErrors().write("a") == 1
        UnbreakableErrors().flush()


def test_the_bar_counts_the_time_of_steps_and_no_other(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    clock = SimpleNamespace(time=lambda: now, perf_counter=lambda: now)
    monkeypatch.setattr(training_progress, "time", clock)
    bar = tqdm(total=99, file=io.StringIO(), mininterval=30)  # as in a file
    bar._time, bar.start_t, bar.last_print_t = clock.time, 0.0, 0.0  # type: ignore[attr-defined]
    progress = TrainingProgress(Run.start(tiny, tmp_path / "run"), None, bar, None)
    for step in range(1, 26):
        now += 7.0 + 1000 * (step == 1)  # compiles
        progress.update(step, {"loss": jnp.ones(()), "gradient_norm": jnp.ones(())})
        progress.drain()
        if step % 2 == 0:
            now += 500  # saves or evaluates
            progress.restart_clock()
    assert bar.format_dict["n"] == 25 and bar.format_dict["elapsed"] == 7.0 * 24


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_every_signal_of_a_scheduler_stops_before_the_next_step(
    number: signal.Signals,
) -> None:
    before = signal.signal(number, signal.default_int_handler)  # not that of nohup
    try:
        with _stop_signal() as stopped:
            assert not stopped(0)
            os.kill(os.getpid(), number)
            assert stopped(0)
    finally:
        signal.signal(number, before)
