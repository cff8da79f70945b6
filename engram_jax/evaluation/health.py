"""Whether a memory has an effect: gates that are always open or closed, and an output too small.

A public replication of the paper failed with gates at 0.997 and an output of 0.004 to 0.012 of the
residual stream. Its memory was inert, and nobody looked.
"""

from collections import defaultdict

import numpy as np

from engram_jax.evaluation.held_out import ScoredBatch
from engram_jax.layers.engram import MemoryHealth

INERT = 0.02  # an RMS below this share of the residual stream


class HealthStudy:
    """Collects the health of the memory layers during an evaluation (as its `watch`)."""

    def __init__(self) -> None:
        self._batches: dict[int, list[MemoryHealth]] = defaultdict(list)

    def __call__(self, scored: ScoredBatch) -> None:
        """Adds a batch."""
        for layer, health in scored.health.items():
            self._batches[layer].append(health)

    def report(self) -> dict[int, dict[str, float]]:
        """Over all tokens, by layer id: "open", "closed" and "strength" of `MemoryHealth`."""
        reports = {}
        for layer, batches in self._batches.items():
            weights = [float(batch.tokens) for batch in batches]
            health = MemoryHealth(*np.average(batches, axis=0, weights=weights))
            named = {"open": health.open, "closed": health.closed, "strength": health.strength}
            reports[layer] = {name: float(value) for name, value in named.items()}
        return reports


def format_health(health: dict[int, dict[str, float]]) -> str:
    """A table with a line per memory layer, and the warnings."""
    lines = [f"{'layer':>5}  {'gates > 0.95':>12}  {'< 0.05':>6}  {'added / stream (RMS)':>20}"]
    for layer, of_layer in health.items():
        lines.append(
            f"{layer:>5}  {of_layer['open']:>12.1%}  {of_layer['closed']:>6.1%}  "
            f"{of_layer['strength']:>20.3f}"
        )
    return "\n".join([*lines, *(f"Warning: {line}" for line in warn_of_inert(health))])


def warn_of_inert(health: dict[int, dict[str, float]]) -> list[str]:
    """One sentence for every layer whose memory adds almost nothing."""
    return [
        f"The memory of layer {layer} is inert: what it adds has {of_layer['strength']:.1%} of the "
        f"RMS of the residual stream (gates above 0.95: {of_layer['open']:.0%}, below 0.05: "
        f"{of_layer['closed']:.0%}). Raise memory.adam.factor or memory.init-scale, or train for "
        "longer."
        for layer, of_layer in health.items()
        if of_layer["strength"] < INERT
    ]
