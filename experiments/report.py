"""The table and the plot of an experiment, from its results alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram_jax.errors import InputError
from engram_jax.files import atomic_write
from experiments.results import Floats, Results, standard_error, steps_of

STYLE: dict[str, Any] = {"fmt": "o", "capsize": 3, "markersize": 6}

type Draw = Callable[[Results, Figure], str]


def write_report(results: Results, path: Path, baseline: str, draw: Draw) -> None:
    """Writes table and plot beside the JSON file, from the results alone.

    Args:
        results: the results.
        path: their file.
        baseline: the label that the others are compared with.
        draw: draws the results, and returns what is to be said below the table.

    Raises:
        InputError: there are no results.
    """
    if not results.records:
        raise InputError(f"There are no results in {path}; run the experiment first.")
    figure = Figure(figsize=(8, 4.5), dpi=160, facecolor="white", layout="constrained")
    remarks = draw(results, figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
    with atomic_write(path.with_suffix(".png")) as partial:
        figure.savefig(partial, metadata={"Software": None})
    table = "\n\n".join(part for part in (results.table(baseline), remarks) if part)
    with atomic_write(path.with_suffix(".md")) as partial:
        partial.write_text(f"{table}\n", "utf-8")


def draw_differences(results: Results, figure: Figure, baseline: str) -> str:
    """A dot per label: its loss minus that of the baseline, with one standard error and all seeds.

    As an experiment's `draw`, it has nothing to add to the table.
    """
    axes = figure.subplots()
    labels = [label for label in results.labels() if label != baseline]
    for place, label in enumerate(labels):
        values = results.differences(label, baseline, "loss", "prose")
        if len(values):
            axes.plot(values, [place] * len(values), "o", color="#bbb", markersize=3.5)
            error = standard_error(values)
            axes.errorbar(values.mean(), place, xerr=error, color="#3b6fd4", **STYLE)
    axes.axvline(0, color="#222", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"held-out loss minus that of “{baseline}”, nats per token of prose")
    return ""


def time_taken(results: Results, label: str, other: str) -> str:
    """A line for below the table: the time of an arm of equal time relative to that of another."""
    speed = results.relative_speed(label)
    if speed is None or not results.of(other):
        return ""
    steps, of_other = (steps_of(results.of(each)[0]) for each in (label, other))
    return (
        f"- {label}: its {steps} steps take {steps / of_other / speed:.2f} of the time of {other}. "
        f"It trains at {speed:.3f} of its tokens/s (median, both alternately in one process)."
    )


def draw_points(
    axes: Axes,
    x: Floats,
    values: Sequence[Floats],
    color: str,
    label: str,
    errors: Sequence[float] | None = None,
) -> None:
    """Means over seeds with their errors, by default one standard error, and all seeds behind."""
    for place, of_place in zip(x, values, strict=True):
        axes.plot([place] * len(of_place), of_place, "o", color=color, alpha=0.3, markersize=3.5)
    means = [np.mean(of_place) for of_place in values]
    if errors is None:
        errors = [standard_error(of_place) for of_place in values]
    axes.errorbar(x, means, yerr=errors, color=color, label=label, **STYLE)
