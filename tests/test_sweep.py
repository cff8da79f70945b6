"""The engine of the experiments, without training."""

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from experiment_records import record

from engram_jax.trainer import Diverged
from experiments import gpu, one_run, sweep
from experiments.report import time_taken
from experiments.results import Results
from experiments.settings import settings
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
    """The machine is half as fast in the second and third round."""
    rates = {"own": np.array([6.0, 2.0, 2.0]), "other": np.array([3.0, 1.0, 0.5])}
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
