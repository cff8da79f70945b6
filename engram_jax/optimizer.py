"""The optimizer of the dense parameters, and the learning rate that the tables share."""

from dataclasses import dataclass
from typing import Any

import jax
import optax

from engram_jax.errors import InputError
from engram_jax.typing import Parameters, PyTree

# Parameters that weight decay leaves alone: vectors, lookups and convolution taps.
_UNDECAYED = ("gain", "key_bias", "value_bias", "embedding", "head", "convolution")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay.

    Attributes:
        learning_rate: peak learning rate.
        warmup_steps: steps of linear warm-up.
        final_fraction: learning rate at the end, relative to the peak.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of matrices; embeddings, norms and biases have none.
        clip_norm: bound of the global gradient norm, dense and row gradients together.
    """

    learning_rate: float = 3e-3
    warmup_steps: int = 60
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise InputError("learning_rate and clip_norm must be positive.")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.eps > 0):
            raise InputError("b1 and b2 must be at least 0 and below 1, and eps positive.")
        if self.warmup_steps < 0:
            raise InputError(f"warmup_steps is {self.warmup_steps}; it must not be negative.")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of finished steps."""
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """AdamW for the dense parameters. Gradients come clipped: the clip spans the tables too."""
    return optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_is_decayed,
    )


def _is_decayed(params: Parameters) -> PyTree:
    def decays(path: tuple[Any, ...], _: jax.Array) -> bool:
        return path[-1].key not in _UNDECAYED

    return jax.tree_util.tree_map_with_path(decays, params)
