"""The memory law: loss against table rows, with a fixed backbone (paper §3.2, Figure 3 right).

    python -m experiments.memory_law [--jobs N]

The backbones are those of `engram_2m` and `over_encoding_2m`. They activate the same number of
parameters: OverEncoding has fewer that read the memory, and a wider dense layer instead. Only the
number of table rows changes, over two decades. The paper finds that the loss falls linearly with
log(rows), and that OverEncoding gains less.
Cost: 33 runs, 10 to 20 minutes each on one core of a CPU.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from configs.small import Kind
from experiments.report import draw_points
from experiments.results import Floats, Results, mean_and_error
from experiments.sweep import Arm, Experiment, Family, main

FACTORS = (0.1, 0.32, 1, 3.2, 10)  # rows of a head, relative to those of `engram_2m`, 9,216
KINDS: dict[Kind, str] = {"engram": "Engram", "over_encoding": "OverEncoding"}
BASELINE = "no memory"


def arms(family: Family) -> Sequence[Arm]:
    """Engram's backbone without memory, and with tables of every size."""
    config = family("engram")
    found = [Arm(BASELINE, config.without_memory())]
    for factor in FACTORS:
        rows = tuple(round(factor * of_order) for of_order in config.memory.rows_per_head)
        for kind, title in KINDS.items():
            of_kind = family(kind)
            memory = replace(of_kind.memory, rows_per_head=rows)
            found.append(Arm(f"{title}, rows × {factor}", replace(of_kind, memory=memory)))
    return found


def draw(results: Results, figure: Figure) -> str:
    """Loss against the rows of all heads, with a line for each kind; returns the lines' slopes."""
    axes, remarks = figure.subplots(), []
    baseline = [label for label in results.labels() if label == BASELINE]
    for title, color in zip(KINDS.values(), ("#3b6fd4", "#f4544a"), strict=True):
        labels = [label for label in results.labels() if label.startswith(title)]
        if not labels:
            continue
        rows = np.array([results.of(label)[0]["account"]["rows"] for label in labels])
        losses = results.paired([*labels, *baseline], "loss", "prose")  # seeds that have all
        draw_points(axes, rows, list(losses[: len(labels)]), color, title)
        line = fit_line(rows, losses[: len(labels)])
        if line is None:
            continue
        axes.plot(rows, line.means, "--", color=color, linewidth=1)
        seeds = len(line.slopes)
        remarks.append(
            f"- {title}: {mean_and_error(line.slopes, '+')} nats per decade of rows "
            f"({f'mean ± standard error over {seeds} seeds' if seeds > 1 else 'one seed'}), R² "
            f"{line.r_squared:.3f}."
        )
    axes.set_xscale("log")
    axes.set_xlabel("table rows, all heads")
    axes.set_ylabel("held-out loss, nats per token of prose")
    others = [label for label in results.labels() if label != BASELINE]
    if baseline and (without := results.paired([BASELINE, *others], "loss", "prose")[0]).size:
        axes.axhline(np.mean(without), color="#777", linestyle=":", label=BASELINE)
    axes.legend(frameon=False)
    return "\n".join(remarks)


class Line(NamedTuple):
    """A line through the losses, fitted by least squares against log10(rows).

    Attributes:
        slopes: of each seed's own line, in nats per decade.
        means: the line through the means over seeds, at the same rows.
        r_squared: of that line.
    """

    slopes: Floats
    means: Float[np.ndarray, "sizes"]
    r_squared: float


def fit_line(
    rows: Float[np.ndarray, "sizes"], losses: Float[np.ndarray, "sizes seeds"]
) -> Line | None:
    """The line through losses of the same seeds at all sizes; None: fewer than three sizes."""
    if len(rows) < 3 or not losses.size:
        return None
    x, means = np.log10(rows), losses.mean(axis=1)
    fitted = np.polyval(np.polyfit(x, means, 1), x)
    r_squared = 1 - np.sum((means - fitted) ** 2) / np.sum((means - means.mean()) ** 2)
    return Line(np.polyfit(x, losses, 1)[0], fitted, float(r_squared))


EXPERIMENT = Experiment("memory_law", arms, BASELINE, draw)

if __name__ == "__main__":
    main(EXPERIMENT)
