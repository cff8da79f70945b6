"""The loss of training and evaluation: the cross-entropy of every token."""

from collections.abc import Mapping

import optax
from jaxtyping import Array, Float

from engram_jax.data.packing import MicroBatch
from engram_jax.model import ExpertBias, Report
from engram_jax.program import Program
from engram_jax.typing import Parameters


def token_losses(
    program: Program,
    params: Parameters,
    rows: Mapping[int, Float[Array, "S U F"]],
    micro_batch: MicroBatch,
    expert_bias: ExpertBias,
) -> tuple[Float[Array, "B T"], Report]:
    """Cross-entropy of every token in nats, and diagnostics of the blocks.

    Args:
        program: the program.
        params: the dense parameters.
        rows: each device's distinct rows by layer id; a layer that is missing adds nothing.
        micro_batch: tokens, and the slots of their rows.
        expert_bias: biases that balance the experts, by layer id.
    """
    logits, report = program.forward(params, rows, micro_batch, expert_bias)
    targets = micro_batch.batch.targets
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets), report
