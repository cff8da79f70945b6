"""Trains the tiny run of `test_trainer.py` in a process of its own, to be killed and started again.

Usage: python tests/train_tiny.py DATA_FOLDER RUN_FOLDER
"""

import sys
from dataclasses import replace
from pathlib import Path

from tiny_runs import tiny_config

from engram_jax.config import TrainConfig
from engram_jax.run import Run
from engram_jax.trainer import train

STEPS = 24

if __name__ == "__main__":
    data, folder = map(Path, sys.argv[1:])
    schedule = TrainConfig(
        steps=STEPS, log_every=1, evaluate_every=5, evaluate_tokens=100, checkpoint_every=3
    )
    train(Run.start(replace(tiny_config(data), train=schedule), folder))
