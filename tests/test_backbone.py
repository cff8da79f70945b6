"""Whole training runs of the paper's backbone, small: experts, branches, latent attention, Muon."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import assert_identical, losses, on_devices, vary

from engram_jax.config import Config
from engram_jax.layers.hyper_connections import HyperConnectionsConfig
from engram_jax.layers.latent_attention import LatentAttentionConfig
from engram_jax.layers.mixture_of_experts import ExpertsConfig
from engram_jax.metrics import read_metrics
from engram_jax.run import Run
from engram_jax.sampling import sample
from engram_jax.trainer import train


@pytest.fixture(scope="module")
def backbone(tiny: Config) -> Config:
    """A dense layer with Engram before it, then three equal layers with experts, in one loop."""
    return vary(
        tiny,
        model={
            "layers": 4,
            "attention": LatentAttentionConfig(
                heads=2, latent_width=16, head_width=8, rotary_width=8, value_width=8
            ),
            "experts": ExpertsConfig(routed=5, shared=1, active=2, width=16, multiple=2),
            "hyper_connections": HyperConnectionsConfig(branches=2),
            "tie_embeddings": False,
            "remat": "nothing_saveable",
            "scan": True,
        },
        memory={"layers": (0,)},
        optimizer={"matrices": "muon", "decay": "steps", "warmup_steps": 2},
    )


def train_on(config: Config, folder: Path, *mesh: int) -> Run:
    with on_devices(*mesh):
        run = Run.start(config, folder)
    train(run)
    return run


def test_a_mesh_with_dealt_experts_gives_the_losses_of_one_device(
    backbone: Config, tmp_path: Path
) -> None:
    whole = train_on(backbone, tmp_path / "one", 1)
    parts = train_on(backbone, tmp_path / "parts", 2, 2, 2)
    one, other = (read_metrics(run.folder, "train") for run in (whole, parts))
    assert [line["step"] for line in one] == list(range(1, 7))
    for a, b in zip(one, other, strict=True):
        # Losses of a step with rounding of another order behind it: 1e-6 at first, then more.
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6 if a["step"] == 1 else 2e-4)
        assert b["mixing_error"] == pytest.approx(a["mixing_error"], abs=1e-5)
    # Neither Adam nor Muon would show a gradient that is so many times too large.
    for norm in ("gradient_norm", "row_gradient_norm"):
        assert other[0][norm] == pytest.approx(one[0][norm], rel=1e-4)
    assert one[0]["expert_load_worst"] == pytest.approx(other[0]["expert_load_worst"])
    assert one[0]["expert_load_worst"] >= one[0]["expert_load_mean"] > 1
    biases = parts.restore().expert_bias
    assert biases.keys() == {1, 2, 3}
    for bias in biases.values():
        assert bias.shape == (5,) and np.any(bias)
        assert np.abs(bias).max() <= 6e-3 * 1.0001  # six steps of 1e-3
    # What one mesh saved, another reads, and what was dealt comes together.
    again = Run.open(parts.folder)
    weights = again.restore_weights()
    for layer, bias in weights.expert_bias.items():
        np.testing.assert_array_equal(bias, biases[layer])
    assert isinstance(sample(again, weights, "the", tokens=3, temperature=0.0), str)


def test_a_resumed_run_goes_on_with_its_expert_biases(backbone: Config, tmp_path: Path) -> None:
    config = vary(backbone, train={"checkpoint_every": 3})
    whole = train_on(config, tmp_path / "whole", 1)
    shutil.copytree(whole.folder, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "00000006")
    cut = train_on(config, tmp_path / "cut", 1)
    assert losses(cut.folder) == losses(whole.folder)
    assert_identical(cut.restore(), whole.restore())


@pytest.mark.slow
def test_bfloat16_trains_200_steps_with_finite_gradients(backbone: Config, tmp_path: Path) -> None:
    config = vary(
        backbone,
        model={"dtype": "bfloat16"},
        train={"steps": 200, "checkpoint_every": 0},
    )
    run = train_on(config, tmp_path / "run", 1)
    lines = read_metrics(run.folder, "train")
    assert len(lines) == 200
    assert all(np.isfinite([line["loss"], line["gradient_norm"]]).all() for line in lines)
    assert np.mean([line["loss"] for line in lines[-10:]]) < lines[0]["loss"] - 1
    for leaf in jax.tree.leaves(run.restore_weights().params):
        assert np.isfinite(leaf).all()
