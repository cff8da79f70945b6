"""A run that trains with simulated TPU kernels."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from simulation import simulation
from tiny_runs import losses, on_devices, tiny_config, vary

from engram_jax import platforms
from engram_jax.config import Config, TrainConfig
from engram_jax.memory.row_adam import RowAdamConfig
from engram_jax.run import Run
from engram_jax.trainer import train


def train_one(config: Config, folder: Path) -> list[tuple[int, float]]:
    """Trains on one device; gives its losses."""
    with on_devices(1):
        run = Run.start(config, folder)
    train(run)
    return losses(folder)


@pytest.mark.slow
def test_kernels_train_as_xla_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer, T = 128, 6 steps: the same losses to float32's rounding."""
    monkeypatch.setattr(platforms, "NEEDS", {})  # a TPU, for these kernels
    config = vary(
        tiny_config(tmp_path),
        model={"layers": 1},
        # Records of whole lines of 128 words, which the kernel reads.
        memory={"layers": (0,), "row_width": 42, "adam": RowAdamConfig(form="exact")},
        data={"sequence_length": 128, "batch_size": 1},
        optimizer={"warmup_steps": 2},  # so that six steps learn
    )
    config = replace(config, train=TrainConfig(steps=6, seed=1, log_every=1, evaluate_every=0))
    expected = train_one(config, tmp_path / "xla")
    engram = replace(config.model.engram, implementation="pallas_tpu")
    kernels = vary(config, model={"engram": engram}, memory={"gather": "pallas_tpu"})
    with simulation("pallas_tpu"):
        found = train_one(kernels, tmp_path / "kernels")
    jax.clear_caches()
    assert len(found) == 6 and found[-1][1] < found[0][1] - 0.1
    np.testing.assert_allclose(found, expected, rtol=2e-5)
