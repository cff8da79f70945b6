"""The optimizer of the dense parameters, and the learning-rate schedule, also used for tables."""

import operator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from engram_jax.errors import InputError
from engram_jax.muon import scale_by_muon
from engram_jax.parameters import Connection, Matrix, Plain, VocabularyMatrix
from engram_jax.typing import PyTree


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, and the learning rate.

    Attributes:
        matrices: optimizer of hidden matrices. All other parameters use AdamW. Muon's updates are
            scaled to the size of AdamW's, so that both can use the same learning rate.
        learning_rate: peak learning rate.
        matrix_factor: learning rate of hidden matrices, relative to learning_rate.
        lookup_factor: learning rate of embedding and head, relative to learning_rate.
        connection_factor: learning rate of hyper-connections, relative to learning_rate. If it is
            too large, H_res is no longer doubly stochastic (see `mixing_error` in the metrics).
        warmup_steps: steps of linear warm-up.
        decay: "cosine" from the peak to the end; "steps" keeps the peak, then multiplies it by
            0.316 after 80 % of the steps and by 0.1 after 90 % (DeepSeek LLM, arXiv 2401.02954).
        final_fraction: learning rate at the end of the cosine, relative to learning_rate.
        b1: AdamW's decay of the first moment.
        b2: AdamW's decay of the second moment.
        eps: added by AdamW to the root of the second moment.
        muon_momentum: decay of Muon's Nesterov momentum.
        muon_steps: Newton–Schulz iterations of Muon.
        weight_decay: decoupled weight decay of hidden matrices; embeddings, norms, biases, routers
            of experts and projections of hyper-connections have none.
        clip_norm: largest global gradient norm, over dense and row gradients.
        z_loss: weight of the mean of (log Σ exp(logits))² in what is minimized, such as 1e-4. It
            keeps the logits from drifting in long runs. Losses are reported without it.
    """

    matrices: Literal["adam", "muon"] = "adam"
    learning_rate: float = 3e-3
    matrix_factor: float = 1.0
    lookup_factor: float = 1.0
    connection_factor: float = 1.0
    warmup_steps: int = 60
    decay: Literal["cosine", "steps"] = "cosine"
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    muon_momentum: float = 0.95
    muon_steps: int = 5
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        factors = (self.matrix_factor, self.lookup_factor, self.connection_factor)
        if min(self.learning_rate, *factors, self.clip_norm) <= 0:
            raise InputError(
                "learning_rate, its factors (matrix_factor, lookup_factor, connection_factor) and "
                "clip_norm must be positive."
            )
        if min(self.weight_decay, self.z_loss) < 0 or not 0 <= self.final_fraction <= 1:
            raise InputError(
                "weight_decay and z_loss must not be negative, and final_fraction must be from 0 "
                "to 1."
            )
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.eps > 0):
            raise InputError("b1 and b2 must be at least 0 and below 1, and eps positive.")
        if self.warmup_steps < 0:
            raise InputError(f"warmup_steps is {self.warmup_steps}; it must be 0 or more.")
        if not 0 <= self.muon_momentum < 1:
            raise InputError(
                f"muon_momentum is {self.muon_momentum}; it must be at least 0 and below 1."
            )
        if self.muon_steps < 1:
            raise InputError(f"muon_steps is {self.muon_steps}; it must be at least 1.")


@lru_cache(maxsize=16)  # equal schedules are one function, which is compiled once
def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of finished steps."""
    if config.decay == "steps":
        return _step_schedule(config, steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, roles: PyTree
) -> optax.GradientTransformation:
    """The optimizer of the dense parameters, without clipping.

    The caller clips gradients, because the clipped norm includes the gradients of table rows.

    Args:
        config: hyperparameters.
        schedule: learning rate by the number of finished steps.
        roles: the role of every parameter, in the parameters' tree (see `parameters.roles`).
    """
    is_matrix = jax.tree.map(lambda role: isinstance(role, Matrix), roles)
    if config.matrices == "adam":
        adamw = optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=is_matrix,
        )
        return _with_factors(adamw, config, roles)
    # `optax.partition` replaces the parameters of other optimizers by MaskedNode, too.
    matrices = jax.tree.map(
        lambda role: role if isinstance(role, Matrix) else optax.MaskedNode(), roles
    )
    muon = optax.chain(
        scale_by_muon(matrices, momentum=config.muon_momentum, steps=config.muon_steps),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    adam = optax.adam(schedule, b1=config.b1, b2=config.b2, eps=config.eps)
    labels = jax.tree.map(lambda matrix: "muon" if matrix else "adam", is_matrix)
    return _with_factors(optax.partition({"muon": muon, "adam": adam}, labels), config, roles)


def _with_factors(
    optimizer: optax.GradientTransformation, config: OptimizerConfig, roles: PyTree
) -> optax.GradientTransformation:
    """Multiplies updates, including weight decay, by the learning-rate factor of their role."""
    factor_of = {
        Matrix: config.matrix_factor,
        VocabularyMatrix: config.lookup_factor,
        Connection: config.connection_factor,
        Plain: 1.0,
    }
    factors = jax.tree.map(lambda role: factor_of[type(role)], roles)

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        updates, state = optimizer.update(updates, state, params)
        return jax.tree.map(operator.mul, updates, factors), state

    return optax.GradientTransformation(optimizer.init, update)


def _step_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    def schedule(done: ArrayLike) -> jax.Array:
        done = jnp.asarray(done)
        warm = jnp.minimum(1.0, (done + 1) / (config.warmup_steps + 1))
        # Compared as integers, because the rounded value of 0.9 · steps could shift the decay by
        # one step.
        decayed = jnp.where(10 * done >= 9 * steps, 0.1, jnp.where(5 * done >= 4 * steps, 0.316, 1))
        return config.learning_rate * warm * decayed

    return schedule
