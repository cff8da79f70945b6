"""The decoder: a stack of layers that takes the gathered memory as an argument."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from engram_jax.errors import InputError
from engram_jax.layers.attention import Attention, AttentionConfig
from engram_jax.layers.embedding import look_up
from engram_jax.layers.engram import Engram, EngramConfig, MemoryHealth, inspect_health
from engram_jax.layers.feed_forward import FeedForward
from engram_jax.layers.hyper_connections import (
    HyperConnection,
    HyperConnectionsConfig,
    column_error,
    read,
    write,
)
from engram_jax.layers.latent_attention import LatentAttention, LatentAttentionConfig
from engram_jax.layers.mixture_of_experts import ExpertsConfig, MixtureOfExperts
from engram_jax.layers.norms import RMSNorm
from engram_jax.layers.over_encoding import AddedRows, OverEncoding
from engram_jax.parameters import VocabularyMatrix
from engram_jax.sharding import gather_parameters, split_axes

type Memory = Mapping[int, Float[Array, "B T E"]]  # by layer id
type Gates = dict[int, Float[Array, "B T M"]]  # by layer id
type ExpertBias = Mapping[int, Float[Array, "X"]]  # by layer id
type RematPolicy = Literal[
    "nothing_saveable", "experts_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"
]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder.

    Attributes:
        vocabulary: token ids V.
        width: model width D.
        layers: number of blocks.
        attention: sizes of the attention layers: grouped-query, or multi-head latent attention.
        feed_forward: inner width W of the dense feed-forward layers.
        experts: mixture-of-experts layers instead of feed-forward layers; None: none.
        hyper_connections: several residual branches; None: a plain residual stream.
        engram: options of the Engram layers.
        single_fusion: Engram has one gate, after the pre-mapping of the hyper-connection, instead
            of one per residual branch (an ablation of the paper).
        tie_embeddings: the output head is the input embedding.
        norm_epsilon: epsilon of the block norms.
        dtype: dtype of the computation; parameters are float32.
        remat: what the forward pass of a block keeps for the backward pass, which recomputes the
            rest. None keeps everything; otherwise a policy of `jax.checkpoint_policies`, or
            "experts_saveable", which keeps the output of the routed experts. Compared with
            "nothing_saveable", expert-parallel experts then run forward two times per step instead
            of three, with five exchanges instead of six. Other experts save nothing.
        scan: run consecutive blocks of the same kind as one loop, which is compiled once for all of
            them.
    """

    vocabulary: int = 8192
    width: int = 192
    layers: int = 4
    attention: AttentionConfig | LatentAttentionConfig = field(default_factory=AttentionConfig)
    feed_forward: int = 512
    experts: ExpertsConfig | None = None
    hyper_connections: HyperConnectionsConfig | None = None
    engram: EngramConfig = field(default_factory=EngramConfig)
    single_fusion: bool = False
    tie_embeddings: bool = True
    norm_epsilon: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: RematPolicy | None = None
    scan: bool = False

    def __post_init__(self) -> None:
        if min(self.vocabulary, self.width, self.layers, self.feed_forward) < 1:
            raise InputError("model.vocabulary, width, layers and feed_forward must be at least 1.")
        if self.experts is not None and self.experts.leading_dense >= self.layers:
            raise InputError(
                f"model.experts.leading_dense {self.experts.leading_dense} leaves no layer for "
                f"experts in a model of {self.layers} layers; lower it, or use a configuration "
                "without experts."
            )

    @property
    def branches(self) -> int:
        """Residual branches M."""
        return self.hyper_connections.branches if self.hyper_connections else 1

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Ids of the blocks with experts."""
        return tuple(range(self.experts.leading_dense, self.layers)) if self.experts else ()


@dataclass(frozen=True)
class MemorySites:
    """Where a decoder reads memory, and the size of that memory.

    Attributes:
        layers: zero-based ids of the blocks that begin with an Engram layer.
        over_encoding: the memory of layer 0 is averaged with the input embedding, and no block has
            an Engram layer.
        added: instead, it is added to the input embedding.
        width: memory width E.
        orders: number of n-gram orders, N−1.
    """

    layers: tuple[int, ...] = ()
    over_encoding: bool = False
    added: bool = False
    width: int = 0
    orders: int = 0


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


class Report(NamedTuple):
    """Diagnostics of all blocks.

    Attributes:
        gates: gates of the Engram layers, by layer id.
        loads: how many tokens chose each expert, by the id of a layer with experts.
        mixing_error: largest error of a column sum of any H_res; None without hyper-connections.
        health: signs of an inert memory, by layer id.
    """

    gates: Gates
    loads: dict[int, Array]
    mixing_error: Float[Array, ""] | None
    health: dict[int, MemoryHealth]


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
        gate = load = mappings = later = health = None
        if memory is not None and not self.single_fusion:
            fused, gate = self.engram(x, memory, segments, token_mask)
            health = inspect_health(x, fused, gate)
            x += fused

        if hasattr(self, "attention_connection"):
            mappings = self.attention_connection(x)
        h = read(x, mappings)
        if memory is not None and self.single_fusion:
            fused, gate = self.engram(h[:, :, None], memory, segments, token_mask)
            health = inspect_health(h[:, :, None], fused, gate)
            added = fused[:, :, 0]
            y = added + self.attention(self.attention_norm(h + added), segments, positions)
        else:
            y = self.attention(self.attention_norm(h), segments, positions)
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
        return x, BlockReport(gate, load, error, health)


def run_block(
    block: Block, x: Float[Array, "B T M D"], *inputs: Any
) -> tuple[Float[Array, "B T M D"], BlockReport]:
    """Gathers a block's parameters and runs it.

    Because the gather is inside, remat repeats it in the backward pass instead of keeping the
    gathered parameters.
    """
    return gather_parameters(block, x.dtype, split_axes(x))(x, *inputs)


class Decoder(nnx.Module):
    """A pre-norm decoder with memory.

    The output matrices of attention and feed-forward are initialized to zero, and the embedding is
    multiplied by √D. So initially attention and feed-forward add nothing. With random output
    matrices and an unscaled embedding, the blocks' outputs are much larger than the embedding (the
    loss is 0.45 nats higher after 400 steps of the model without memory; docs/experiments.md,
    2026-11-24).

    Args:
        config: sizes.
        sites: where the decoder reads memory.
        rngs: random streams "params" and "memory". Layers that read memory draw from the latter, so
            that models with and without memory start with equal parameters elsewhere.
    """

    def __init__(self, config: DecoderConfig, sites: MemorySites, *, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(0.02)
        self.embedding = nnx.Param(
            init(rngs.params(), (config.vocabulary, config.width)), role=VocabularyMatrix()
        )
        self.blocks = nnx.List(
            [
                Block(
                    config,
                    sites.width if layer in sites.layers else None,
                    experts=layer in config.expert_layers,
                    rngs=rngs,
                )
                for layer in range(config.layers)
            ]
        )
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        if not config.tie_embeddings:
            self.head = nnx.Param(
                init(rngs.params(), (config.vocabulary, config.width)), role=VocabularyMatrix()
            )
        if sites.over_encoding:
            self.over_encoding: OverEncoding | AddedRows = OverEncoding(
                config.width,
                sites.width,
                sites.orders,
                dtype=jnp.dtype(config.dtype),
                rngs=nnx.Rngs(params=rngs.memory()),
            )
        elif sites.added:
            self.over_encoding = AddedRows(config.width)
        self.config = config

    def __call__(
        self,
        tokens: Int32[Array, "B T"],
        memory: Memory,
        segments: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        expert_bias: ExpertBias | None = None,
        token_mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], Report]:
        """Returns logits in float32, and diagnostics of the blocks.

        Args:
            tokens: token ids.
            memory: memory vectors by layer id; a layer that is missing here adds nothing.
            segments: document number of every position.
            positions: position within the document.
            expert_bias: biases that balance the experts, by layer id. For a trained model, pass
                `TrainState.expert_bias`; None is zeros, the initial value.
            token_mask: False at image placeholders, where embedding and gates are zero (as in
                DeepSeek-V4.1); None: all positions are tokens.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        gather = partial(gather_parameters, dtype=dtype, axes=split_axes(tokens))
        embedding = gather(self.embedding)[...]
        x = (look_up(embedding, tokens) * config.width**0.5).astype(dtype)
        if hasattr(self, "over_encoding"):
            x = gather(self.over_encoding)(x, memory.get(0))
        if token_mask is not None:
            x = jnp.where(token_mask[..., None], x, 0)
        x = jnp.repeat(x[:, :, None], config.branches, axis=2)
        x, reports = self._run_blocks(x, segments, positions, memory, expert_bias or {}, token_mask)
        head = embedding if config.tie_embeddings else gather(self.head)[...]
        logits = jnp.einsum(
            "btd,vd->btv",
            gather(self.norm)(jnp.sum(x, axis=2)),
            head,
            preferred_element_type=jnp.float32,
        )
        errors = [report.mixing_error for report in reports if report.mixing_error is not None]
        return logits, Report(
            gates={i: report.gate for i, report in enumerate(reports) if report.gate is not None},
            loads={i: report.load for i, report in enumerate(reports) if report.load is not None},
            mixing_error=jnp.max(jnp.stack(errors)) if errors else None,
            health={i: report.health for i, report in enumerate(reports) if report.health},
        )

    def _run_blocks(
        self,
        x: Float[Array, "B T M D"],
        segments: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        memory: Memory,
        expert_bias: ExpertBias,
        token_mask: Bool[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T M D"], list[BlockReport]]:
        """Runs all blocks; with `scan`, consecutive blocks of the same kind as one loop."""
        run, remat = run_block, self.config.remat
        if remat == "experts_saveable":
            keep_experts = jax.checkpoint_policies.save_only_these_names("experts")
            run = jax.checkpoint(run_block, policy=keep_experts)
        elif remat is not None:
            run = jax.checkpoint(run_block, policy=getattr(jax.checkpoint_policies, remat))
        reports: list[BlockReport] = []
        for layers in self._loops():
            blocks = [self.blocks[layer] for layer in layers]
            biases = [expert_bias.get(layer) for layer in layers]
            if len(blocks) == 1:
                site = memory.get(layers[0]) if hasattr(blocks[0], "engram") else None
                x, report = run(blocks[0], x, segments, positions, site, biases[0], token_mask)
                reports.append(report)
                continue

            def run_next(
                x: Float[Array, "B T M D"], part: tuple[Block, Array | None]
            ) -> tuple[Float[Array, "B T M D"], BlockReport]:
                return run(part[0], x, segments, positions, None, part[1])

            # Each layer has its own parameters, also in a loop, for which they are stacked here.
            stacks = jax.tree.map(
                lambda *leaves: jnp.stack(leaves), *zip(blocks, biases, strict=True)
            )
            x, stacked = jax.lax.scan(run_next, x, stacks)
            reports += [
                jax.tree.map(lambda leaf, number=number: leaf[number], stacked)
                for number in range(len(layers))
            ]
        return x, reports

    def _loops(self) -> list[list[int]]:
        """Groups of consecutive layers of the same kind, without Engram; other layers singly."""
        ids = range(len(self.blocks))
        if not self.config.scan:
            return [[layer] for layer in ids]

        def kind(layer: int) -> tuple[int, bool]:
            block = self.blocks[layer]
            return layer if hasattr(block, "engram") else -1, hasattr(block, "experts")

        return [list(layers) for _, layers in groupby(ids, key=kind)]
