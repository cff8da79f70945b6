"""Adam on the rows that a step touched, and on no other.

*Exact* row Adam gives dense Adam's answer: a row that is read is first moved as far as dense Adam
would have moved it while it lay idle (`memory/drift.py`), and its moments decay as long. *Lazy* row
Adam lets idle rows lie: moments and the update count change only when the row is touched. The two
are different optimizers: one late gradient moves a row by 32 learning rates in all under exact Adam
(0.9, 0.999) and by one under lazy Adam.

Both work on rows that were gathered from a table and are scattered back by the caller. Reading
(`current`) writes nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from engram_jax.errors import InputError
from engram_jax.memory.drift import Drift, make_drift
from engram_jax.memory.layout import RowState

type Schedule = Callable[[Array], Array]  # learning rate by the number of finished steps
type RowAdamForm = Literal["exact", "lazy"]


@dataclass(frozen=True)
class RowAdamConfig:
    """The row optimizer; rows have no weight decay.

    Attributes:
        form: "exact" gives dense Adam's answer; "lazy" lets idle rows lie.
        factor: learning rate relative to optimizer.learning_rate (paper: 5).
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
    """

    form: RowAdamForm = "exact"
    factor: float = 5.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.eps > 0):
            raise InputError("b1 and b2 must be at least 0 and below 1, and eps positive.")
        if self.form == "exact" and not self.b1**2 < self.b2:
            raise InputError(
                f"Exact row Adam needs b1² < b2, or idle rows never come to rest; they are "
                f"{self.b1} and {self.b2}. Change them, or take memory.adam.form lazy."
            )


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowAdam:
    """A row optimizer; make one with `make_row_adam`.

    Its functions take rows that were gathered from a table, and `step`, the number of optimizer
    steps done.

    Attributes:
        config: hyperparameters.
        schedule: the network's learning rate by the number of finished steps.
        drift: how idle rows move, by the step that last wrote them; None for lazy Adam.
    """

    config: RowAdamConfig = field(metadata={"static": True})
    schedule: Schedule = field(metadata={"static": True})
    drift: Drift | None

    def loaded(self, step: Int32[Array, ""]) -> "RowAdam":
        """The same, for use in a loop: its drift is made where this is called.

        The TPU compiler fails to gather from large constants, which the drift of many steps is.
        """
        if self.drift is None:
            return self
        one = jnp.where(step >= 0, jnp.float32(1), 0)  # as the compiler cannot know
        return replace(self, drift=jax.tree.map(lambda part: part * one, self.drift))

    def current(self, gathered: RowState, step: Int32[Array, ""]) -> Float[Array, "U F"]:
        """The rows as the forward pass of step `step` + 1 reads them."""
        if self.drift is None:
            return gathered.value
        # Barriers here and below keep XLA from fusing this differently, hence rounding it
        # differently, in programs of different meshes.
        return jax.lax.optimization_barrier(gathered.value + self._owed(gathered, step))

    def settled(self, gathered: RowState, step: Int32[Array, ""]) -> RowState:
        """The rows with nothing owed up to step `step`; they go on from there as they would have.

        Exactly so in real numbers, not bit for bit: a run that settled is another run.
        """
        if self.drift is None:
            return gathered
        value, (mean, square) = self.current(gathered, step), self._decayed(gathered, step)
        return RowState(value, mean, square, jnp.where(gathered.clock > 0, step, 0))

    def update(
        self, gathered: RowState, gradient: Float[Array, "U F"], step: Int32[Array, ""]
    ) -> RowState:
        """The rows, moments and clocks after step `step` + 1.

        Args:
            gathered: the rows as they are stored, not `current`.
            gradient: one gradient per row, summed over its uses.
            step: optimizer steps done before this one.
        """
        config = self.config
        value, mean, square = self.current(gathered, step), gathered.mean, gathered.square
        if self.drift is None:
            clock = corrections = gathered.clock + 1
        else:
            mean, square = self._decayed(gathered, step)
            clock = jnp.full_like(gathered.clock, step + 1)
            corrections = step + 1
        mean = config.b1 * mean + (1 - config.b1) * gradient
        gradient_square = gradient**2
        if square.shape != gradient.shape:  # one for the row
            gradient_square = jnp.mean(gradient_square, axis=1, keepdims=True)
        square = config.b2 * square + (1 - config.b2) * gradient_square
        corrected_mean = _correct_bias(mean, config.b1, corrections)
        corrected_square = _correct_bias(square, config.b2, corrections)
        movement = corrected_mean / (jnp.sqrt(corrected_square) + config.eps)
        return RowState(
            value=value - config.factor * self.schedule(step) * movement,
            mean=mean,
            square=square,
            clock=clock,
        )

    def _owed(self, gathered: RowState, step: Int32[Array, ""]) -> Float[Array, "U F"]:
        """How far dense Adam moved every row since it was last written, up to step `step`.

        The whole drift from the last write on, less what is left of it at `step`.
        """
        assert self.drift is not None
        mean, square = self._decayed(gathered, step)
        left = self._whole_drift(mean, square, jnp.reshape(step, (1,)))
        return self._whole_drift(gathered.mean, gathered.square, gathered.clock) - left

    def _whole_drift(
        self, mean: Float[Array, "U F"], square: Float[Array, "U #F"], last: Int32[Array, "#U"]
    ) -> Float[Array, "U F"]:
        """How far rows with these moments after step `last` will move if they are left alone."""
        assert self.drift is not None

        nodes, weights = jax.lax.optimization_barrier(
            tuple(jnp.asarray(part).at[last].get(mode="clip") for part in self.drift)
        )
        root = jnp.sqrt(square)
        total = sum(
            weights[:, j, None] / (nodes[:, j, None] * root + self.config.eps)
            for j in range(nodes.shape[1])
        )
        return -self.config.factor * mean * total

    def _decayed(
        self, gathered: RowState, step: Int32[Array, ""]
    ) -> tuple[Float[Array, "U F"], Float[Array, "U #F"]]:
        """The moments at `step`, after the steps without a gradient."""
        idle = (step - gathered.clock).astype(jnp.float32)[:, None]

        def decay(moment: Float[Array, "U _"], factor: float) -> Float[Array, "U _"]:
            return moment * (jnp.exp(idle * math.log(factor)) if factor else idle == 0)

        return jax.lax.optimization_barrier(
            (decay(gathered.mean, self.config.b1), decay(gathered.square, self.config.b2))
        )


def make_row_adam(config: RowAdamConfig, schedule: Schedule, steps: int) -> RowAdam:
    """The row optimizer of a run.

    Args:
        config: hyperparameters.
        schedule: the network's learning rate by the number of finished steps.
        steps: steps of the run.

    Raises:
        InputError: exact Adam's idle rows would come to rest too slowly.
    """
    if config.form == "lazy":
        return RowAdam(config, schedule, None)
    rates = jax.jit(jax.vmap(schedule))
    drift = make_drift(lambda done: np.asarray(rates(done)), steps, config.b1, config.b2)
    return RowAdam(config, schedule, drift)


def _correct_bias(
    moment: Float[Array, "U _"], decay: float, count: Int32[Array, "#U"] | Int32[Array, ""]
) -> Float[Array, "U _"]:
    """moment / (1 − decay^count); expm1, as 1 − 0.999 in float32 is off by 1e-5 of itself."""
    if decay == 0:
        return moment
    return moment / -jnp.expm1(jnp.reshape(count, (-1, 1)) * math.log(decay))
