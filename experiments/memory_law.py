"""The memory law: loss against table rows, with a fixed backbone (paper §3.2, Figure 3 right).

    python -m experiments.memory_law [--jobs N]

The backbone is that of `engram_2m`. Only the number of table rows changes, over two decades. The
paper finds that the loss falls linearly with log(rows), and that OverEncoding gains less.
Cost: 33 runs of five minutes on two CPU cores.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from configs.small import Kind
from experiments.report import draw_points
from experiments.results import Results, mean_and_error
from experiments.settings import without_memory
from experiments.sweep import Arm, Experiment, Family, main

FACTORS = (0.1, 0.32, 1, 3.2, 10)  # rows of a head, relative to those of `engram_2m`, 9,216
KINDS: dict[Kind, str] = {"engram": "Engram", "over_encoding": "OverEncoding"}
BASELINE = "no memory"


def arms(family: Family) -> Sequence[Arm]:
    """The backbone without memory, and with tables of every size."""
    config = family("engram")
    found = [Arm(BASELINE, without_memory(config))]
    for factor in FACTORS:
        rows = tuple(round(factor * of_order) for of_order in config.memory.rows_per_head)
        for kind, title in KINDS.items():
            memory = replace(family(kind).memory, rows_per_head=rows)
            found.append(Arm(f"{title}, rows × {factor}", replace(config, memory=memory)))
    return found


def draw(results: Results, figure: Figure) -> str:
    """Loss against the rows of all heads, with a line for each kind; returns the lines' slopes."""
    axes, remarks = figure.subplots(), []
    for title, color in zip(KINDS.values(), ("#3b6fd4", "#f4544a"), strict=True):
        labels = [label for label in results.labels() if label.startswith(title)]
        if not labels:
            continue
        rows = np.array([results.of(label)[0]["account"]["rows"] for label in labels])
        losses = [results.values(label, "loss", "prose") for label in labels]
        draw_points(axes, rows, losses, color, title)
        seeds = min(map(len, losses), default=0)
        if len(labels) < 3 or not seeds:
            continue
        x = np.log10(rows)
        by_seed = np.stack([of[:seeds] for of in losses])
        slopes = np.polyfit(x, by_seed, 1)[0]
        means = np.array([of.mean() for of in losses])
        line = np.poly1d(np.polyfit(x, means, 1))
        r_squared = 1 - np.sum((means - line(x)) ** 2) / np.sum((means - means.mean()) ** 2)
        axes.plot(rows, line(x), "--", color=color, linewidth=1)
        remarks.append(
            f"- {title}: {mean_and_error(slopes, '+')} nats per decade of rows (mean ± standard "
            f"error over {seeds} seeds), R² {r_squared:.3f}."
        )
    axes.set_xscale("log")
    axes.set_xlabel("table rows, all heads")
    axes.set_ylabel("held-out loss, nats per token of prose")
    if without := list(results.values(BASELINE, "loss", "prose")):
        axes.axhline(np.mean(without), color="#777", linestyle=":", label=BASELINE)
    axes.legend(frameon=False)
    return "\n".join(remarks)


EXPERIMENT = Experiment("memory_law", arms, BASELINE, draw)

if __name__ == "__main__":
    main(EXPERIMENT)
