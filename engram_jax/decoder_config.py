"""The sizes of a decoder, and where it reads memory."""

from dataclasses import dataclass, field
from typing import Literal

from engram_jax.errors import InputError
from engram_jax.layers.attention import AttentionConfig
from engram_jax.layers.engram import EngramConfig
from engram_jax.layers.hyper_connections import HyperConnectionsConfig
from engram_jax.layers.latent_attention import LatentAttentionConfig
from engram_jax.layers.mixture_of_experts import ExpertsConfig

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
            them. On a CPU, a step of a small model then takes 1.25 times as long.
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
        input: how the memory of layer 0 is fused with the input embedding: "over_encoding"
            (averaged) or "added"; None: it is not. Then no block has an Engram layer.
        width: memory width E.
        orders: number of n-gram orders, N−1.
    """

    layers: tuple[int, ...] = ()
    input: Literal["over_encoding", "added"] | None = None
    width: int = 0
    orders: int = 0
