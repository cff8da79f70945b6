"""Training: the step, the loop, stopping and going on, and what the user may get wrong."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_runs import tiny_config
from train_tiny import STEPS

from engram_jax import run as run_module
from engram_jax import trainer
from engram_jax.compression import VocabularyProjection
from engram_jax.config import Config, TrainConfig
from engram_jax.data.packing import Batch
from engram_jax.data.pipeline import make_batches
from engram_jax.errors import InputError
from engram_jax.hashing import NgramHash
from engram_jax.memory.row_adam import RowAdam
from engram_jax.metrics import MetricsLog, read_metrics
from engram_jax.run import Run
from engram_jax.sharding import MeshConfig, make_mesh
from engram_jax.train_state import TrainState
from engram_jax.trainer import Diverged, make_train_step, train


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A tiny run that logs every step; its corpora are tokenized once for this module."""
    config = tiny_config(tmp_path_factory.mktemp("tiny"))
    return replace(config, train=TrainConfig(steps=6, log_every=1, evaluate_every=0))


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs start on the first of the eight devices."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(run_module, "make_mesh", lambda *_: mesh)


@pytest.fixture(scope="module")
def trained(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny run on eight devices, at its end; only to be read."""
    run = Run.start(tiny, tmp_path_factory.mktemp("trained") / "run")
    train(run)
    return run


def vary(config: Config, **sections: dict[str, Any]) -> Config:
    changed = {name: replace(getattr(config, name), **new) for name, new in sections.items()}
    return replace(config, **changed)


def losses(run: Run, kind: str = "train") -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run.folder, kind)]


def assert_identical(one: TrainState, other: TrainState) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


def first_batch(run: Run) -> Batch:
    data, accumulation = run.config.data, run.config.train.accumulation
    with make_batches(
        run.corpora(),
        sequence_length=data.sequence_length,
        batch_size=data.batch_size,
        accumulation=accumulation,
        planner=run.planner(),
    ) as batches:
        return run.put(next(batches))


def one_step(run: Run, state: TrainState | None = None) -> tuple[TrainState, dict[str, Any]]:
    with jax.set_mesh(run.mesh):
        state = run.initial_state() if state is None else state
        state, metrics = make_train_step(run)(state, first_batch(run))
    return state, {name: array.item() for name, array in metrics.items()}


# ------------------------------------------------------------------------------------- the step


@pytest.mark.usefixtures("one_device")
def test_micro_batches_give_the_update_of_the_whole_batch(tiny: Config, tmp_path: Path) -> None:
    # A large epsilon, as Adam's first step is otherwise the sign of rounding noise here and there.
    smooth = vary(tiny, memory={"adam": RowAdam(eps=1e-2)}, optimizer={"eps": 1e-2})
    whole, parts = (
        one_step(Run.start(vary(smooth, train={"accumulation": count}), tmp_path / str(count)))
        for count in (1, 4)
    )
    for name, value in whole[1].items():
        np.testing.assert_allclose(parts[1][name], value, rtol=1e-5, err_msg=name)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(whole[0]), jax.tree.leaves(parts[0]), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.usefixtures("one_device")
def test_clipping_scales_parameters_and_merged_rows_by_their_common_norm(
    tiny: Config, tmp_path: Path
) -> None:
    """The first moments after one step are the clipped gradient times 1 − b1."""

    def moments(clip_norm: float) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        config = vary(tiny, optimizer={"clip_norm": clip_norm}, memory={"init_scale": 1e-3})
        run = Run.start(config, tmp_path / str(clip_norm))
        # A large projection of small rows, so that rows have gradients as large as parameters.
        state = run.initial_state()
        engram = state.params["blocks"][1]["engram"]
        engram["value"] = engram["value"] * 100
        state, metrics = one_step(run, state)
        mean = {"rows": state.tables[1].mean, "dense": state.optimizer[0].mu}
        gradients = {
            name: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) / 0.1
            for name, tree in mean.items()
        }
        return gradients, metrics

    free, metrics = moments(1e6)
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in free.values()))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["row_gradient_norm"], np.linalg.norm(free["rows"].astype(np.float64)), rtol=1e-5
    )
    assert 0.05 < metrics["row_gradient_norm"] / norm < 0.95  # both parts matter
    clipped, clipped_metrics = moments(norm / 7)
    assert clipped_metrics["gradient_norm"] == metrics["gradient_norm"]
    for name, gradient in free.items():
        np.testing.assert_allclose(clipped[name], gradient / 7, rtol=1e-4, atol=1e-8)


@pytest.mark.usefixtures("one_device")
def test_a_step_writes_only_the_rows_that_its_tokens_hash_to(tiny: Config, tmp_path: Path) -> None:
    run = Run.start(tiny, tmp_path / "run")
    batch = first_batch(run)
    before = run.initial_state().tables[1]
    after = one_step(run)[0].tables[1]
    tokens, segments = np.asarray(batch.tokens), np.asarray(batch.segments)
    touched = np.unique(run.ngram_hash.hash_tokens(1, tokens, segments))
    idle = np.setdiff1d(np.arange(len(before.rows)), touched)
    for column in ("rows", "mean", "square", "count"):
        old, new = np.asarray(getattr(before, column)), np.asarray(getattr(after, column))
        assert old[idle].tobytes() == new[idle].tobytes(), column
    np.testing.assert_array_equal(np.flatnonzero(after.count), touched)


@pytest.mark.parametrize("mesh", ["one device", "eight devices"])
def test_a_step_costs_the_same_whatever_the_tables_size(
    tiny: Config, tmp_path: Path, mesh: str, request: pytest.FixtureRequest
) -> None:
    """Donated tables are updated in place: no temporary grows with their rows."""
    if mesh == "one device":
        request.getfixturevalue("one_device")

    def compile_step(rows: int) -> tuple[int, int, int]:
        config = vary(tiny, memory={"rows_per_head": (rows, rows)})
        run = Run.start(config, tmp_path / str(rows))
        with jax.set_mesh(run.mesh):
            compiled = make_train_step(run).lower(run.abstract_state(), first_batch(run)).compile()
        memory = compiled.memory_analysis()
        table = run.ngram_hash.padded_rows[0] * (3 * config.memory.row_width + 1) * 4
        return memory.temp_size_in_bytes, memory.alias_size_in_bytes, table // run.mesh.size

    small, large = compile_step(2_000), compile_step(40_000)
    assert large[0] <= small[0] * 1.01
    assert large[1] - small[1] == large[2] - small[2]  # aliased: the whole of the tables


# ------------------------------------------------------------------------------------- the loop


@pytest.mark.usefixtures("one_device")
def test_loss_falls(tiny: Config, tmp_path: Path) -> None:
    config = vary(tiny, train={"steps": 30}, optimizer={"warmup_steps": 5})
    run = Run.start(config, tmp_path / "run")
    state = train(run)
    curve = losses(run)
    assert [step for step, _ in curve] == list(range(1, 31)) and state.step == 30
    assert abs(curve[0][1] - np.log(8192)) < 0.5
    assert curve[-1][1] < curve[0][1] - 2
    held_out = losses(run, "held_out")
    assert [step for step, _ in held_out] == [30] and held_out[0][1] < curve[0][1] - 1.5
    assert run.checkpoints.steps() == [30]


def test_all_meshes_give_the_losses_of_one_device(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = {}
    for shape in ((1, 1), (2, 4), (8, 1)):
        mesh = make_mesh(MeshConfig(*shape), jax.devices()[: shape[0] * shape[1]])
        monkeypatch.setattr(run_module, "make_mesh", lambda *_, mesh=mesh: mesh)
        run = Run.start(tiny, tmp_path / str(shape))
        state = train(run)
        curves[shape] = read_metrics(run.folder), losses(run, "held_out")
        for table in state.tables.values():
            for column in vars(table).values():
                shards = [shard.data.shape[0] for shard in column.addressable_shards]
                assert shards == [len(column) // mesh.size] * mesh.size
        if shape == (2, 4):
            kernel = state.params["blocks"][0]["feed_forward"]["up"]
            assert kernel.addressable_shards[0].data.size == kernel.size // 4
    for shape in ((2, 4), (8, 1)):
        tolerances = {"loss": 1e-5, "gradient_norm": 1e-4, "row_gradient_norm": 1e-4}
        for name, rtol in (tolerances | {"distinct_rows_1": 0}).items():
            expected, found = ([line[name] for line in curves[s][0]] for s in ((1, 1), shape))
            np.testing.assert_allclose(found, expected, rtol=rtol, err_msg=name)
        np.testing.assert_allclose(curves[shape][1], curves[1, 1][1], rtol=1e-5)


@pytest.mark.usefixtures("one_device")
def test_evaluations_and_checkpoints_change_nothing(tiny: Config, tmp_path: Path) -> None:
    plain = Run.start(tiny, tmp_path / "plain")
    busy = Run.start(
        vary(tiny, train={"evaluate_every": 2, "checkpoint_every": 1}), tmp_path / "busy"
    )
    states = [train(run) for run in (plain, busy)]
    assert losses(plain) == losses(busy)
    assert_identical(*states)
    assert [step for step, _ in losses(busy, "held_out")] == [2, 4, 6]
    assert busy.checkpoints.steps() == [5, 6]


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("number", "change"),
    [
        (signal.SIGTERM, {}),
        (signal.SIGINT, {"memory": {"fusion": "over_encoding", "layers": (0,)}}),
        (signal.SIGTERM, {"memory": {"layers": ()}, "train": {"accumulation": 2}}),
    ],
    ids=["engram", "over_encoding", "dense"],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    tiny: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    change: dict[str, dict[str, Any]],
) -> None:
    config = vary(tiny, **change)
    whole = Run.start(config, tmp_path / "whole")
    expected = train(whole)

    write, handlers = MetricsLog.write, [signal.getsignal(n) for n in signal.Signals]

    def write_and_stop(log: MetricsLog, step: int, *rest: Any, **named: Any) -> None:
        write(log, step, *rest, **named)
        if step == 3:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write_and_stop)
        stopped = train(Run.start(config, tmp_path / "parts"))
    assert 3 <= stopped.step < 6
    assert [signal.getsignal(n) for n in signal.Signals] == handlers
    parts = Run.start(config, tmp_path / "parts")
    assert parts.checkpoints.steps() == [stopped.step]
    assert_identical(train(parts), expected)
    assert losses(parts) == losses(whole)
    # A finished run is restored, and nothing more happens.
    assert_identical(train(Run.start(config, tmp_path / "parts")), expected)
    assert losses(parts) == losses(whole)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """SIGKILL at random moments, some of them in the middle of a save or of the set-up."""
    generator = random.Random()
    seed = generator.randrange(2**32)
    print("seed", seed)  # pytest shows it if the test fails
    generator.seed(seed)

    program, log_path = Path(__file__).with_name("train_tiny.py"), tmp_path / "log.txt"

    def start(name: str) -> subprocess.Popen[bytes]:
        with log_path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(program), str(tmp_path), str(tmp_path / name)],
                env=os.environ
                | {"PYTHONPATH": str(program.parents[1]), "JAX_NUM_CPU_DEVICES": "1"},
                stderr=log,
            )

    whole = start("whole")
    assert whole.wait(timeout=300) == 0, log_path.read_text()
    kills = 0
    while True:
        process = start("parts")
        known = len(read_metrics(tmp_path / "parts"))
        wanted = generator.randrange(1, 10)
        while process.poll() is None and kills < 6:
            new = len(read_metrics(tmp_path / "parts")) - known
            if new < 0:  # the log was cut back to the restored step
                known += new
            elif new >= wanted:
                time.sleep(generator.random() * 0.3)
                break
            time.sleep(0.01)
        if process.poll() is None and kills < 6:
            process.kill()
            kills += 1
        code = process.wait(timeout=300)
        assert code in (0, -signal.SIGKILL), log_path.read_text()
        if code == 0:
            break
    assert kills >= 2
    for kind in ("train", "held_out"):
        curves = [
            [(line["step"], line["loss"]) for line in read_metrics(tmp_path / name, kind)]
            for name in ("whole", "parts")
        ]
        assert curves[0] == curves[1]
    assert curves[0][-1][0] == STEPS
    states = [Run.open(tmp_path / name).restore() for name in ("whole", "parts")]
    assert_identical(*states)


@pytest.mark.usefixtures("one_device")
def test_profile_writes_a_trace(tiny: Config, tmp_path: Path) -> None:
    run = Run.start(vary(tiny, train={"steps": 7}), tmp_path / "run")
    train(run, profile=True)  # ends within the ten steps that it would trace
    assert list((run.folder / "profile").rglob("*.xplane.pb"))


# ------------------------------------------------------------------------------ other runs' weights


def test_start_from_takes_weights_alone(tiny: Config, trained: Run, tmp_path: Path) -> None:
    first = trained.restore()
    second = Run.start(
        vary(tiny, mesh={"fsdp": 4}, optimizer={"learning_rate": 1e-4}), tmp_path / "second"
    )
    with jax.set_mesh(second.mesh):
        state = trainer._first_state(second, trained.folder)
    fresh = second.initial_state()
    assert_identical(
        replace(state, optimizer=fresh.optimizer, tables={}),
        replace(fresh, params=first.params, tables={}),
    )
    table, old = state.tables[1], first.tables[1]
    np.testing.assert_array_equal(table.rows, old.rows)
    for column in (table.mean, table.square, table.count):
        assert not np.any(column)
    assert table.rows.sharding == fresh.tables[1].rows.sharding
    train(second, start_from=trained.folder)
    assert losses(second)[0][1] < losses(trained)[0][1]


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": {"hash_seed": 1}}, "other n-grams"),
        ({"memory": {"row_width": 4}}, "other parameters"),
        ({"model": {"width": 16}}, "other parameters"),
        ({"memory": {"layers": ()}}, "other parameters"),
    ],
)
def test_start_from_refuses_what_does_not_fit(
    tiny: Config,
    trained: Run,
    tmp_path: Path,
    change: dict[str, dict[str, Any]],
    message: str,
) -> None:
    second = Run.start(vary(tiny, **change), tmp_path / "second")
    with pytest.raises(InputError, match=message):
        train(second, start_from=trained.folder)
    assert losses(second) == [] and second.checkpoints.steps() == []


@pytest.mark.usefixtures("one_device")
def test_start_from_refuses_a_folder_without_a_run(tiny: Config, tmp_path: Path) -> None:
    run = Run.start(tiny, tmp_path / "run")
    with pytest.raises(InputError, match="run folder"):
        train(run, start_from=tmp_path / "nothing")


# -------------------------------------------------------------------------------------- divergence


@pytest.mark.usefixtures("one_device")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_divergence_names_the_step_and_the_last_good_checkpoint(
    tiny: Config, tmp_path: Path
) -> None:
    run = Run.start(vary(tiny, train={"checkpoint_every": 2}), tmp_path / "run")
    put = run.put
    batches = 0

    def put_poison(batch: Batch) -> Batch:
        nonlocal batches
        batches += 1
        if batches == 6:
            batch = batch._replace(target_mask=batch.target_mask * np.float32("nan"))
        return put(batch)

    object.__setattr__(run, "put", put_poison)
    with pytest.raises(Diverged, match=r"Step 6 has loss nan.*checkpoint is that of step 4"):
        train(run)
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5]
    assert run.checkpoints.steps() == [2, 4]


@pytest.mark.usefixtures("one_device")
def test_a_learning_rate_that_ruins_the_weights(tiny: Config, tmp_path: Path) -> None:
    """Step 1 is sound and is saved, but what it made of the weights is not."""
    config = vary(tiny, optimizer={"learning_rate": 1e30}, train={"checkpoint_every": 1})
    run = Run.start(config, tmp_path / "run")
    with pytest.raises(Diverged, match=r"Step 2 has loss nan.*none is good.*learning_rate"):
        train(run)


# -------------------------------------------------------------------------------- what may be wrong


def test_rows_that_do_not_divide_over_the_devices_are_refused(tiny: Config, tmp_path: Path) -> None:
    for change in ({"data": {"batch_size": 4}}, {"train": {"accumulation": 2}}):
        with pytest.raises(InputError, match="4 rows does not divide over 8 devices"):
            Run.start(vary(tiny, **change), tmp_path / "run")
    with pytest.raises(InputError, match="8 devices"):
        Run.start(vary(tiny, mesh={"fsdp": 3}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_configuration_is_refused(tiny: Config, tmp_path: Path) -> None:
    Run.start(tiny, tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    for change, field in (
        ({"optimizer": {"learning_rate": 0.5}}, r"optimizer\.learning_rate 0\.003, not 0\.5"),
        ({"memory": {"rows_per_head": (500, 501)}}, r"memory\.rows_per_head \(500, 500\)"),
        ({"model": {"remat": True}}, r"model\.remat False"),
    ):
        with pytest.raises(InputError, match=field):
            Run.start(vary(tiny, **change), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_folder_with_something_else_is_refused(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("Dear reader")
    with pytest.raises(InputError, match="holds no run"):
        Run.start(tiny, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_start_that_was_killed_is_started_again(tiny: Config, tmp_path: Path) -> None:
    Run.start(tiny, tmp_path / "run")
    (tmp_path / "run" / "config.json").rename(tmp_path / "run" / "config.partial")
    again = Run.start(tiny, tmp_path / "run")
    assert Run.open(tmp_path / "run").ngram_hash.fingerprint == again.ngram_hash.fingerprint


def test_another_tokenizer_than_the_models_is_refused(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"8192 pieces.*100.*model.vocabulary"):
        Run.start(vary(tiny, model={"vocabulary": 100}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def saved(trained: Run, tmp_path: Path) -> Run:
    """A copy of the trained run."""
    shutil.copytree(trained.folder, tmp_path / "run")
    return Run.open(tmp_path / "run")


def test_a_hash_of_another_tokenizer_is_refused(tiny: Config, saved: Run) -> None:
    NgramHash.build(saved.ngram_hash.spec, VocabularyProjection.identity(8192)).save(
        saved.folder / "hash.json"
    )
    with pytest.raises(InputError, match="another tokenizer"):
        Run.start(tiny, saved.folder)


def test_a_checkpoint_of_another_hash_is_refused(tiny: Config, saved: Run) -> None:
    """Sound in itself, and of this tokenizer: only the checkpoint knows that it is another."""
    ours = saved.ngram_hash
    replace(ours, multipliers=ours.multipliers + 2).save(saved.folder / "hash.json")
    run = Run.start(tiny, saved.folder)
    with pytest.raises(InputError, match=f"another hash.*{ours.fingerprint}"):
        train(run)


def test_a_run_whose_hash_is_gone_or_damaged_is_refused(tiny: Config, saved: Run) -> None:
    path = saved.folder / "hash.json"
    content = path.read_text()
    path.write_text(content[: len(content) // 2])
    for begin in (lambda: Run.start(tiny, saved.folder), lambda: Run.open(saved.folder)):
        with pytest.raises(InputError, match=r"hash\.json"):
            begin()
    path.unlink()
    with pytest.raises(InputError, match=r"hash\.json"):
        Run.open(saved.folder)


def test_a_run_opens_on_one_device_whatever_trained_it(trained: Run) -> None:
    opened = Run.open(trained.folder)
    assert (trained.mesh.size, opened.mesh.size) == (8, 1)
    assert_identical(opened.restore(), trained.restore())


@pytest.mark.usefixtures("one_device")
def test_seeds_differ(tiny: Config, tmp_path: Path) -> None:
    one, other = (
        Run.start(vary(tiny, train={"seed": seed}), tmp_path / str(seed)).initial_state()
        for seed in (0, 1)
    )
    assert np.any(one.params["embedding"] != other.params["embedding"])
    assert np.any(one.tables[1].rows != other.tables[1].rows)


def test_the_initial_state_does_not_depend_on_the_mesh(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[TrainState] = []
    make: Callable[..., Any] = run_module.make_mesh
    for name, mesh in (
        ("eight", make(MeshConfig(fsdp=4))),
        ("one", make(MeshConfig(), jax.devices()[:1])),
    ):
        monkeypatch.setattr(run_module, "make_mesh", lambda *_, mesh=mesh: mesh)
        states.append(Run.start(tiny, tmp_path / name).initial_state())
    assert_identical(*states)
