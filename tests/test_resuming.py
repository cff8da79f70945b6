"""Resuming: stopped runs, killed runs, and runs that start from another run's weights."""

import json
import random
import shutil
import signal
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from golden import FIXTURES
from programs import fork
from tiny_runs import TrainWhole, assert_identical, losses, use_rows, vary
from train_tiny import STEPS, train_tiny

from engram_jax import trainer
from engram_jax.config import Config, load_config
from engram_jax.data import packing
from engram_jax.errors import InputError
from engram_jax.memory.row_adam import RowAdamConfig
from engram_jax.memory.store import Placement
from engram_jax.metrics import MetricsLog, read_metrics
from engram_jax.run import Run
from engram_jax.train_state import TrainState
from engram_jax.trainer import train
from engram_jax.training_progress import TrainingProgress


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("number", "change"),
    [
        (signal.SIGTERM, {}),
        pytest.param(
            signal.SIGINT,
            {"memory": {"fusion": "over_encoding", "layers": (0,)}},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            signal.SIGHUP,
            {"memory": {"layers": ()}, "train": {"accumulation": 2}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["engram", "over_encoding", "dense"],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    tiny: Config,
    train_whole: TrainWhole,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    change: dict[str, dict[str, Any]],
) -> None:
    config = vary(tiny, **change)
    whole, expected = train_whole(config, 1, 1)
    signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP, and so would the trainer
    write, handlers = MetricsLog.write, [signal.getsignal(n) for n in signal.Signals]

    def write_and_stop(log: MetricsLog, step: int, *rest: Any, **named: Any) -> None:
        write(log, step, *rest, **named)
        if step == 3:
            signal.raise_signal(number)  # in this thread; `os.kill` may wait for another

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write_and_stop)
        stopped = train(Run.start(config, tmp_path / "parts"))
    assert 3 <= stopped.step < 6
    ending = f"Stopping before step {stopped.step + 1} because of a signal"
    assert ending in (said := capsys.readouterr().err) and "the run would then begin again" in said
    assert [signal.getsignal(n) for n in signal.Signals] == handlers
    parts = Run.start(config, tmp_path / "parts")
    assert parts.checkpoints.steps() == [stopped.step]
    assert_identical(train(parts), expected)
    assert losses(parts.folder) == losses(whole.folder)
    # A finished run is only restored.
    assert_identical(train(Run.start(config, tmp_path / "parts")), expected)
    assert losses(parts.folder) == losses(whole.folder)


@pytest.mark.usefixtures("one_device")
def test_a_run_that_ends_right_after_a_save_has_all_its_lines(
    tiny: Config, train_whole: TrainWhole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = vary(tiny, train={"evaluate_every": 2, "checkpoint_every": 2})
    whole, expected = train_whole(config, 1, 1)
    save = Run.save

    def save_and_end(run: Run, state: TrainState, *rest: Any, **named: Any) -> Path:
        path = save(run, state, *rest, **named)
        if state.step in (4, 6):
            raise SystemExit
        return path

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(Run, "save", save_and_end)
            train(Run.start(config, tmp_path / "parts"))
    assert_identical(train(Run.start(config, tmp_path / "parts")), expected)
    for kind in ("train", "held_out"):
        assert losses(tmp_path / "parts", kind) == losses(whole.folder, kind)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["device", "file"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, placement: Placement) -> None:
    """SIGKILL at random times, some of them during a save or the start."""
    generator = random.Random()
    seed = generator.randrange(2**32)
    print("seed", seed)  # pytest shows it if the test fails
    generator.seed(seed)

    whole = fork(train_tiny, tmp_path, tmp_path / "whole")
    whole.join(timeout=300)
    assert whole.exitcode == 0
    kills = 0
    while True:
        process = fork(train_tiny, tmp_path, tmp_path / "parts", placement)
        known = len(read_metrics(tmp_path / "parts"))
        wanted = generator.randrange(1, 10)
        while process.is_alive() and kills < 6:
            new = len(read_metrics(tmp_path / "parts")) - known
            if new < 0:  # the log was cut back to the restored step
                known += new
            elif new >= wanted:
                time.sleep(generator.random() * 0.3)
                break
            time.sleep(0.01)
        if process.is_alive() and kills < 6:
            process.kill()
            kills += 1
        process.join(timeout=300)
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            break
    assert kills >= 2
    for kind in ("train", "held_out"):
        assert losses(tmp_path / "whole", kind) == losses(tmp_path / "parts", kind)
    assert losses(tmp_path / "whole", kind)[-1][0] == STEPS
    states = [Run.open(tmp_path / name).restore() for name in ("whole", "parts")]
    assert_identical(*states)


def test_start_from_takes_weights_alone(tiny: Config, trained: Run, tmp_path: Path) -> None:
    first = trained.restore()
    config = vary(tiny, mesh={"fsdp": 4})
    second = Run.start(config, tmp_path / "second", start_from=trained.folder, start_step=6)
    with second.program.use_mesh():
        state = trainer._first_state(second)
    fresh = second.program.initial_state()
    assert_identical(
        replace(state, optimizer=fresh.optimizer, tables={}),
        replace(fresh, params=first.params, tables={}),
    )
    table, old = state.tables[1], first.tables[1]
    value, *state_of_rows = table.unpack()
    owed_paid = jax.jit(jax.device_get(trained.program.row_adam).current)(
        *jax.device_get((old.unpack(), first.step))
    )
    np.testing.assert_allclose(value, owed_paid, rtol=1e-6, atol=1e-7)
    assert np.abs(owed_paid - old.unpack().value).max() > 1e-3
    assert not any(np.any(part) for part in state_of_rows)
    assert table.records.sharding.is_equivalent_to(fresh.tables[1].records.sharding, 2)
    train(second)
    assert losses(second.folder)[0][1] < losses(trained.folder)[0][1]


@pytest.mark.usefixtures("one_device")
def test_where_a_run_started_from_is_remembered(
    tiny: Config, trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if the run ends before its first checkpoint, and resumes without the flag."""
    expected = train(Run.start(tiny, tmp_path / "whole", start_from=trained.folder))

    class Killed(Exception):
        pass

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    parts = tmp_path / "parts"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainingProgress, "update", kill)
        train(Run.start(tiny, parts, start_from=trained.folder))
    assert f"begins with the weights of step 6 of {trained.folder}" in capsys.readouterr().out
    assert_identical(train(Run.start(tiny, parts)), expected)
    train(Run.start(tiny, parts, start_from=tmp_path / "elsewhere"))
    assert "resuming from them, not from" in capsys.readouterr().out


@pytest.mark.parametrize("theirs", ["lazy", pytest.param("exact", marks=pytest.mark.slow)])
def test_pending_updates_of_the_optimizer_that_wrote_a_row_are_applied_to_it(
    tiny: Config, tmp_path: Path, theirs: str
) -> None:
    """A lazy row's clock counts its updates, and is no step of exact Adam."""
    source = Run.start(vary(tiny, memory={"adam": RowAdamConfig(form=theirs)}), tmp_path / "source")
    state = source.program.initial_state()
    table = use_rows(state.tables[1], steps=2)
    step = jax.device_put(np.int32(9), state.step.sharding)
    source.save(replace(state, step=step, tables={1: table}))
    ours = "exact" if theirs == "lazy" else "lazy"
    config = vary(tiny, memory={"adam": RowAdamConfig(form=ours)})
    run = Run.start(config, tmp_path / "run", start_from=tmp_path / "source")
    with run.program.use_mesh():
        value, *state_of_rows = trainer._first_state(run).tables[1].unpack()
    rows, adam = jax.device_get((table.unpack(), source.program.row_adam))
    expected = jax.jit(adam.current)(rows, np.int32(9)) if theirs == "exact" else rows.value
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)
    assert not any(np.any(part) for part in state_of_rows)


def test_a_step_to_start_from_needs_a_run(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--start-from"):
        Run.start(tiny, tmp_path / "run", start_step=3)
    assert not (tmp_path / "run").exists()


def test_start_from_refuses_a_step_that_was_not_saved(
    tiny: Config, trained: Run, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"no checkpoint of step 3: choose one of \[6\]"):
        Run.start(tiny, tmp_path / "run", start_from=trained.folder, start_step=3)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": {"hash_seed": 1}}, "other n-grams"),
        ({"memory": {"row_width": 4}}, r"width=8.* this run as .*width=4"),
        (
            {"model": {"feed_forward": 48}},
            r"feed_forward/down is \(32, 32\) in .*, and \(48, 32\) in this run",
        ),
        ({"model": {"width": 16}}, "the same model and memory sizes"),
        ({"memory": {"layers": ()}}, "Parameter .* and missing in this run"),
    ],
)
def test_start_from_refuses_what_does_not_fit(
    tiny: Config,
    trained: Run,
    tmp_path: Path,
    change: dict[str, dict[str, Any]],
    message: str,
) -> None:
    """It creates no folder, so that the corrected command works."""
    with pytest.raises(InputError, match=message):
        Run.start(vary(tiny, **change), tmp_path / "second", start_from=trained.folder)
    assert not (tmp_path / "second").exists()


@pytest.mark.usefixtures("one_device")
def test_start_from_refuses_a_folder_without_a_run(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run folder"):
        Run.start(tiny, tmp_path / "run", start_from=tmp_path / "nothing")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def saved(trained: Run, tmp_path: Path) -> Path:
    """A copy of the trained run's folder."""
    return Path(shutil.copytree(trained.folder, tmp_path / "saved"))


@pytest.mark.usefixtures("one_device")
def test_another_schedule_settles_the_tables_once(
    tiny: Config, trained: Run, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows read as under the old schedule, and keep their momentum."""
    longer = vary(tiny, train={"steps": 9}, optimizer={"learning_rate": 0.03})
    with pytest.raises(InputError, match=r"optimizer\.learning-rate.*--reschedule"):
        Run.start(longer, saved)
    run = Run.start(longer, saved, reschedule=True)
    assert load_config(saved / "config.json") == longer
    assert load_config(run.checkpoints.path(6) / "config.json") == tiny
    old, new = trained.restore(), run.restore()
    assert "of step 6" in capsys.readouterr().out
    assert_identical(replace(new, tables={}), replace(old, tables={}))

    def read(run: Run, state: TrainState) -> np.ndarray:
        rows, step = jax.device_get((state.tables[1].unpack(), state.step))
        return np.asarray(jax.jit(jax.device_get(run.program.row_adam).current)(rows, step))

    np.testing.assert_allclose(read(run, new), read(trained, old), rtol=1e-6, atol=1e-7)
    before, after = (jax.device_get(state.tables[1].unpack()) for state in (old, new))
    assert np.abs(after.value - before.value).max() > 1e-3  # otherwise nothing was pending
    np.testing.assert_array_equal(after.clock > 0, before.clock > 0)
    idle = 6 - np.asarray(before.clock)[:, None]
    np.testing.assert_allclose(after.mean, before.mean * 0.9**idle, rtol=1e-5)
    np.testing.assert_allclose(after.square, before.square * 0.999**idle, rtol=1e-5)
    weights = Run.open(saved).restore_weights(6)
    np.testing.assert_allclose(read(run, replace(new, tables=weights.tables)), read(run, new))

    assert train(run).step == 9
    assert "brought up to date" in capsys.readouterr().out
    assert [step for step, _ in losses(saved)] == list(range(1, 10))
    # The checkpoint of step 9 has the new schedule.
    Run.start(longer, saved).restore()
    assert "brought up to date" not in capsys.readouterr().out
    with pytest.raises(InputError, match="at step 9, beyond"):
        Run.start(vary(longer, train={"steps": 8}), saved, reschedule=True)
    assert load_config(saved / "config.json") == longer  # an error changes nothing


def test_what_a_schedule_is_not_stays_refused(tiny: Config, saved: Path) -> None:
    for change in (
        {"model": {"tie_embeddings": False}},
        {"optimizer": {"matrices": "muon"}},
        {"memory": {"adam": RowAdamConfig(form="lazy")}},
    ):
        with pytest.raises(InputError, match="to resume it, or name another --run folder"):
            Run.start(vary(tiny, **change), saved, reschedule=True)


@pytest.mark.usefixtures("one_device")
def test_a_frozen_table_stays_bit_for_bit_while_the_network_learns(
    tiny: Config, trained: Run, saved: Path
) -> None:
    frozen = vary(tiny, train={"steps": 9}, memory={"frozen": True})
    run = Run.start(frozen, saved, reschedule=True)
    first = run.restore()
    last = train(run)
    assert_identical(last.tables, first.tables)
    assert all(line["row_gradient_norm"] == 0 for line in read_metrics(saved)[6:])
    assert np.any(last.params["embedding"] != first.params["embedding"])
    # Pending updates are applied, and no momentum remains.
    value, *state_of_rows = first.tables[1].unpack()
    old = trained.restore()
    owed_paid = jax.jit(jax.device_get(trained.program.row_adam).current)(
        *jax.device_get((old.tables[1].unpack(), old.step))
    )
    np.testing.assert_allclose(value, owed_paid, rtol=1e-6, atol=1e-7)
    assert not any(np.any(part) for part in state_of_rows)


def stream_in_order_1(rows: packing.PackedRows, epoch: int) -> packing._Stream:
    """An epoch before `packing.ORDER` was 2: sorted by outputs of SplitMix64."""
    state = np.zeros(1, np.uint64)
    for part in (rows.seed, rows.source, epoch):
        state = packing._mix(state ^ np.uint64(part))
    outputs = state + np.arange(len(rows.documents), dtype=np.uint64) * packing._GOLDEN
    numbers = rows.documents.indices[np.argsort(packing._mix(outputs))]
    return packing._Stream(rows.documents, len(numbers), numbers.__getitem__)


@pytest.mark.usefixtures("one_device")
def test_the_state_of_a_run_of_an_earlier_version_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration does not have later fields. Its checkpoint has format 3.

    It is not resumed, because its texts would have another order. In that order, it would be.
    """
    with tarfile.open(FIXTURES / "run_aa84c85.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    folder = Path("run")
    expected = losses(folder)
    assert [step for step, _ in expected] == [1, 2, 3, 4]
    config = load_config(folder / "config.json")
    with pytest.raises(InputError, match="another order"):
        Run.start(config, folder)
    monkeypatch.setattr(packing.PackedRows, "_stream", stream_in_order_1)
    begun = json.loads((folder / "texts.json").read_text())
    (folder / "texts.json").write_text(json.dumps(begun | {"order": packing.ORDER}))
    run = Run.start(config, folder)
    assert run.checkpoints.steps() == [2]
    train(run)
    np.testing.assert_allclose(losses(folder), expected, rtol=1e-5)
    # The losses of steps 3 and 4 differ a lot, so weights, moments and rows must be the saved ones.
    assert expected[2][1] - expected[3][1] > 0.1
