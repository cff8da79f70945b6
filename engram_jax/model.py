"""The decoder: a stack of layers that takes the gathered memory as an argument."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from engram_jax.decoder_config import DecoderConfig as DecoderConfig
from engram_jax.decoder_config import MemorySites as MemorySites
from engram_jax.layers.block import Block, BlockReport, run_block
from engram_jax.layers.cross_entropy import compute_logits
from engram_jax.layers.decode_state import DecodeState
from engram_jax.layers.embedding import look_up
from engram_jax.layers.engram import MemoryHealth
from engram_jax.layers.input_memory import AddedRows, OverEncoding
from engram_jax.layers.norms import RMSNorm
from engram_jax.layers.slots import Slots, whole_blocks
from engram_jax.parameters import VocabularyMatrix
from engram_jax.sharding import gather_parameters, split_axes

type Memory = Mapping[int, Float[Array, "B T E"]]  # by layer id
type Gates = dict[int, Float[Array, "B T M"]]  # by layer id
type ExpertBias = Mapping[int, Float[Array, "X"]]  # by layer id


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
        # The names of these attributes are in the parameter paths of checkpoints.
        if sites.input == "over_encoding":
            self.over_encoding = OverEncoding(
                config.width,
                sites.width,
                sites.orders,
                dtype=jnp.dtype(config.dtype),
                rngs=nnx.Rngs(params=rngs.memory()),
            )
        elif sites.input == "added":
            self.added = AddedRows(config.width)
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

        The arguments are those of `hidden_states`.
        """
        hidden, head, report = self.hidden_states(
            tokens, memory, segments, positions, expert_bias, token_mask
        )
        return compute_logits(hidden, head), report

    def hidden_states(
        self,
        tokens: Int32[Array, "B T"],
        memory: Memory,
        segments: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        expert_bias: ExpertBias | None = None,
        token_mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "V D"], Report]:
        """Returns the last hidden states, the output head, and diagnostics of the blocks.

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
        input_memory = self._input_memory and gather(self._input_memory)
        x = self._begin(look_up(embedding, tokens), input_memory, memory, token_mask)
        x, reports = self._run_blocks(x, segments, positions, memory, expert_bias or {}, token_mask)
        head = embedding if config.tie_embeddings else gather(self.head)[...]
        hidden = gather(self.norm)(jnp.sum(x, axis=2))
        errors = [report.mixing_error for report in reports if report.mixing_error is not None]
        whole = Report(
            gates={i: report.gate for i, report in enumerate(reports) if report.gate is not None},
            loads={i: report.load for i, report in enumerate(reports) if report.load is not None},
            mixing_error=jnp.max(jnp.stack(errors)) if errors else None,
            health={i: report.health for i, report in enumerate(reports) if report.health},
        )
        return hidden, head, whole

    def extend(
        self,
        state: DecodeState,
        slots: Slots,
        memory: Memory,
        head: Float[Array, "D V"],
        *,
        count: Int32[Array, "B"] | None = None,
        expert_bias: ExpertBias | None = None,
        token_mask: Bool[Array, "B T"] | None = None,
        logits: Literal["all", "last"] = "all",
    ) -> tuple[Float[Array, "B T V"] | Float[Array, "B V"], DecodeState]:
        """Like a call, for tokens that were appended to a state; also returns the new state.

        Any split of a text into calls gives the logits of one forward pass, up to rounding. The
        parameters are those of `decoding.weights.prepare`: gathered, and cast to the dtype of the
        computation. Blocks are not run as a loop, which would copy their parameters at every call.

        Args:
            state: the state, from `DecodeState.append`. Donate it, so that it is updated in place.
            slots: the slots of the new tokens, from the same.
            memory: their memory vectors by layer id; a layer that is missing here adds nothing.
            head: the transposed output head.
            count: how many of the T tokens each sequence has; None: all. The others are ignored.
            expert_bias: biases that balance the experts, by layer id.
            token_mask: False at image placeholders, as in a call. (`Generator` has prompts of text
                only.)
            logits: those of "all" new positions, or of each sequence's "last".
        """
        tokens, positions = slots.window(state.tokens, 0), slots.window(state.positions, 0)
        if count is None:
            count = jnp.full_like(state.length, tokens.shape[1])
        x = self.embedding[...].at[tokens].get(mode="clip").astype(jnp.float32)
        x, caches = self._begin(x, self._input_memory, memory, token_mask), []
        for layer, (block, cache) in enumerate(zip(self.blocks, state.caches, strict=True)):
            bias = (expert_bias or {}).get(layer)
            site = memory.get(layer) if hasattr(block, "engram") else None
            x, cache = block.extend(x, positions, cache, slots, site, bias, token_mask)
            caches.append(cache)
        state = replace(state, caches=tuple(caches), length=state.length + count)
        hidden = jnp.sum(x, axis=2)
        if logits == "last":
            last = jnp.maximum(count - 1, 0)[:, None, None]
            hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
        return jnp.matmul(self.norm(hidden), head, preferred_element_type=jnp.float32), state

    def empty_state(self, batch: int, capacity: int) -> DecodeState:
        """A state without tokens, of at least this many slots for every sequence.

        The number of slots is rounded up to whole blocks of attention (see `layers/slots.py`).
        """
        capacity = whole_blocks(capacity)
        caches = (block.empty_cache(batch, capacity) for block in self.blocks)
        return DecodeState.empty(batch, capacity, tuple(caches))

    @property
    def _input_memory(self) -> OverEncoding | AddedRows | None:
        """What reads the memory of layer 0 at the input; None: nothing."""
        return getattr(self, "over_encoding", None) or getattr(self, "added", None)

    def _begin(
        self,
        embedded: Float[Array, "B T D"],
        input_memory: OverEncoding | AddedRows | None,
        memory: Memory,
        token_mask: Bool[Array, "B T"] | None,
    ) -> Float[Array, "B T M D"]:
        """The residual stream before the first block, from the tokens' embeddings."""
        config = self.config
        x = (embedded * config.width**0.5).astype(jnp.dtype(config.dtype))
        if input_memory is not None:
            x = input_memory(x, memory.get(0))
        if token_mask is not None:
            x = jnp.where(token_mask[..., None], x, 0)
        return jnp.repeat(x[:, :, None], config.branches, axis=2)

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
