"""The engine of the experiments, and the keys of their runs, without training."""

import importlib
import re
import subprocess
import sys
from dataclasses import make_dataclass, replace
from typing import Any

import numpy as np
import pytest
from experiment_records import record
from tiny_runs import vary

from engram_jax.memory.row_adam import RowAdamConfig
from engram_jax.training_progress import Diverged
from experiments import facts, gpu, one_run, sweep
from experiments.report import time_taken
from experiments.results import Results, order_of
from experiments.settings import _differing, settings
from experiments.sweep import Arm, Experiment, Options, Task, run_experiment


@pytest.fixture
def options(tmp_path):
    return Options(steps=2, seeds=2, runs=tmp_path / "runs", results=tmp_path / "results")


def test_runs_that_are_measured_in_another_way_are_other_runs(tiny, monkeypatch):
    task = Task(Arm("", tiny), 0, 2)
    before = task.key(tiny)
    monkeypatch.setattr(sweep, "VERSION", sweep.VERSION + 1)
    assert task.key(tiny) != before
    old, new = (record("a", 0, 5.0, measurement=1), record("b", 0, 5.0, measurement=2))
    assert Results((old,)).add(new, ["a", "b"]).records == (new,)
    assert Results((new,)).add(record("a", 0, 4.0, measurement=2), ["a"]).labels() == ["a", "b"]


def test_runs_with_another_order_of_documents_are_not_paired(tiny, options, pretended, capsys):
    """A seed that was begun in the earlier order is neither copied nor continued."""
    first, second = Arm("first", tiny), Arm("second", vary(tiny, optimizer={"z_loss": 1e-4}))
    config = Task(first, 0, 2).config(None)
    key = Task(first, 0, 2).key(config, order=1)
    assert key != Task(first, 0, 2).key(config)
    earlier = record("first", 0, 5.0, key=key, settings=settings(config))
    Results((earlier,)).write(options.path(experiment_of(first)))
    found = run_experiment(experiment_of(first, second), options, {"engram": tiny}.get)
    assert [(one["label"], one["seed"], order_of(one)) for one in found.records] == [
        ("first", 0, 1),
        ("first", 1, 2),
        ("second", 1, 2),
    ]
    assert "second, seed 0: is not trained" in capsys.readouterr().err
    other = replace(experiment_of(first), name="other")
    assert {order_of(one) for one in run_experiment(other, options, {}.get).records} == {2}
    assert len(pretended) == 3  # seed 1 of the first arm is trained once


def test_a_record_tells_whether_the_code_differs_from_its_commit(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True)

    for folder in ("engram_jax", "experiments"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "code.py").write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = one_run._read_commit(tmp_path / "experiments")
    assert re.fullmatch(r"[0-9a-f]{12}", commit)
    (tmp_path / "notes").write_text("")
    assert one_run._read_commit(tmp_path / "experiments") == commit
    (tmp_path / "engram_jax/code.py").write_text("changed")
    assert one_run._read_commit(tmp_path / "experiments") == f"{commit}+changes"
    assert one_run._read_commit(tmp_path / "none") == "unknown"


@pytest.fixture
def pretended(monkeypatch):
    """Runs are not trained; the fixture is the list of their configurations."""
    trained = []

    def train_and_measure(config, folder, **_):
        trained.append(config)
        return record("", config.train.seed, 5.0, settings=settings(config))

    monkeypatch.setattr(sweep, "train_and_measure", train_and_measure)
    return trained


def experiment_of(*arms):
    return Experiment("some", lambda family: arms, arms[0].label, lambda results, figure: "")


def test_an_arm_of_equal_time_gets_the_steps_of_a_speed_measured_once(
    options, tiny, pretended, monkeypatch
):
    twin, memory = tiny.without_memory(), tiny
    experiment = experiment_of(Arm("twin", twin), Arm("equal time", twin, same_time=memory))
    speeds = [1.2, 1.5]
    monkeypatch.setattr(sweep, "relative_speed", lambda *of: speeds.pop(0))
    options = replace(options, steps=500, only=("equal time",))
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "write_report", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            run_experiment(experiment, options, None)
    options.path(experiment).unlink()  # as if it was killed before the first run ended
    results = run_experiment(experiment, options, None)
    assert [config.train.steps for config in pretended] == [600, 600, 600]
    assert [of["relative_speed"] for of in results.records] == [1.2, 1.2] and speeds == [1.5]
    # The results alone tell the speed on another machine.
    run_experiment(experiment, replace(options, runs=options.runs / "other", seeds=3), None)
    assert pretended[-1].train.steps == 600 and pretended[-1].train.seed == 2
    full = results.add(record("twin", 0, 5.0), [])
    assert time_taken(full, "equal time", "twin") == (
        "- equal time: its 600 steps take 1.00 of the time of twin. It trains at 1.200 of its "
        "tokens/s (median, both alternately in one process)."
    )


def test_a_relative_speed_is_the_median_of_the_ratios_of_rounds(tiny, monkeypatch):
    """2, 1 and 4; the medians are equal."""
    rates = {"own": np.array([6.0, 2.0, 2.0]), "other": np.array([3.0, 2.0, 0.5])}
    monkeypatch.setattr(one_run.throughput, "measure", lambda *_: rates)
    assert one_run.relative_speed(tiny, tiny) == 2.0


