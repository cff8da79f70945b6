"""A block of the decoder: Engram, attention and feed-forward layer on the residual stream."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from engram_jax.decoder_config import DecoderConfig
from engram_jax.layers.attention import Attention, KeyValues
from engram_jax.layers.engram import Engram, GatedValues, MemoryHealth, inspect_health
from engram_jax.layers.feed_forward import FeedForward
from engram_jax.layers.hyper_connections import HyperConnection, column_error, read, write
from engram_jax.layers.latent_attention import Latent, LatentAttention, LatentAttentionConfig
from engram_jax.layers.mixture_of_experts import MixtureOfExperts
from engram_jax.layers.norms import RMSNorm
from engram_jax.layers.slots import Slots
from engram_jax.sharding import gather_parameters, split_axes


class BlockReport(NamedTuple):
    """Diagnostics of a block; None where the block has no such layer.

    Attributes:
        gate: Engram's gates.
        load: how many tokens chose each expert.
        mixing_error: largest error of a column sum of H_res.
        health: signs of an inert memory.
    """

    gate: Float[Array, "B T M"] | None
    load: Array | None
    mixing_error: Float[Array, ""] | None
    health: MemoryHealth | None


class BlockCache(NamedTuple):
    """The cache of a block.

    Attributes:
        attention: of its attention layer.
        engram: of its Engram layer; None without one, or without a convolution.
    """

    attention: KeyValues | Latent
    engram: GatedValues | None


class Block(nnx.Module):
    """Engram (if the block has it), attention, feed-forward: each adds to the residual stream.

    Args:
        config: sizes.
        memory_width: memory width E; None: a block without Engram.
        experts: the feed-forward layer is a mixture of experts.
        rngs: random streams.
    """

    def __init__(
        self, config: DecoderConfig, memory_width: int | None, *, experts: bool, rngs: nnx.Rngs
    ) -> None:
        width, dtype = config.width, jnp.dtype(config.dtype)
        epsilon, connections = config.norm_epsilon, config.hyper_connections
        # Engram draws from its own random stream, so that the same model without Engram starts
        # with equal parameters.
        self.attention_norm = RMSNorm(width, epsilon=epsilon)
        if isinstance(config.attention, LatentAttentionConfig):
            self.attention: Attention | LatentAttention = LatentAttention(
                width, config.attention, norm_epsilon=epsilon, dtype=dtype, rngs=rngs
            )
        else:
            self.attention = Attention(width, config.attention, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = RMSNorm(width, epsilon=epsilon)
        if experts and config.experts is not None:
            self.experts = MixtureOfExperts(width, config.experts, dtype=dtype, rngs=rngs)
        else:
            self.feed_forward = FeedForward(width, config.feed_forward, dtype=dtype, rngs=rngs)
        if connections is not None:
            self.attention_connection = HyperConnection(width, connections, rngs=rngs)
            self.feed_forward_connection = HyperConnection(width, connections, rngs=rngs)
        if memory_width is not None:
            self.engram = Engram(
                width,
                memory_width,
                config.engram,
                branches=1 if config.single_fusion else config.branches,
                dtype=dtype,
                rngs=nnx.Rngs(params=rngs.memory()),
            )
        self.single_fusion = config.single_fusion

    def __call__(
        self,
        x: Float[Array, "B T M D"],
        segments: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        memory: Float[Array, "B T E"] | None = None,
        expert_bias: Float[Array, "X"] | None = None,
        token_mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T M D"], BlockReport]:
        """Returns the new residual stream and diagnostics. Without memory, Engram adds nothing."""

        def fuse(hidden: Array, memory: Array) -> tuple[Array, Array, None]:
            return *self.engram(hidden, memory, segments, token_mask), None

        def attend(h: Array) -> tuple[Array, None]:
            return self.attention(h, segments, positions), None

        is_token = segments > 0 if token_mask is None else (segments > 0) & token_mask
        x, report, _ = self._run(x, memory, fuse, attend, expert_bias, is_token)
        return x, report

    def extend(
        self,
        x: Float[Array, "B T M D"],
        positions: Int32[Array, "B T"],
        cache: BlockCache,
        slots: Slots,
        memory: Float[Array, "B T E"] | None = None,
        expert_bias: Float[Array, "X"] | None = None,
        token_mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T M D"], BlockCache]:
        """Like a call, for positions that follow cached ones; also returns the new cache."""

        def fuse(hidden: Array, memory: Array) -> tuple[Array, Array, GatedValues | None]:
            return self.engram.extend(hidden, memory, cache.engram, slots, token_mask)

        def attend(h: Array) -> tuple[Array, Any]:
            # mypy cannot know that the cache is that of this block's kind of attention.
            return self.attention.extend(h, positions, cache.attention, slots)  # type: ignore[arg-type]

        x, _, new = self._run(x, memory, fuse, attend, expert_bias, positions >= 0)  # all
        return x, new if memory is not None else cache._replace(attention=new.attention)

    def empty_cache(self, batch: int, capacity: int) -> BlockCache:
        """A cache of this many slots for every sequence."""
        engram = self.engram.empty_cache(batch, capacity) if hasattr(self, "engram") else None
        return BlockCache(self.attention.empty_cache(batch, capacity), engram)

    def _run(
        self,
        x: Float[Array, "B T M D"],
        memory: Float[Array, "B T E"] | None,
        fuse: Callable[[Array, Array], tuple[Array, Array, Any]],
        attend: Callable[[Array], tuple[Array, Any]],
        expert_bias: Float[Array, "X"] | None,
        is_token: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B T M D"], BlockReport, BlockCache]:
        """The block, given the calls of its Engram and attention layers, which return caches."""
        gate = load = mappings = later = of_engram = health = None
        if memory is not None and not self.single_fusion:
            fused, gate, of_engram = fuse(x, memory)
            health = inspect_health(x, fused, gate, is_token)
            x += fused

        if hasattr(self, "attention_connection"):
            mappings = self.attention_connection(x)
        h = read(x, mappings)
        if memory is not None and self.single_fusion:
            fused, gate, of_engram = fuse(h[:, :, None], memory)
            health = inspect_health(h[:, :, None], fused, gate, is_token)
            added = fused[:, :, 0]
            y, of_attention = attend(self.attention_norm(h + added))
            y += added
        else:
            y, of_attention = attend(self.attention_norm(h))
        x = write(x, y, mappings)

        if hasattr(self, "feed_forward_connection"):
            later = self.feed_forward_connection(x)
        h = self.feed_forward_norm(read(x, later))
        if hasattr(self, "experts"):
            unbiased = jnp.zeros(self.experts.config.routed)
            y, load = self.experts(h, unbiased if expert_bias is None else expert_bias)
        else:
            y = self.feed_forward(h)
        x = write(x, y, later)
        error = None
        if mappings is not None and later is not None:
            error = jnp.maximum(column_error(mappings.mix), column_error(later.mix))
        return x, BlockReport(gate, load, error, health), BlockCache(of_attention, of_engram)


def run_block(
    block: Block, x: Float[Array, "B T M D"], *inputs: Any
) -> tuple[Float[Array, "B T M D"], BlockReport]:
    """Gathers a block's parameters and runs it.

    Because the gather is inside, remat repeats it in the backward pass instead of keeping the
    gathered parameters.
    """
    return gather_parameters(block, x.dtype, split_axes(x))(x, *inputs)
