"""Training with tables in host memory or in a file: bit for bit that with tables on the devices."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import FORMS, TrainWhole, assert_identical, losses, on_devices, vary

from engram_jax import trainer
from engram_jax.config import Config
from engram_jax.errors import InputError
from engram_jax.memory import exchange, lookup, plan, store
from engram_jax.memory.layout import RecordLayout, RowState, StorageConfig, Table
from engram_jax.memory.row_adam import RowAdamConfig, make_row_adam
from engram_jax.memory.row_file import map_rows
from engram_jax.metrics import read_metrics
from engram_jax.placement import settle_stores
from engram_jax.program import Program
from engram_jax.run import Run
from engram_jax.sharding import TABLE_RW, MeshConfig, make_mesh
from engram_jax.trainer import train


@pytest.fixture(scope="module")
def smallest(tiny: Config) -> Config:
    """bfloat16 and one second moment a row, two micro-batches, active clipping, evaluation."""
    return vary(
        tiny,
        **FORMS["bfloat16"],
        optimizer={"clip_norm": 0.01},
        train={"accumulation": 2, "evaluate_every": 2, "checkpoint_every": 4},
    )


def placed(config: Config, placement: store.Placement) -> Config:
    return vary(config, memory={"placement": placement})


def assert_same_run(folder: Path, whole: Run) -> None:
    """The run in a folder has the lines and the final state of another."""
    for kind in ("train", "held_out"):
        assert losses(folder, kind) == losses(whole.folder, kind)
    norms = [
        [line["gradient_norm"] for line in read_metrics(run)] for run in (folder, whole.folder)
    ]
    assert norms[0] == norms[1]
    assert_identical(Run.open(folder).restore(), Run.open(whole.folder).restore())


@pytest.mark.parametrize("placement", ["host", "file"])
def test_training_equals_that_on_the_device(
    smallest: Config, train_whole: TrainWhole, placement: store.Placement
) -> None:
    whole, _ = train_whole(smallest, 1, 1)
    run, state = train_whole(placed(smallest, placement), 1, 1)
    assert state.tables == {}
    assert_same_run(run.folder, whole)
    [path] = (run.folder / "checkpoints" / "00000006" / "tables").iterdir()
    table, written = map_rows(path)
    assert table == whole.program.tables()[1]
    assert 0 < len(written.places) < 0.7 * table.rows  # only rows that were read
    last = read_metrics(run.folder)[-1]
    assert 0 < last["stored_rows"] <= len(written.places)
    assert last["stored_bytes"] == 4 * (table.layout.words + 1) * last["stored_rows"]
    assert last["seconds_waited_for_rows"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["frozen", "lazy"])
def test_other_forms_equal_those_on_the_device(
    tiny: Config, train_whole: TrainWhole, form: str
) -> None:
    """Two layers, with data workers; rows that are not trained, and lazy Adam."""
    config = vary(tiny, memory={"layers": (0, 1), "frozen": form == "frozen"}, data={"workers": 1})
    if form == "lazy":
        config = vary(config, memory={"adam": RowAdamConfig(form="lazy")})
    whole, _ = train_whole(config, 1, 1)
    run, _ = train_whole(placed(config, "file"), 1, 1)
    assert_same_run(run.folder, whole)
    names = [path.name for path in (run.folder / "checkpoints" / "00000006" / "tables").iterdir()]
    assert sorted(names) == ["0-0.rows", "1-0.rows"]


@pytest.mark.slow
def test_a_new_schedule_settles_the_rows_of_a_store(smallest: Config, tmp_path: Path) -> None:
    """Equal to settling the table on the device, up to the rounding of the momentum's tail."""
    states = []
    for placement in ("device", "host"):
        folder, config = tmp_path / placement, placed(smallest, placement)
        with on_devices(1):
            train(Run.start(config, folder))
            longer = vary(config, train={"steps": 8}, optimizer={"learning_rate": 1e-2})
            train(Run.start(longer, folder, reschedule=True))
        states.append(Run.open(folder).restore())
    assert_identical(*states)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("rows", [8000, 120_000])
