"""Kinds of model compared: dense, mixture of experts, OverEncoding, Engram.

    python -m experiments.comparison [--size default | 2m | 10m | 100m] [--jobs N]

The models of a size of the small family activate the same number of parameters, and those with
experts have the same total. With `--size default`, the models are the default one, OverEncoding,
and the dense twin (the default model without memory), also trained for Engram's wall-clock time.
Cost: 4 configurations × 3 seeds, 10 to 20 minutes each on one core of a CPU.
"""

from collections.abc import Sequence
from functools import partial

from experiments.report import draw_differences
from experiments.sweep import Arm, Experiment, Family, main

BASELINE = "dense"


def arms(family: Family) -> Sequence[Arm]:
    """Every kind of model of the size."""
    dense, engram = family("dense"), family("engram")
    if engram.model.experts is None:
        other = Arm("dense, equal time", dense, same_time=engram)
    else:
        other = Arm("mixture of experts", family("moe"))
    over_encoding = Arm("OverEncoding", family("over_encoding"))
    return [Arm(BASELINE, dense), other, over_encoding, Arm("Engram", engram)]


EXPERIMENT = Experiment("comparison", arms, BASELINE, partial(draw_differences, baseline=BASELINE))

if __name__ == "__main__":
    main(EXPERIMENT)
