"""Trains the tiny run of `test_resuming.py`, in a process that the test kills."""

from dataclasses import replace
from pathlib import Path

import jax
from tiny_runs import tiny_config, vary

from engram_jax.config import TrainConfig
from engram_jax.memory.store import Placement
from engram_jax.run import Run
from engram_jax.trainer import train

STEPS = 24


def train_tiny(data: Path, folder: Path, placement: Placement = "device") -> None:
    """Trains or resumes on one device, with texts in `data`."""
    jax.config.update("jax_num_cpu_devices", 1)
    schedule = TrainConfig(
        steps=STEPS, log_every=1, evaluate_every=5, evaluate_tokens=100, checkpoint_every=3
    )
    config = vary(tiny_config(data), memory={"placement": placement})
    train(Run.start(replace(config, train=schedule), folder))
