"""Every experiment in its smallest form: two steps of tiny models, from nothing to the plot."""

import importlib
import json
from dataclasses import replace

import jax
import pytest
from tiny_runs import on_devices, vary

from engram_jax.checkpoint import Checkpoints
from engram_jax.layers.mixture_of_experts import ExpertsConfig
from experiments import facts, memory_law
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
        "engram": {"rows_per_head": (100, 100)},
        "over_encoding": {"layers": (0,), "fusion": "over_encoding"},
    }
    return lambda kind: vary(tiny, memory=kinds[kind])


@pytest.fixture
def options(tmp_path):
    return Options(steps=2, seeds=2, runs=tmp_path / "runs", results=tmp_path / "results")


def without_times(path):
    records = json.loads(path.read_text())["runs"]
    return [{name: part for name, part in of.items() if name != "measured"} for of in records]


SMALLEST = {
    "memory_law": ("no memory", "Engram, rows × 1", "OverEncoding, rows × 0.1"),
    "controls": ("Engram", "no memory", "no memory, equal time"),
    "ablations": ("Engram", "no gate"),
    "allocation": ("ρ 0.75",),
    "layer_sweep": ("no memory", "layer 1"),
    "where_it_helps": ("no memory", "Engram"),
    "facts": ("no memory", "Engram"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all experiments, so that equal runs are trained once."""
    return tmp_path_factory.mktemp("experiments")


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_form_from_nothing_to_the_plot(name, family, folder, monkeypatch):
    monkeypatch.setattr(facts, "FOLDER", folder / "text")
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    if name == "allocation":  # it is between experts and table rows
        experts = ExpertsConfig(routed=10, shared=1, active=2, width=16)
        engram = vary(family("engram"), model={"experts": experts})
        family = {"engram": engram}.get
    options = Options(
        steps=2,
        seeds=2 if name == "memory_law" else 1,
        only=SMALLEST[name],
        runs=folder / "runs",
        results=folder / "results",
    )
    results = run_experiment(experiment, options, family)
    assert set(results.labels()) == set(SMALLEST[name])
    path = options.path(experiment)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    table = path.with_suffix(".md").read_text()
    assert all(f"| {label} |" in table for label in SMALLEST[name])

    for suffix in (".png", ".md"):
        path.with_suffix(suffix).unlink()
    run_experiment(experiment, replace(options, plot_only=True, runs=folder / "none"))
    assert path.with_suffix(".md").read_text() == table and path.with_suffix(".png").exists()


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
