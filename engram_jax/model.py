"""The decoder: a readable stack of layers that takes its memory as an argument."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from engram_jax.errors import InputError
from engram_jax.layers.attention import Attention, AttentionConfig
from engram_jax.layers.engram import Engram, EngramConfig
from engram_jax.layers.feed_forward import FeedForward
from engram_jax.layers.norms import RMSNorm
from engram_jax.layers.over_encoding import OverEncoding
from engram_jax.sharding import extend_spec, gather_parameters

type Memory = Mapping[int, Float[Array, "B T E"]]  # by layer id
type Gates = dict[int, Float[Array, "B T M"]]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder.

    Attributes:
        vocabulary: token ids V.
        width: model width D.
        layers: number of blocks.
        attention: sizes of the attention layers.
        feed_forward: inner width W of the feed-forward layers.
        engram: form of the Engram layers.
        tie_embeddings: the output head is the input embedding.
        norm_epsilon: epsilon of the block norms.
        dtype: dtype of the computation; parameters are float32.
        remat: recompute each block in the backward pass instead of storing its activations.
    """

    vocabulary: int = 8192
    width: int = 192
    layers: int = 4
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    feed_forward: int = 512
    engram: EngramConfig = field(default_factory=EngramConfig)
    tie_embeddings: bool = True
    norm_epsilon: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        if min(self.vocabulary, self.width, self.layers, self.feed_forward) < 1:
            raise InputError("model.vocabulary, width, layers and feed_forward must be at least 1.")


@dataclass(frozen=True)
class MemorySites:
    """Where a decoder reads memory, and how much.

    Attributes:
        layers: zero-based ids of the blocks that begin with an Engram layer.
        over_encoding: memory 0 is averaged into the input embedding instead.
        width: memory width E.
        orders: n-gram orders N−1 in it.
    """

    layers: tuple[int, ...] = ()
    over_encoding: bool = False
    width: int = 0
    orders: int = 0


class Block(nnx.Module):
    """Engram, if the block has one; attention; feed-forward: each added to the residual stream.

    Args:
        config: sizes.
        memory_width: memory width E; None: a block without Engram.
        rngs: random streams.
    """

    def __init__(self, config: DecoderConfig, memory_width: int | None, *, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(config.dtype)
        # Parts draw from streams of their own, so that a twin without Engram starts equal.
        self.attention_norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.attention = Attention(config.width, config.attention, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.feed_forward = FeedForward(config.width, config.feed_forward, dtype=dtype, rngs=rngs)
        if memory_width is not None:
            memory_rngs = nnx.Rngs(params=rngs.memory())
            self.engram = Engram(
                config.width, memory_width, config.engram, dtype=dtype, rngs=memory_rngs
            )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segments: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        memory: Float[Array, "B T E"] | None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T M"] | None]:
        """The new residual stream and Engram's gates; without memory, Engram adds nothing."""
        gate = None
        if memory is not None:
            fused, gate = self.engram(x[:, :, None], memory, segments)
            x += fused[:, :, 0]
        x += self.attention(self.attention_norm(x), segments, positions)
        x += self.feed_forward(self.feed_forward_norm(x))
        return x, gate


def run_block(
    block: Block,
    x: Float[Array, "B T D"],
    segments: Int32[Array, "B T"],
    positions: Int32[Array, "B T"],
    memory: Float[Array, "B T E"] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T M"] | None]:
    """Runs a block on parameters gathered here: remat gathers again instead of keeping them."""
    return gather_parameters(block)(x, segments, positions, memory)


class Decoder(nnx.Module):
    """A pre-norm decoder with memory.

    At the start attention and feed-forward add nothing, since their last matrices are zero, and the
    embedding enters times √D: with random last matrices and a plain embedding, the token itself
    drowns in what the blocks add (0.45 nats more after 400 steps of the dense twin;
    docs/experiments.md, 2026-11-24).

    Args:
        config: sizes.
        sites: where memory enters.
        rngs: random streams "params" and "memory"; what reads memory draws from the latter, so
            that models with and without memory start from equal backbones.
    """

    def __init__(self, config: DecoderConfig, sites: MemorySites, *, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(0.02)
        self.embedding = nnx.Param(init(rngs.params(), (config.vocabulary, config.width)))
        self.blocks = nnx.List(
            [
                Block(config, sites.width if layer in sites.layers else None, rngs=rngs)
                for layer in range(config.layers)
            ]
        )
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        if not config.tie_embeddings:
            self.head = nnx.Param(init(rngs.params(), (config.vocabulary, config.width)))
        if sites.over_encoding:
            self.over_encoding = OverEncoding(
                config.width,
                sites.width,
                sites.orders,
                dtype=jnp.dtype(config.dtype),
                rngs=nnx.Rngs(params=rngs.memory()),
            )
        self.config = config

    def __call__(
        self,
        tokens: Int32[Array, "B T"],
        memory: Memory,
        segments: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
    ) -> tuple[Float[Array, "B T V"], Gates]:
        """Logits in float32, and the gates of the Engram layers.

        Args:
            tokens: token ids.
            memory: memory vectors by layer id; a layer that is missing here adds nothing.
            segments: document number of every position.
            positions: position within the document.
        """
        dtype = jnp.dtype(self.config.dtype)
        embedding = gather_parameters(self.embedding[...])
        x = embedding.at[tokens].get(out_sharding=extend_spec(tokens, None))
        x = (x * self.config.width**0.5).astype(dtype)
        if hasattr(self, "over_encoding"):
            x = gather_parameters(self.over_encoding)(x, memory.get(0))
        run = jax.checkpoint(run_block) if self.config.remat else run_block
        gates: Gates = {}
        for layer, block in enumerate(self.blocks):
            site = memory.get(layer) if hasattr(block, "engram") else None
            x, gate = run(block, x, segments, positions, site)
            if gate is not None:
                gates[layer] = gate
        head = embedding if self.config.tie_embeddings else gather_parameters(self.head[...])
        logits = jnp.einsum(
            "btd,vd->btv",
            gather_parameters(self.norm)(x),
            head.astype(dtype),
            preferred_element_type=jnp.float32,
        )
        return logits, gates
