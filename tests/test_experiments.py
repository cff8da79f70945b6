"""Every experiment in its smallest form: two steps of tiny models, from nothing to the plot."""

import json
from dataclasses import replace

import jax
import pytest
from tiny_runs import on_devices, vary

from engram_jax.checkpoint import Checkpoints
from experiments import memory_law
from experiments.sweep import Options, run_experiment


@pytest.fixture(autouse=True)
def shared(monkeypatch):
    """All tests here use one device and keep compiled programs."""
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    with on_devices(1):
        yield


@pytest.fixture
def family(tiny):
    """The tiny model as Engram, OverEncoding, or without memory."""
    kinds = {
        "dense": {"layers": ()},
        "engram": {},
        "over_encoding": {"layers": (0,), "fusion": "over_encoding"},
    }
    return lambda kind: vary(tiny, memory=kinds[kind])


@pytest.fixture
def options(tmp_path):
    return Options(steps=2, seeds=2, runs=tmp_path / "runs", results=tmp_path / "results")


def without_times(path):
    records = json.loads(path.read_text())["runs"]
    return [{name: part for name, part in of.items() if name != "measured"} for of in records]


LAW = ("no memory", "Engram, rows × 1", "OverEncoding, rows × 0.1")


def test_a_killed_sweep_continues_where_it_was_and_repeats_no_finished_run(
    options, family, monkeypatch, tmp_path, capsys
):
    """The second run is killed after its first checkpoint; the results are the same to the bit."""
    law, options = memory_law.EXPERIMENT, replace(options, only=LAW[:2], seeds=1)
    run_experiment(law, replace(options, results=tmp_path / "whole", runs=tmp_path / "a"), family)

    saved, save = [], Checkpoints.save

    class Killed(BaseException):
        pass

    def save_or_die(self, step, *arguments, **named):
        path = save(self, step, *arguments, **named)
        saved.append(step)
        if len(saved) == 3:  # the first checkpoint of the second run
            raise Killed
        return path

    monkeypatch.setattr(Checkpoints, "save", save_or_die)
    with pytest.raises(Killed):
        run_experiment(law, options, family)
    path = options.path(law)
    assert [record["label"] for record in without_times(path)] == [LAW[0]]
    run_experiment(law, options, family)
    assert saved == [1, 2, 1, 2]  # the second run went on at step 1
    assert without_times(path) == without_times(tmp_path / "whole" / path.name)
    assert not list((options.runs).rglob("checkpoints/*"))

    before = path.read_bytes()
    run_experiment(law, replace(options, runs=tmp_path / "other machine"), family)
    assert saved == [1, 2, 1, 2] and path.read_bytes() == before
