"""Exact and lazy row Adam, by learning-rate factor and by the scale of the initial rows.

    python -m experiments.row_optimizers --size default --steps 400 --seeds 1
    python -m experiments.row_optimizers --size default \
        --only "exact × 10, scale 0.02" "lazy × 10, scale 0.02"

The first command screens all factors and scales with short runs, and the second trains each form's
best. This takes a few hours on two CPU cores.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import get_args

from engram_jax.memory.row_adam import RowAdamForm
from experiments.report import draw_differences
from experiments.sweep import Arm, Experiment, Family, main

FORMS: tuple[RowAdamForm, ...] = get_args(RowAdamForm.__value__)
FACTORS = (1.0, 2.5, 5.0, 10.0)
BASELINE = "exact × 10, scale 0.02"


def arms(family: Family) -> Sequence[Arm]:
    """Every form, factor and scale."""
    config = family("engram")
    found = []
    for form in FORMS:
        for factor in FACTORS:
            for scale in (0.0, 0.02, config.memory.row_width**-0.5):
                adam = replace(config.memory.adam, form=form, factor=factor)
                memory = replace(config.memory, adam=adam, init_scale=scale)
                label = f"{form} × {factor:g}, scale {scale:.2g}"
                found.append(Arm(label, replace(config, memory=memory)))
    return found


EXPERIMENT = Experiment(
    "row_optimizers", arms, BASELINE, partial(draw_differences, baseline=BASELINE)
)

if __name__ == "__main__":
    main(EXPERIMENT)
