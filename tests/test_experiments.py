"""Every experiment in its smallest form: two steps of tiny models, from nothing to the plot."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import pytest
from matplotlib.figure import Figure
from tiny_runs import on_devices, vary

from configs.small import small_config
from engram_jax.checkpoint import Checkpoints
from engram_jax.costs.accounting import account
from engram_jax.costs.ahead_of_time import abstract_step
from engram_jax.errors import InputError
from engram_jax.layers.mixture_of_experts import ExpertsConfig
from engram_jax.program import Program
from engram_jax.sharding import MeshConfig, make_mesh
from engram_jax.train_step import make_train_step
from experiments import (
    allocation,
    facts,
    memory_law,
    one_run,
)
from experiments.results import Results
from experiments.sweep import Options, Task, run_experiment


@pytest.fixture(autouse=True)
def shared(monkeypatch):
    """All tests here use one device, keep compiled programs, and collect garbage as usual."""
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    monkeypatch.setattr(one_run, "gc", SimpleNamespace(collect=lambda: None))
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


SMALLEST = {  # the last has memory
    "memory_law": ("no memory", "Engram, rows × 1"),
    "controls": ("one row per head", "no memory, equal time", "Engram"),
    "ablations": ("no gate", "Engram"),
    "allocation": ("ρ 0.75",),
    "layer_sweep": ("no memory", "layer 1"),
    "where_it_helps": ("no memory", "Engram"),
    "facts": ("no memory", "Engram"),
}


SLOW = ("ablations", "allocation", "facts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all experiments, so that equal runs are trained once."""
    return tmp_path_factory.mktemp("experiments")


def experiment_of(name):
    return importlib.import_module(f"experiments.{name}")


def make_few_facts(monkeypatch, folder):
    monkeypatch.setattr(facts, "FOLDER", folder)
    monkeypatch.setattr(facts, "FACTS", 3)
    monkeypatch.setattr(facts, "CHOICES", 3)
    monkeypatch.setattr(facts, "_RELATIONS", ("capital",))


@pytest.mark.slow
def test_the_step_of_every_arm_can_be_traced(family, folder, monkeypatch):
    """Compiling all of them takes minutes. Some arms of each experiment are trained below.

    Allocations of such a small model are not of equal size, so `allocate` is left out.
    """
    make_few_facts(monkeypatch, folder / "text")
    monkeypatch.setattr(allocation, "allocate", lambda config, share: config)
    monkeypatch.setattr(memory_law, "FACTORS", (0.5, 1))
    configs = {}
    for name in (*SMALLEST, "comparison", "row_optimizers"):
        experiment, layers = experiment_of(name).EXPERIMENT, 4 if name == "layer_sweep" else 2
        arms = experiment.arms(
            lambda kind, layers=layers: vary(family(kind), model={"layers": layers})
        )
        assert experiment.baseline in [arm.label for arm in arms]
        configs |= {Task(arm, seed=0, steps=2).config(speed=None): arm.label for arm in arms}
    assert len(configs) > 30
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    for config, label in configs.items():
        program = Program.of_sizes(config, mesh)
        state, batch = abstract_step(program)
        with program.use_mesh():
            step = make_train_step.__wrapped__(program)
            after, metrics = jax.eval_shape(step, state, batch, program.abstract_row_adam())
        assert jax.tree.structure(after) == jax.tree.structure(state), label
        assert metrics["loss"].shape == (), label


# Arms whose forms no other test here trains.
MORE = {
    "memory_law": ("no memory", "OverEncoding, rows × 0.1", "Engram, rows × 1"),
    "controls": ("bigram table, no gate", "rows frozen, scale 0.3", "Engram"),
    "ablations": ("2- to 4-grams", "no vocabulary projection", "Engram"),
    "layer_sweep": ("no memory", "layers 1 and 3"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_other_arms_train(name, family, folder, monkeypatch):
    monkeypatch.setattr(one_run, "ROUNDS", 2)
    monkeypatch.setattr(one_run, "STEPS", 1)
    layers = 4 if name == "layer_sweep" else 2
    results = run_experiment(
        experiment_of(name).EXPERIMENT,
        Options(
            steps=2,
            seeds=1,
            only=MORE[name],
            runs=folder / "runs",
            results=folder / "more",
        ),
        lambda kind: vary(family(kind), model={"layers": layers}),
    )
    assert set(results.labels()) == set(MORE[name])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SMALLEST],
)
def test_the_smallest_form_from_nothing_to_the_plot(name, family, folder, monkeypatch):
    make_few_facts(monkeypatch, folder / "text")
    monkeypatch.setattr(one_run, "ROUNDS", 2)
    monkeypatch.setattr(one_run, "STEPS", 1)
    experiment = experiment_of(name).EXPERIMENT
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
    timed = [arm.label for arm in experiment.arms(family) if arm.same_time is not None]
    assert all(results.relative_speed(label) > 0 for label in timed if label in SMALLEST[name])
    path = options.path(experiment)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    table = path.with_suffix(".md").read_text()
    assert all(f"| {label} |" in table for label in SMALLEST[name])

    for suffix in (".png", ".md"):
        path.with_suffix(suffix).unlink()
    run_experiment(experiment, replace(options, plot_only=True, runs=folder / "none"))
    assert path.with_suffix(".md").read_text() == table and path.with_suffix(".png").exists()

    [figures, *_] = results.of(SMALLEST[name][-1])  # drawn as those of every arm
    every = {
        arm.label: figures
        | {"label": arm.label, "account": figures["account"] | {"rows": number}}
        | {"loss": figures["loss"] | {"prose": 5 - 0.1 * number}}
        for number, arm in enumerate(experiment.arms(family), 1)
    }
    experiment.draw(Results(tuple(every.values())), Figure())


