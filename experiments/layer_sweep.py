"""The layer with memory: every layer, and two pairs of layers (paper §6.2, Figure 5).

    python -m experiments.layer_sweep [--jobs N]

The paper's best single layer is the second of 12 (id 1), and two layers (2 and 6) are better than
one, with the same number of table rows in all. So do the pairs here.
Cost: 9 configurations × 3 seeds, 10 to 20 minutes each on one core of a CPU.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from experiments.report import draw_points
from experiments.results import Results
from experiments.sweep import Arm, Experiment, Family, main

BASELINE = "no memory"


def arms(family: Family) -> Sequence[Arm]:
    """Memory in every layer alone, and in two pairs, each with half of the rows."""
    config = family("engram")
    last = config.model.layers - 1
    sites: list[tuple[int, ...]] = [(layer,) for layer in range(last + 1)]
    pairs = dict.fromkeys((1, site) for site in (1 + last // 2, last) if site > 1)
    found = [Arm(BASELINE, config.without_memory())]
    for layers in [*sites, *pairs]:
        rows = tuple(of_order // len(layers) for of_order in config.memory.rows_per_head)
        memory = replace(config.memory, layers=layers, rows_per_head=rows)
        title = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} and {layers[1]}"
        found.append(Arm(title, replace(config, memory=memory)))
    return found


def draw(results: Results, figure: Figure) -> str:
    """Loss by layer; each pair is a horizontal line."""
    axes = figure.subplots()
    singles = [label for label in results.labels() if label.startswith("layer ")]
    losses = [results.values(label, "loss", "prose") for label in singles]
    ids = np.array([int(label.removeprefix("layer ")) for label in singles])
    draw_points(axes, ids, losses, "#3b6fd4", "one layer")
    others = [label for label in results.labels() if label not in singles]
    for label, style in zip(others, (":", "--", "-."), strict=False):
        mean = results.values(label, "loss", "prose").mean()
        axes.axhline(mean, linestyle=style, color="#777", label=label)
    axes.set_xticks(ids)
    axes.set_xlabel("layer id")
    axes.set_ylabel("held-out loss, nats per token of prose")
    axes.legend(edgecolor="none")
    return ""


EXPERIMENT = Experiment("layer_sweep", arms, BASELINE, draw)

if __name__ == "__main__":
    main(EXPERIMENT)
