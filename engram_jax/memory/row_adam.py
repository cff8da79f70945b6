"""Adam on the rows of a step, without visiting other rows.

*Exact* row Adam has the same result as dense Adam. When a row is read after idle steps, it first
receives the momentum updates that it missed (its *pending update*, see `memory/momentum_tail.py`),
and its moments decay by the same number of steps. *Lazy* row Adam skips both: moments and update
count of a row change only in steps that read it. These are different optimizers. For example, a
single late gradient moves a row by 32 learning rates in total under exact Adam (0.9, 0.999), and by
one under lazy Adam.

Both work on rows that the caller has gathered from a table, and will scatter back.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from engram_jax.errors import InputError
from engram_jax.memory.layout import RowState
from engram_jax.memory.momentum_tail import MomentumTail, make_momentum_tail

type Schedule = Callable[[Array], Array]  # learning rate by the number of finished steps
type RowAdamForm = Literal["exact", "lazy"]


@dataclass(frozen=True)
class RowAdamConfig:
    """The row optimizer; rows have no weight decay.

    Attributes:
        form: "exact" has the same result as dense Adam; "lazy" does not change idle rows.
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
        if self.factor <= 0:
            raise InputError(f"memory.adam.factor is {self.factor}; it must be positive.")
        if self.form == "exact" and not self.b1**2 < self.b2:
            raise InputError(
                f"Exact row Adam needs b1² < b2, or idle rows never stop moving; b1 is {self.b1} "
                f"and b2 is {self.b2}. Change them, or set memory.adam.form to lazy."
            )


# A smaller ε has no effect, because the root of a nonzero float32 number is above 1e-19. With this
# ε, the product of two denominators is still a normal number.
_LEAST_EPS = 1e-18
# Minimum size of the arrays by step, a power of two.
_LEAST_ENTRIES = 1024


@no_type_check  # no checks at run time: as a pytree it may also hold shapes or shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowAdam:
    """A row optimizer. Create it with `make_row_adam`, and pass it to jitted functions.

    In its methods, `step` is the number of finished optimizer steps.

    Attributes:
        rates: the model's learning rate by the number of finished steps, 0 … steps. The arrays of
            `rates` and `tail` are filled up to a power of two with their last entry, so that
            programs with a similar number of steps have equal shapes.
        tail: the sums of momentum updates of idle rows, by the step that last wrote them; None for
            lazy Adam.
        config: hyperparameters.
    """

    rates: Float32[Any, "steps"]
    tail: MomentumTail | None
    config: RowAdamConfig = field(metadata={"static": True})

    def learning_rate(self, step: Int32[Array, ""]) -> Float[Array, ""]:
        """The model's learning rate for step `step` + 1, without `config.factor`."""
        return jnp.asarray(self.rates).at[step].get(mode="clip")

    def apply_pending(
        self,
        rows: RowState,
        step: Int32[Array, ""],
        current: Float[Array, "U F"] | None = None,
    ) -> RowState:
        """Applies pending updates: returns the rows that dense Adam has after `step` steps.

        The result has no pending updates. In real arithmetic, all later rows are the same as
        without this call, but not bit for bit. Lazy Adam has no pending updates.

        Args:
            rows: the stored rows.
            step: number of finished optimizer steps.
            current: the embeddings with pending updates applied, if they are already computed.
        """
        if self.tail is None:
            return rows
        idle = (step - rows.clock).astype(jnp.float32)
        mean_decay = _power(self.config.b1, idle)
        root_decay = _power(math.sqrt(self.config.b2), idle)
        if current is None:
            rule = self._pending_rule(rows.clock, step, mean_decay, root_decay)
            # Without the barrier, XLA would compute this again for every use, and fuse it, and so
            # round it, differently on different meshes.
            current = jax.lax.optimization_barrier(rows.value + self._pending_update(rows, rule))
        return RowState(
            value=current,
            mean=rows.mean * mean_decay[:, None],
            square=rows.square * (root_decay * root_decay)[:, None],
            clock=jnp.where(rows.clock > 0, step, 0),
        )

    def current(self, rows: RowState, step: Int32[Array, ""]) -> Float[Array, "U F"]:
        """The embeddings that the forward pass of step `step` + 1 reads."""
        return self.apply_pending(rows, step).value

    def apply_gradient(
        self, rows: RowState, gradient: Float[Array, "U F"], step: Int32[Array, ""]
    ) -> RowState:
        """The rows, moments and clocks after step `step` + 1.

        Args:
            rows: the rows without pending updates (see `apply_pending`).
            gradient: one gradient per row, summed over its occurrences.
            step: number of optimizer steps before this one.
        """
        config = self.config
        if self.tail is None:
            clock = updates = rows.clock + 1
        else:
            clock, updates = jnp.full_like(rows.clock, step + 1), jnp.reshape(step + 1, (1,))
        gradient_square = gradient**2
        if rows.square.shape != gradient.shape:  # one second moment per row
            gradient_square = jnp.mean(gradient_square, axis=1, keepdims=True)
        mean = config.b1 * rows.mean + (1 - config.b1) * gradient
        square = config.b2 * rows.square + (1 - config.b2) * gradient_square
        rate = config.factor * self.learning_rate(step)
        # Bias corrections are scalars, or one per row. Applied here, they leave only one division
        # per element.
        rate = rate / _bias_correction(config.b1, updates)
        root = 1 / jnp.sqrt(_bias_correction(config.b2, updates))
        movement = rate[:, None] * mean / (root[:, None] * jnp.sqrt(square) + config.eps)
        return RowState(value=rows.value - movement, mean=mean, square=square, clock=clock)

    def update(
        self,
        rows: RowState,
        gradient: Float[Array, "U F"],
        step: Int32[Array, ""],
        current: Float[Array, "U F"] | None = None,
    ) -> RowState:
        """Applies pending updates and a gradient to stored rows.

        Args:
            rows: the stored rows.
            gradient: one gradient per row, summed over its occurrences.
            step: number of optimizer steps before this one.
            current: result of `current` for these rows; None: it is computed.
        """
        return self.apply_gradient(self.apply_pending(rows, step, current), gradient, step)

    def _pending_rule(
        self,
        clock: Int32[Array, "U"],
        step: Int32[Array, ""],
        mean_decay: Float[Array, "U"],
        root_decay: Float[Array, "U"],
    ) -> "_PendingRule":
        """The coefficients of pending updates, given β₁ᵏ and √β₂ᵏ for k idle steps."""
        assert self.tail is not None
        tail = [jnp.asarray(part) for part in self.tail]
        node, a = (part.at[clock].get(mode="clip") for part in tail)
        later_node, later_a = (part.at[step[None]].get(mode="clip") for part in tail)
        later_node = root_decay[:, None] * later_node
        factor = self.config.factor
        a, later_a = -factor * a, mean_decay[:, None] * (-factor * later_a)
        rule = _PendingRule(
            node=node,
            later_node=later_node,
            slope=(a - later_a) * later_node + later_a * (later_node - node),
            offset=(a - later_a) * self._eps,
        )
        # Without the barrier, XLA computes these again for every element of a row.
        return jax.lax.optimization_barrier(rule)

    def _pending_update(self, rows: RowState, rule: "_PendingRule") -> Float[Array, "U F"]:
        """The sum of the momentum updates that idle rows missed."""
        root = jnp.sqrt(rows.square)

        def term(j: int) -> Float[Array, "U #F"]:
            node, later_node, slope, offset = (part[:, j, None] for part in rule)
            numerator = slope * root + offset
            return numerator / ((node * root + self._eps) * (later_node * root + self._eps))

        terms = [term(j) for j in range(rule.node.shape[1])]
        return rows.mean * sum(terms[1:], terms[0])

    @property
    def _eps(self) -> float:
        return max(self.config.eps, _LEAST_EPS)


