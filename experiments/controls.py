"""Controls: is it memory, or only more parameters, more FLOPs, or more time?

    python -m experiments.controls [--jobs N]

Every control has the backbone of `engram_2m`. One row per head is one trained vector for all
tokens: the layer's parameters without any lookup. Frozen rows are random features of the n-gram.
The twins are the backbone without memory: as it is; with its dense layer widened to Engram's FLOPs;
and trained for Engram's wall-clock time. The bigram table of the nanoGPT speedruns is added to the
input embedding without gate or projection, with as many numbers as Engram's table, and with its
learning-rate factor and vocabulary projection. The remarks have Engram's loss with another hash
than in training.
Cost: 8 configurations × 3 seeds, 10 to 20 minutes each on one core of a CPU.
"""

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from engram_jax.config import Config
from engram_jax.costs.accounting import account
from experiments.report import draw_differences, time_taken
from experiments.results import Results, mean_and_error
from experiments.sweep import Arm, Experiment, Family, main

BASELINE = "Engram"


def arms(family: Family) -> Sequence[Arm]:
    """Engram, its memory made useless in three ways, its rival, and its twins."""
    config = family("engram")
    memory, twin = config.memory, config.without_memory()

    def with_memory(**changes: object) -> Config:
        return replace(config, memory=replace(memory, **changes))  # type: ignore[arg-type]

    rows = account(config).memory // config.model.width
    return [
        Arm(BASELINE, config),
        Arm("one row per head", with_memory(rows_per_head=(1,) * len(memory.rows_per_head))),
        Arm("rows frozen, scale 0.02", with_memory(frozen=True)),
        Arm("rows frozen, scale 0.3", with_memory(frozen=True, init_scale=0.3)),
        Arm(
            "bigram table, no gate",
            with_memory(
                fusion="added",
                layers=(0,),
                max_order=2,
                heads=1,
                rows_per_head=(rows,),
                row_width=config.model.width,
                init_scale=0.0,
            ),
        ),
        Arm("no memory", twin),
        Arm("no memory, equal FLOPs", widen(twin, account(config).training_flops)),
        Arm("no memory, equal time", twin, same_time=config),
    ]


def widen(config: Config, flops: float) -> Config:
    """The model with its dense feed-forward layers widened to these training FLOPs per token."""

    def wider(units: int) -> Config:
        width = config.model.feed_forward + units
        return replace(config, model=replace(config.model, feed_forward=width))

    now, one_more = (account(wider(units)).training_flops for units in (0, 1))
    return wider(round((flops - now) / (one_more - now)))


def draw(results: Results, figure: Figure) -> str:
    """The differences to Engram; returns the loss with another hash, and the time of the twin."""
    draw_differences(results, figure, BASELINE)
    if not results.of(BASELINE):
        return ""
    increase = results.values(BASELINE, "other_hash")
    hashed = f"- {BASELINE}, rows looked up with another hash: {mean_and_error(increase, '+')}."
    return f"{hashed}\n{time_taken(results, 'no memory, equal time', BASELINE)}"


EXPERIMENT = Experiment("controls", arms, BASELINE, draw)

if __name__ == "__main__":
    main(EXPERIMENT)