def test_a_report_that_a_kill_prevented_is_written_later(options, tiny, pretended, monkeypatch):
    experiment, options = experiment_of(Arm("only", tiny)), replace(options, seeds=1)
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "write_report", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            run_experiment(experiment, options, None)
    table = options.path(experiment).with_suffix(".md")
    assert not table.exists()
    run_experiment(experiment, options, None)
    assert "| only | 1 |" in table.read_text() and len(pretended) == 1


def test_without_a_finished_run_the_end_is_one_sentence(tiny, monkeypatch, tmp_path, capsys):
    def diverge(*_, **__):
        raise Diverged("NaN at step 1")

    monkeypatch.setattr(sweep, "train_and_measure", diverge)
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["some", "--seeds", "1", *folders])
    sweep.main(experiment_of(Arm("only", tiny)))
    read = capsys.readouterr()
    assert "Not finished: only (seed 0)." in read.err and "Cannot use" not in read.err
    monkeypatch.setattr(sys, "argv", ["some", "--seeds", "many"])
    with pytest.raises(SystemExit):
        sweep.main(experiment_of(Arm("only", tiny)))
    assert re.fullmatch(r"error: .*--seeds.* See --help\.\n", capsys.readouterr().err)


class Helper:
    """A process that saves a checkpoint before it ends."""

    def __init__(self, calls):
        self._calls = calls

    def terminate(self):
        self._calls.append("terminate")

    def wait(self, timeout=None):
        self._calls.append(timeout or "wait")
        if timeout:
            raise subprocess.TimeoutExpired("", timeout)


def test_a_sweep_that_is_stopped_waits_for_its_helpers(tiny, monkeypatch):
    calls, named = [], {}

    def start(words, **more):
        named.update(more)
        return Helper(calls)

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(SystemExit), sweep._helpers(experiment_of(Arm("", tiny)), 2):
        sys.exit()
    assert calls == ["terminate", "terminate", "wait", "wait"]
    assert named == {"start_new_session": True}  # Ctrl-C would be a second signal


def test_both_experiments_on_a_gpu_get_half_of_the_time(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(subprocess, "Popen", lambda words: Helper(calls))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu, "COMMANDS", {"first": [], "second": []})
    gpu.main(minutes=10)
    assert calls[:3] == [300 - gpu.SAVING, "terminate", "wait"]
    assert calls[3] == 300 * 2 - gpu.SAVING  # no time has passed


def test_a_key_depends_on_what_differs_from_the_defaults_and_changes_results(tiny):
    changed = vary(tiny, train={"log_every": 7, "keep_checkpoints": 5}, data={"workers": 2})
    assert settings(changed) == settings(replace(tiny, name="other")) == settings(tiny)
    names = settings(tiny).keys()
    assert {"model.width", "memory.heads", "train.seed"} <= names
    assert not names & {"memory.max_order", "model.engram.gated", "name", "train.log_every"}
    without = vary(tiny, memory={"heads": 4}).without_memory()
    assert settings(without) == settings(tiny.without_memory())
    key = Task(Arm("", tiny), 0, 2).key
    other = vary(tiny, model={"engram": replace(tiny.model.engram, gated=False)})
    assert key(tiny) == key(changed) != key(other)
    measured = Task(Arm("", tiny, measure=facts.recall), 0, 2).key(tiny)
    assert measured != key(tiny)


def test_a_key_tells_a_nested_part_from_its_default_in_this_configuration(tiny):
    """`MemoryConfig.adam` has another factor than `RowAdamConfig()`."""
    factors = {
        settings(vary(tiny, memory={"adam": RowAdamConfig(factor=factor)})).get(
            "memory.adam.factor"
        )
        for factor in (5.0, 10.0)
    }
    assert factors == {5.0, None}


def test_a_new_field_with_its_default_changes_no_key():
    """A part gets a field; it is the default, another one, of another class, or has its default."""
    before = make_dataclass("Part", [("size", int, 1)], frozen=True)
    after = make_dataclass("Part", [("size", int, 1), ("new", int, 7)], frozen=True)

    def found(part):
        other = make_dataclass("Other", [("name", str, "")], frozen=True)
        whole = make_dataclass("Whole", [("own", Any, part(size=5)), ("none", Any, None)])
        return [
            dict(_differing(value, whole()))
            for value in (whole(), whole(part(size=1)), whole(none=part(size=2)), whole(other()))
        ]

    assert found(before) == found(after)
    assert found(after)[:2] == [{}, {"own.size": 1}]
    assert found(after)[2:] == [{"none": "Part", "none.size": 2}, {"own": "Other"}]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, "2m") for name in ("comparison", "memory_law", "ablations", "layer_sweep")),
        *((name, "2m") for name in ("row_optimizers", "facts", "where_it_helps")),
        *((name, "default") for name in ("comparison", "row_optimizers")),
        pytest.param("controls", "2m", marks=pytest.mark.slow),
        pytest.param("allocation", "2m", marks=pytest.mark.slow),
    ],
)
def test_only_equal_configurations_have_equal_keys(name, size, monkeypatch, tmp_path):
    monkeypatch.setattr(facts, "FOLDER", tmp_path)
    arms = importlib.import_module(f"experiments.{name}").EXPERIMENT.arms(Options(size=size).family)
    by_key = {}
    for arm in arms:
        key = Task(arm, 0, 2).key(arm.config)
        by_key.setdefault(key, []).append(replace(arm.config, name=""))
    assert all(config == of[0] for of in by_key.values() for config in of)
    assert len(by_key) == len([arm for arm in arms if arm.same_time is None])
