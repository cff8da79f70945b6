"""Ablations of the layer, one change at a time (paper §6.2, Figure 5).

    python -m experiments.ablations [--jobs N]

The paper finds the largest losses without a gate per branch, without gates, and without the
vocabulary projection; the convolution hardly matters, and 4-grams do not help at an equal budget.
All tables have as many numbers as that of `engram_2m`. With more or fewer heads, rows are narrower
or wider, so that the layer's own parameters stay the same. The other changes remove or add
parameters of the layer. Another largest order is also another dilation of the convolution, because
the paper sets it to the largest order.
Cost: 10 configurations × 3 seeds, 10 to 20 minutes each on one core of a CPU.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from engram_jax.config import Config
from experiments.report import draw_differences
from experiments.sweep import Arm, Experiment, Family, main

BASELINE = "Engram"


def arms(family: Family) -> Sequence[Arm]:
    """Engram, and Engram with one change."""
    config = family("engram")
    engram = config.model.engram
    return [
        Arm(BASELINE, config),
        Arm("one gate for all branches", _with(config, model={"single_fusion": True})),
        Arm("no gate", _with(config, model={"engram": replace(engram, gated=False)})),
        Arm("no vocabulary projection", _with(config, memory={"project_vocabulary": False})),
        Arm("no convolution", _with(config, model={"engram": replace(engram, convolution=False)})),
        Arm("2-grams alone", with_orders(config, 2)),
        Arm("2- to 4-grams", with_orders(config, 4)),
        *(
            Arm(f"{heads} head{'s' * (heads > 1)} per order", with_heads(config, heads))
            for heads in (1, 4, 16)
        ),
    ]


def _with(config: Config, **sections: dict[str, object]) -> Config:
    changed = {name: replace(getattr(config, name), **new) for name, new in sections.items()}
    return replace(config, **changed)


def with_orders(config: Config, largest: int) -> Config:
    """N-grams up to another order, with as many table rows in all."""
    memory = config.memory
    rows = round(sum(memory.rows_per_head) / (largest - 1))
    dilation = replace(config.model.engram, dilation=largest)  # the paper's choice
    return _with(
        config,
        model={"engram": dilation},
        memory={"max_order": largest, "rows_per_head": (rows,) * (largest - 1)},
    )


def with_heads(config: Config, heads: int) -> Config:
    """Another number of heads, with rows as wide as to keep the memory width."""
    memory = config.memory
    width = memory.row_width * memory.heads // heads
    return _with(config, memory={"heads": heads, "row_width": width})


EXPERIMENT = Experiment("ablations", arms, BASELINE, partial(draw_differences, baseline=BASELINE))

if __name__ == "__main__":
    main(EXPERIMENT)
