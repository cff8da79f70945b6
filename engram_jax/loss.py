"""The losses of tokens, for training and evaluation."""

from collections.abc import Mapping

from jaxtyping import Array, Float

from engram_jax.data.packing import MicroBatch
from engram_jax.layers.cross_entropy import TokenLosses, cross_entropy
from engram_jax.model import ExpertBias, Report
from engram_jax.program import Program
from engram_jax.typing import Parameters


def token_losses(
    program: Program,
    params: Parameters,
    rows: Mapping[int, Float[Array, "S U F"]],
    micro_batch: MicroBatch,
    expert_bias: ExpertBias,
) -> tuple[TokenLosses, Report]:
    """The losses of every token, and diagnostics of the blocks.

    Args:
        program: the program.
        params: the dense parameters.
        rows: each device's distinct rows by layer id; a layer that is missing adds nothing.
        micro_batch: tokens, and the slots of their rows.
        expert_bias: biases that balance the experts, by layer id.
    """
    hidden, head, report = program.forward(params, rows, micro_batch, expert_bias)
    return cross_entropy(hidden, head, micro_batch.batch.targets), report
