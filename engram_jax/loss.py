"""What training minimizes and evaluation reports: the cross-entropy of every token."""

from collections.abc import Mapping
from typing import Any

import optax
from flax import nnx
from jaxtyping import Array, Float

from engram_jax.data.packing import Batch
from engram_jax.memory import lookup
from engram_jax.memory.plan import SlotPlan
from engram_jax.model import ExpertBias, Report
from engram_jax.typing import Parameters
from pallas_kernels.hashed_gather import GatherImplementation


def token_losses(
    graph: Any,
    params: Parameters,
    rows: Mapping[int, Float[Array, "S U F"]],
    slots: Mapping[int, SlotPlan],
    batch: Batch,
    expert_bias: ExpertBias,
    gather: GatherImplementation | None = None,
) -> tuple[Float[Array, "B T"], Report]:
    """Cross-entropy of every token in nats, and what the blocks say of themselves.

    Args:
        graph: the decoder without its parameters.
        params: the parameters.
        rows: the devices' distinct rows by layer id; a layer that is missing adds nothing.
        slots: how the micro-batch's tokens find them.
        batch: one micro-batch; its plan is not used.
        expert_bias: what balances the experts, by layer id.
        gather: implementation that spreads the rows to tokens; None is "xla".
    """
    memory = {
        layer: lookup.expand(of_layer, slots[layer], gather) for layer, of_layer in rows.items()
    }
    decoder = nnx.merge(graph, params)
    logits, report = decoder(batch.tokens, memory, batch.segments, batch.positions, expert_bias)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets), report
