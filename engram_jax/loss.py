"""What training minimizes and evaluation reports: the cross-entropy of every token."""

from collections.abc import Mapping
from typing import Any

import optax
from flax import nnx
from jaxtyping import Array, Float

from engram_jax.data.packing import Batch
from engram_jax.memory import lookup
from engram_jax.memory.plan import LayerPlan
from engram_jax.model import Gates
from engram_jax.typing import Parameters


def token_losses(
    graph: Any,
    params: Parameters,
    gathered: Mapping[int, Float[Array, "U F"]],
    layers: Mapping[int, LayerPlan],
    batch: Batch,
) -> tuple[Float[Array, "B T"], Gates]:
    """Cross-entropy of every token in nats, and the gates of the Engram layers.

    Args:
        graph: the decoder without its parameters.
        params: the parameters.
        gathered: the distinct rows by layer id; a layer that is missing adds nothing.
        layers: the layers' part of the memory plan.
        batch: one micro-batch; its plan is the tokens' part of the memory plan.
    """
    memory = {
        layer: lookup.expand(rows, layers[layer], batch.plan) for layer, rows in gathered.items()
    }
    decoder = nnx.merge(graph, params)
    logits, gates = decoder(batch.tokens, memory, batch.segments, batch.positions)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets), gates
