"""Compares exact and lazy row Adam on the default run, each with its best factor and initial scale.

    python -m benchmarks.row_optimizers [--screening-steps N] [--folder PATH]

Trains the runs that are not yet in runs/row_optimizers/: a grid of short runs with one seed (form ×
factor × initial scale), then complete runs with three seeds at each form's best. Prints both as
tables. This takes a few hours on two CPU cores. Prose is the sources vital_en and austen.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import tyro

from benchmarks.comparison import PROSE, SEEDS, mean_and_error
from engram_jax.command_line import load_named_config
from engram_jax.config import Config
from engram_jax.evaluation.held_out import evaluate_held_out, make_scorer, pool
from engram_jax.memory.row_adam import RowAdamForm
from engram_jax.run import Run
from engram_jax.trainer import train

FORMS: tuple[RowAdamForm, ...] = get_args(RowAdamForm.__value__)
FACTORS = (1.0, 2.5, 5.0, 10.0)


def held_out_loss(config: Config, folder: Path) -> float:
    """Held-out nats per token of the prose sources. Trains the run if necessary.

    The run's checkpoint (1.6 GB) is deleted.
    """
    result = folder / "prose_loss.json"
    if not result.exists():
        run = Run.start(config, folder)
        state = train(run)
        prose = [corpus for corpus in run.corpora() if corpus.name in PROSE]
        with run.program.use_mesh():
            scores = evaluate_held_out(run.program, make_scorer(run.program), state.weights, prose)
        result.write_text(json.dumps(pool(list(scores.values())).loss))
        shutil.rmtree(folder / "checkpoints")
    loss: float = json.loads(result.read_text())
    return loss


def main(folder: Path = Path("runs/row_optimizers"), screening_steps: int = 400) -> None:
    """Trains and prints.

    Args:
        folder: folder of the runs.
        screening_steps: steps of the short runs, which choose factor and scale.
    """
    config = load_named_config("default")
    scales = (0.0, 0.02, config.memory.row_width**-0.5)

    def loss(form: RowAdamForm, factor: float, scale: float, steps: int, seed: int) -> float:
        adam = replace(config.memory.adam, form=form, factor=factor)
        memory = replace(config.memory, adam=adam, init_scale=scale)
        schedule = replace(config.train, steps=steps, seed=seed, evaluate_every=0)
        schedule = replace(schedule, checkpoint_every=0)
        return held_out_loss(
            replace(config, memory=memory, train=schedule),
            folder / f"{form}-{factor:g}-{scale:.3g}-{steps}-{seed}",
        )

    best: dict[RowAdamForm, tuple[float, float]] = {}
    print(
        f"| {screening_steps} steps, seed 0 | factor | {' | '.join(f'{s:.3g}' for s in scales)} |"
    )
    print(f"|---|---|{'---|' * len(scales)}")
    for form in FORMS:
        losses = {}
        for factor in FACTORS:
            for scale in scales:
                losses[factor, scale] = loss(form, factor, scale, screening_steps, seed=0)
            row = " | ".join(f"{losses[factor, scale]:.4f}" for scale in scales)
            print(f"| {form} | {factor:g} | {row} |", flush=True)
        best[form] = min(losses, key=losses.__getitem__)

    print(f"\n| {config.train.steps} steps, seeds {SEEDS} | factor | scale | held-out loss |")
    print("|---|---|---|---|")
    final = {}
    for form, (factor, scale) in best.items():
        final[form] = np.array(
            [loss(form, factor, scale, config.train.steps, seed) for seed in SEEDS]
        )
        print(f"| {form} | {factor:g} | {scale:.3g} | {mean_and_error(final[form])} |", flush=True)
    print(f"\nExact minus lazy, paired by seed: {mean_and_error(final['exact'] - final['lazy'])}")


if __name__ == "__main__":
    tyro.cli(main)
