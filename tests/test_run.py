"""Runs: what may change between sessions, what may not, and where a batch lies."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from engram_jax.config import Config
from engram_jax.data.pipeline import make_batches
from engram_jax.errors import InputError
from engram_jax.layers.attention import AttentionConfig
from engram_jax.run import Run
from engram_jax.sampling import sample
from engram_jax.sharding import MeshConfig, make_mesh
from tests.tiny_runs import tiny_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(tmp_path)


def test_devices_follow_one_another_by_process() -> None:
    shuffled = [jax.devices()[place] for place in (3, 0, 6, 1, 7, 2, 5, 4)]
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), shuffled)
    assert [device.id for device in mesh.devices.reshape(-1)] == list(range(8))


def test_a_batch_lies_on_the_mesh_in_its_own_order(config: Config, tmp_path: Path) -> None:
    run = Run.start(replace(config, mesh=MeshConfig(fsdp=4)), tmp_path / "run")
    sizes = {"sequence_length": 24, "batch_size": 8, "planner": run.planner()}
    with make_batches(run.corpora(), **sizes) as batches:
        batch = next(batches)
    placed = run.put(batch)
    for host, device in zip(jax.tree.leaves(batch), jax.tree.leaves(placed), strict=True):
        np.testing.assert_array_equal(host, device)


def test_another_mesh_and_log_interval_may_resume(config: Config, tmp_path: Path) -> None:
    Run.start(config, tmp_path / "run")
    changed = replace(
        config,
        mesh=MeshConfig(fsdp=2),
        train=replace(config.train, log_every=1),
        data=replace(config.data, workers=1),
    )
    assert Run.start(changed, tmp_path / "run").mesh.shape["fsdp"] == 2


def test_changed_text_is_refused(config: Config, tmp_path: Path) -> None:
    Run.start(config, tmp_path / "run")
    with Path(config.data.sources[0]).open("a") as file:
        file.write(json.dumps({"text": "Something more was written."}) + "\n")
    with pytest.raises(InputError, match="The text of first is not what"):
        Run.start(config, tmp_path / "run")


def test_unreadable_text_leaves_no_folder_behind(config: Config, tmp_path: Path) -> None:
    missing = replace(config, data=replace(config.data, sources=("nothing.jsonl",)))
    with pytest.raises(InputError, match=r"nothing\.jsonl"):
        Run.start(missing, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    Run.start(config, tmp_path / "run")


def test_nothing_held_out_is_refused_before_training(config: Config, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("One long document. " * 500)
    data = replace(config.data, sources=(str(tmp_path / "book.txt"),), held_out=1e-6)
    with pytest.raises(InputError, match="held out"):
        Run.start(replace(config, data=data), tmp_path / "run")


def test_two_sources_of_one_name_are_refused(config: Config, tmp_path: Path) -> None:
    twice = replace(config.data, sources=(config.data.sources[0],) * 2)
    with pytest.raises(InputError, match="Two sources are called 'first'"):
        Run.start(replace(config, data=twice), tmp_path / "run")


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (2, 1), (4, 2)])
def test_one_row_on_one_device(config: Config, tmp_path: Path, heads: int, kv_heads: int) -> None:
    attention = AttentionConfig(heads=heads, kv_heads=kv_heads, head_width=8)
    Run.start(replace(config, model=replace(config.model, attention=attention)), tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert run.mesh.size == 1
    sample(run, run.initial_state(), "Alexander", tokens=1)