class _PendingRule(NamedTuple):
    """Coefficients of the pending update of a row with moments m and v, for every node.

    The tail after the last write has the terms m a/(b √v + ε). The tail after k idle steps has the
    terms m a′/(b′ √v + ε), where a′ and b′ include the decay of the moments. Their difference is
    m (slope √v + offset) / ((b √v + ε) (b′ √v + ε)). Without idle steps it is exactly 0.

    Attributes:
        node: b.
        later_node: b′.
        slope: (a − a′) b′ + a′ (b′ − b).
        offset: (a − a′) ε.
    """

    node: Float[Array, "U nodes"]
    later_node: Float[Array, "U nodes"]
    slope: Float[Array, "U nodes"]
    offset: Float[Array, "U nodes"]


@partial(jax.jit, static_argnums=0)
def _rates(schedule: Schedule, done: Int32[Array, "steps"]) -> Float[Array, "steps"]:
    return jax.vmap(schedule)(done)


def make_row_adam(config: RowAdamConfig, schedule: Schedule, steps: int) -> RowAdam:
    """Creates the row optimizer of a run, with NumPy arrays.

    Args:
        config: hyperparameters.
        schedule: the model's learning rate by the number of finished steps.
        steps: number of steps of the run.

    Raises:
        InputError: with exact Adam, the momentum of idle rows decays too slowly.
    """

    def rates(done: np.ndarray) -> np.ndarray:
        with jax.set_mesh(None):  # the mesh may be of a TPU slice without devices
            return np.asarray(_rates(schedule, done))

    by_step, tail = None, None
    if config.form == "exact":
        by_step = make_momentum_tail(rates, steps, config.b1, config.b2)
    entries = max(_LEAST_ENTRIES, 1 << steps.bit_length())
    steps_or_last = np.minimum(np.arange(entries, dtype=np.int32), np.int32(steps))
    if by_step is not None:
        tail = MomentumTail(*(part[steps_or_last] for part in by_step))
    return RowAdam(rates(steps_or_last).astype(np.float32), tail, config)


def _power(base: float, exponent: Float[Array, "U"]) -> Float[Array, "U"]:
    return jnp.exp(exponent * math.log(base)) if base else (exponent == 0).astype(jnp.float32)


def _bias_correction(decay: float, count: Int32[Array, "n"]) -> Float[Array, "n"]:
    """1 − decay^count, with expm1, because 1 − 0.999 in float32 has a relative error of 1e-5."""
    if decay == 0:
        return jnp.ones(count.shape)
    return -jnp.expm1(count * math.log(decay))