def test_settled_rows_have_equal_bits_on_the_device_and_in_a_store(rows: int) -> None:
    """XLA rounds a loop of one round differently: 1 of 66,000 values in bfloat16."""
    layout = RecordLayout(24, StorageConfig("bfloat16", "bfloat16", "row"))
    draw, shape = np.random.default_rng(0).normal, (rows, 24)
    square = 10.0 ** np.random.default_rng(1).uniform(-8, -4, (rows, 1)).astype(np.float32)
    state = RowState(
        value=(0.02 * draw(size=shape)).astype(np.float32),
        mean=np.sqrt(square) * draw(size=shape).astype(np.float32),
        square=square,
        clock=np.random.default_rng(2).integers(1, 20, rows, np.int32),
    )
    records = np.array(layout.pack(state))
    info = store.TableInfo(1, rows, layout, 0, 0.02, "")
    outside = store.RowStore(info, 0, rows)
    outside.write(np.arange(rows, dtype=np.int32), records)
    adam = make_row_adam(RowAdamConfig(form="exact"), lambda _: jnp.float32(1e-2), 20)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        table = Table(jax.device_put(records, TABLE_RW), layout, 1)
        expected = lookup.settle(table, adam, jnp.int32(20)).records
    settle_stores({1: outside}, adam, jnp.int32(20), keep_moments=False)
    np.testing.assert_array_equal(outside.records, expected)
    assert (outside.records != records).any(axis=1).all()


def test_runs_change_their_placement_when_they_resume(
    smallest: Config, train_whole: TrainWhole, tmp_path: Path
) -> None:
    """Two steps each; the runs have the same compiled steps as those above."""
    whole, _ = train_whole(smallest, 1, 1)
    for last, placement in ((2, "device"), (4, "host"), (5, "file"), (6, "device")):
        with on_devices(1), pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "_stop_signal", lambda last=last: _StopAt(last))
            train(Run.start(placed(smallest, placement), tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole)


class _StopAt:
    """Stands in for the stop signal: stops before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __enter__(self) -> Any:
        return lambda step: step == self.step

    def __exit__(self, *exception: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("placement", "mesh"), [("file", (2, 1)), ("host", (2, 4))])
def test_several_devices_and_rounds_of_exchange(
    tiny: Config,
    train_whole: TrainWhole,
    monkeypatch: pytest.MonkeyPatch,
    placement: store.Placement,
    mesh: tuple[int, int],
) -> None:
    def small(bound: int, shards: int, owned: int) -> int:
        return max(bound // shards // 4, 8)

    for module in (exchange, plan):
        monkeypatch.setattr(module, "exchange_capacity", small)
    tiny = vary(tiny, memory={"init_scale": 0.9}, optimizer={"clip_norm": 0.1})  # own programs
    whole, _ = train_whole(tiny, *mesh)
    run, _ = train_whole(placed(tiny, placement), *mesh)
    assert max(line["exchange_rounds_1"] for line in read_metrics(run.folder)) >= 2
    assert_same_run(run.folder, whole)
    files = sorted((run.folder / "checkpoints" / "00000006" / "tables").iterdir())
    assert [path.name for path in files] == ["1-0.rows"]  # of this process


def test_a_run_starts_with_the_rows_of_another(
    smallest: Config, train_whole: TrainWhole, tmp_path: Path
) -> None:
    """Of another placement and seed: its initial rows remain those of the other seed."""
    other, _ = train_whole(placed(smallest, "host"), 1, 1)
    starting = vary(smallest, train={"seed": 5})
    states = []
    for placement in ("device", "file"):
        with on_devices(1):
            folder = tmp_path / placement
            train(Run.start(placed(starting, placement), folder, start_from=other.folder))
        states.append(Run.open(folder).restore())
    assert_identical(*states)
    table = states[0].tables[1]
    places = np.arange(table.rows, dtype=np.int32)
    initial = other.program.tables()[1].initial_records(places)
    assert np.all(np.asarray(table.records) == initial, axis=1).mean() > 0.2


def test_a_disk_that_fills_ends_the_run_and_keeps_its_checkpoint(
    smallest: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate, calls = store._Extents.allocate, iter(range(10))

    def fill(extents: store._Extents, size: int) -> None:
        if next(calls) == 5:
            raise InputError("Cannot extend it (No space left on device).")
        allocate(extents, size)

    monkeypatch.setattr(store._Extents, "allocate", fill)
    config = placed(smallest, "file")
    with on_devices(1), pytest.raises(InputError, match="Cannot extend"):
        train(Run.start(config, tmp_path / "run"))
    assert Run.open(tmp_path / "run").checkpoints.steps() == [4]
    assert jax.device_get(Run.open(tmp_path / "run").restore().step) == 4


def test_a_model_without_memory_has_no_table_outside_the_devices(tiny: Config) -> None:
    """So the sample after training uses the run's own mesh, and opens no stores."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    dense = placed(vary(tiny, memory={"layers": ()}), "host")
    assert Program.of_sizes(dense, mesh).tables_on_device
    program = Program.of_sizes(placed(tiny, "host"), mesh)
    assert not program.tables_on_device and program.can_decode
    split = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    assert not Program.of_sizes(tiny, split).can_decode