def test_a_killed_sweep_continues_where_it_was_and_repeats_no_finished_run(
    options, family, monkeypatch, tmp_path, capsys
):
    """The second run is killed after its first checkpoint; the results are the same to the bit."""
    law, options = memory_law.EXPERIMENT, replace(options, only=SMALLEST["memory_law"], seeds=1)
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
    assert [record["label"] for record in without_times(path)] == ["no memory"]
    [seconds] = options.runs.rglob(one_run.SECONDS)  # of the second run
    assert float(seconds.read_text()) > 0
    seconds.write_text("1000")
    run_experiment(law, options, family)
    assert saved == [1, 2, 1, 2]  # the second run went on at step 1
    first, second = (of["measured"]["seconds"] for of in Results.read(path).records)
    assert first < 1000 < second and not seconds.exists()
    assert without_times(path) == without_times(tmp_path / "whole" / path.name)
    assert not list((options.runs).rglob("checkpoints/*"))

    before = path.read_bytes()
    run_experiment(law, replace(options, runs=tmp_path / "other machine"), family)
    assert saved == [1, 2, 1, 2] and path.read_bytes() == before


@pytest.mark.slow
def test_controls_ablations_and_allocation_keep_what_they_promise():
    def counted(module):
        arms = module.EXPERIMENT.arms(partial(small_config, size="2m"))
        return {arm.label: account(arm.config) for arm in arms}

    controls = counted(experiment_of("controls"))
    flops = {label: of.training_flops for label, of in controls.items()}
    assert flops["no memory, equal FLOPs"] == pytest.approx(flops["Engram"], rel=1e-3)
    assert controls["one row per head"].memory == 16 * 10
    rival = controls["bigram table, no gate"].memory
    assert rival == pytest.approx(controls["Engram"].memory, rel=1e-3)
    assert flops["bigram table, no gate"] == flops["no memory"]
    ablations = counted(experiment_of("ablations"))
    for of in ablations.values():
        assert of.memory == pytest.approx(ablations["Engram"].memory, rel=0.02)
    shares = counted(experiment_of("allocation"))  # equal sizes are asserted in it
    for label, of in shares.items():
        assert of.allocation == pytest.approx(float(label.split()[1].rstrip(",")), abs=0.02)


def test_overencoding_gets_the_parameters_that_engram_reads_its_memory_with():
    """A wider dense layer: `test_accounting` shows that both activate the same number."""
    arms = memory_law.EXPERIMENT.arms(partial(small_config, size="2m"))
    models = {arm.label.split(",")[0]: arm.config.model for arm in arms}
    assert models["OverEncoding"] == small_config("over_encoding", "2m").model
    assert models["Engram"] == models["no memory"] == small_config("engram", "2m").model
    assert models["OverEncoding"].feed_forward > models["Engram"].feed_forward


def test_a_mistyped_label_is_refused(options, family):
    with pytest.raises(InputError, match="choose from no memory, Engram"):
        run_experiment(memory_law.EXPERIMENT, replace(options, only=("Engram",)), family)
    with pytest.raises(InputError, match="run the experiment first"):
        run_experiment(memory_law.EXPERIMENT, replace(options, plot_only=True), family)


@pytest.mark.slow
def test_two_processes_share_an_experiment(tmp_path):
    """The smallest experiment that the command line has: two steps of two arms.

    The default model compiles faster than the small family.
    """
    words = ["experiments.memory_law", "--size", "default", "--steps", "2", "--seeds", "1"]
    words += ["--jobs", "2"]
    words += ["--only", "no memory", "Engram, rows × 0.1"]
    words += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, check=True
    )
    results = Results.read(tmp_path / "results" / "memory_law_default_2_steps.json")
    assert results.labels() == ["no memory", "Engram, rows × 0.1"]
    assert "| no memory | 1 | 2 |" in done.stdout and "Not finished" not in done.stderr
    assert {of["measured"]["jobs"] for of in results.records} == {1, 2}  # a helper has --jobs 1
