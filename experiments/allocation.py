"""The allocation of sparse parameters to experts and table rows (paper §3.1, Figure 3 left).

    python -m experiments.allocation [--size 10m] [--jobs N]

A share ρ of the sparse parameters goes to idle experts, and the rest to table rows. Total,
activated parameters and FLOPs are the same, which is asserted. The paper's loss is lowest at
ρ ≈ 0.8 (1.7109, against 1.7248 at ρ = 1). The second curve is the loss after the same wall-clock
time: more experts make a step slower, so these runs have other numbers of steps. At 1 M tokens
experts are hardly trained, so an optimum between the ends is not promised.
Cost: 11 configurations × 3 seeds, 10 to 20 minutes each on one core of a CPU.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from engram_jax.costs.accounting import account, allocate
from experiments.report import draw_points, time_taken
from experiments.results import Results
from experiments.sweep import Arm, Experiment, Family, main

SHARES = (0.25, 0.4, 0.6, 0.75, 0.9, 1.0)
OWN = 0.75  # the family's own allocation
BASELINE = f"ρ {OWN}"


def arms(family: Family) -> Sequence[Arm]:
    """Every allocation for equal steps, then for equal time."""
    config = family("engram")
    own = account(config)
    found, timed = [], []
    for share in SHARES:
        allocated = config if share == OWN else allocate(config, share)
        counted = account(allocated)
        for name, most in (("total", 0.005), ("activated", 0.015), ("training_flops", 0.01)):
            ratio = getattr(counted, name) / getattr(own, name)
            assert abs(ratio - 1) < most, f"ρ {share}: {name} is {ratio:.3f} of that of ρ {OWN}"
        found.append(Arm(f"ρ {share}", allocated))
        if share != OWN:
            timed.append(Arm(f"ρ {share}, equal time", allocated, same_time=config))
    return [*found, *timed]


def draw(results: Results, figure: Figure) -> str:
    """Loss against ρ, for equal steps and for equal time; returns the times."""
    axes = figure.subplots()
    for suffix, color, title in (
        ("", "#3b6fd4", "equal steps and FLOPs"),
        (", equal time", "#f4544a", "equal wall-clock time"),
    ):
        labels = [f"ρ {share}" if share == OWN else f"ρ {share}{suffix}" for share in SHARES]
        present = [label for label in labels if results.of(label)]
        shares = np.array([float(label.split()[1].rstrip(",")) for label in present])
        losses = [results.values(label, "loss", "prose") for label in present]
        draw_points(axes, shares, losses, color, title)
        axes.plot(shares, [of.mean() for of in losses], color=color, linewidth=1)
    axes.set_xlabel("ρ, the experts' share of the sparse parameters")
    axes.set_ylabel("held-out loss, nats per token of prose")
    axes.legend(frameon=False)
    timed = [label for label in results.labels() if label.endswith("equal time")]
    lines = (time_taken(results, label, BASELINE) for label in timed)
    return "\n".join(line for line in lines if line)


EXPERIMENT = Experiment("allocation", arms, BASELINE, draw)

if __name__ == "__main__":
    main(EXPERIMENT)
