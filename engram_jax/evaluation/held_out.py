"""Held-out loss per source and document, with or without the memory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Float32, Float64

from engram_jax.data.corpus import Corpus, CorpusView
from engram_jax.data.packing import Batch, MicroBatch, micro_batches, pack_held_out
from engram_jax.layers.engram import MemoryHealth
from engram_jax.loss import token_losses
from engram_jax.memory.row_adam import RowAdam
from engram_jax.memory.row_feed import RowFeed
from engram_jax.model import Gates
from engram_jax.program import Program
from engram_jax.sharding import batch_part
from engram_jax.train_state import Weights

type Suppress = Literal["nothing", "output", "rows"]
type StepGates = dict[int, Float[Array, "A B T M"]]  # by layer id
type StepHealth = dict[int, MemoryHealth]  # by layer id, one value per micro-batch
type HostScores = tuple[
    Float[np.ndarray, "B T"], dict[int, Float[np.ndarray, "B T M"]], dict[int, MemoryHealth]
]
type Scorer = Callable[[Weights, Batch, RowAdam], tuple[Array, StepGates, StepHealth]]


class ScoredBatch(NamedTuple):
    """A batch and its losses, for the `watch` callback of an evaluation.

    Attributes:
        source: name of the corpus.
        rows: the batch.
        mask: 1 for tokens that are scored, else 0.
        losses: at every position, the loss of the next token.
        gates: by layer id; empty if they were not read.
        health: of the memory layers, by layer id.
    """

    source: str
    rows: Batch
    mask: Float32[np.ndarray, "B T"]
    losses: Float[np.ndarray, "B T"]
    gates: dict[int, Float[np.ndarray, "B T M"]]
    health: dict[int, MemoryHealth]


class DocumentSums(NamedTuple):
    """Per document: the sum of its tokens' losses, and the number of scored tokens."""

    losses: Float64[np.ndarray, "documents"]
    tokens: Float64[np.ndarray, "documents"]


@dataclass(frozen=True)
class Score:
    """The held-out loss of one source, or the difference of two.

    Attributes:
        loss: mean cross-entropy of a token, in nats.
        standard_error: of that mean, over documents (the mean is a ratio of two sums); None for
            fewer than two documents.
        tokens: number of scored tokens.
        documents: number of documents with scored tokens.
        tokens_per_byte: of the source's held-out documents.
        by_document: the sums per document; None for a pooled score.
    """

    loss: float
    standard_error: float | None
    tokens: int
    documents: int
    tokens_per_byte: float
    by_document: DocumentSums | None = field(default=None, repr=False, compare=False)

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Cross-entropy per UTF-8 byte, in bits. It is comparable between tokenizers."""
        return self.loss * self.tokens_per_byte / math.log(2)


def make_scorer(program: Program, suppress: Suppress = "nothing") -> Scorer:
    """The jitted function (weights, batch, row optimizer) → (losses of tokens, gates, health).

    Call it inside `program.use_mesh()`; the row optimizer is `program.row_adam`.

    Args:
        program: the program.
        suppress: "output" removes the output of the memory layers (paper §6.3); "rows" replaces
            all table rows by zeros.
    """

    def score(
        weights: Weights, batch: Batch, row_adam: RowAdam
    ) -> tuple[Float[Array, "A B T"], StepGates, StepHealth]:
        rows: dict[int, Array] = {}
        if suppress != "output":
            read = program.read_rows(weights, batch.plan, row_adam)
            rows = {layer: of_layer.values for layer, of_layer in read.items()}
        if suppress == "rows":
            rows = jax.tree.map(jnp.zeros_like, rows)

        def score_part(micro_batch: MicroBatch) -> tuple[Array, Gates, StepHealth]:
            losses, report = token_losses(
                program, weights.params, rows, micro_batch, weights.expert_bias
            )
            return losses.cross_entropy, report.gates, report.health

        return jax.lax.map(score_part, micro_batches(batch))

    return jax.jit(score)


def score_batch(
    program: Program,
    scorer: Scorer,
    weights: Weights,
    rows: Batch,
    *,
    with_gates: bool = False,
    feed: RowFeed | None = None,
) -> HostScores:
    """The losses, gates and health of a batch, on the host.

    Call it on all processes, inside `program.use_mesh()`; each gets the values of the complete
    batch. Losses have 4 bytes per token. Gates have 4 for every branch and memory layer, so they
    stay on the devices unless they are asked for.

    Args:
        program: the program.
        scorer: from `make_scorer`.
        weights: parameters and tables.
        rows: the complete batch, which every process has.
        with_gates: read the gates; otherwise there are none.
        feed: reads the rows, if the tables are outside the devices.
    """
    whole = rows._replace(documents=None).map(lambda field: field[None])
    part, planner = batch_part(program.mesh), program.planner()
    batch = whole.map(part.tokens)
    if planner:
        plan = planner.plan_part(whole.tokens, whole.segments, part)
        batch = batch._replace(plan=plan)
        if feed and plan.buffers:
            weights = replace(weights, tables=feed.read(plan.buffers))
    losses, gates, health = scorer(weights, program.put(batch), program.row_adam)
    asked = losses, gates if with_gates else {}, health
    read = multihost_utils.process_allgather(asked, tiled=True)
    found: HostScores = jax.tree.map(lambda array: np.asarray(array)[0], read)
    return found


def evaluate_held_out(
    program: Program,
    scorer: Scorer,
    weights: Weights,
    corpora: Sequence[Corpus],
    *,
    max_tokens: int | None = None,
    watch: Callable[[ScoredBatch], object] = lambda scored: None,
    with_gates: bool = False,
    feed: RowFeed | None = None,
) -> dict[str, Score]:
    """Scores the held-out documents of every corpus; call it inside `program.use_mesh()`.

    Args:
        program: the program.
        scorer: from `make_scorer`.
        weights: parameters and tables.
        corpora: corpora whose held-out documents are scored.
        max_tokens: number of tokens to score per corpus, in a random order of its documents that is
            the same for all models; None: all.
        watch: called after every batch, on all processes.
        with_gates: give the gates to `watch`.
        feed: reads the rows, if the tables are outside the devices.

    Returns:
        Scores by corpus name. They cover the rows of all processes, and are equal on all processes.

    Raises:
        InputError: a corpus has no held-out documents.
    """
    length, rows = program.config.data.sequence_length, program.config.evaluate_batch_size
    scores = {}
    for corpus in corpora:
        view = corpus.held_out if max_tokens is None else corpus.held_out.by_hash()
        sums = DocumentSums(np.zeros(len(view)), np.zeros(len(view)))
        for packed in pack_held_out(view, length, rows):
            by_token, gates, health = score_batch(
                program, scorer, weights, packed, with_gates=with_gates, feed=feed
            )
            mask = packed.target_mask
            if max_tokens is not None:
                left = max_tokens - sums.tokens.sum()
                mask = mask * (np.cumsum(mask, dtype=np.int64).reshape(mask.shape) <= left)
            np.add.at(sums.losses, packed.documents, by_token.astype(np.float64) * mask)
            np.add.at(sums.tokens, packed.documents, mask)
            watch(ScoredBatch(corpus.name, packed, mask, by_token, gates, health))
            if sums.tokens.sum() == max_tokens:
                break
        scores[corpus.name] = _summarize(sums, _tokens_per_byte(corpus.held_out))
    return scores


def difference(one: Score, other: Score) -> Score:
    """The loss of `one` minus the loss of `other`, on the same tokens.

    The standard error is that of paired differences of documents. It is much smaller than the
    errors of the two scores suggest, because the losses of a document are correlated.
    """
    ours, theirs = one.by_document, other.by_document
    if ours is None or theirs is None or not np.array_equal(ours.tokens, theirs.tokens):
        raise ValueError("A paired difference needs two scores of the same documents.")
    sums = DocumentSums(ours.losses - theirs.losses, ours.tokens)
    return _summarize(sums, one.tokens_per_byte)


def pool(scores: Sequence[Score]) -> Score:
    """The score over the tokens of several sources; its error is that of a stratified mean."""
    tokens = sum(score.tokens for score in scores)
    variance = 0.0
    for score in scores:
        if score.standard_error is None:
            variance = math.nan
        else:
            variance += (score.standard_error * score.tokens / tokens) ** 2
    nbytes = sum(score.tokens / score.tokens_per_byte for score in scores)
    return Score(
        loss=sum(score.loss * score.tokens for score in scores) / tokens,
        standard_error=None if math.isnan(variance) else math.sqrt(variance),
        tokens=tokens,
        documents=sum(score.documents for score in scores),
        tokens_per_byte=tokens / nbytes,
    )


def count_targets(view: CorpusView) -> int:
    """The number of scored tokens of some documents: all except each document's bos."""
    return int(view.token_count - len(view))


def count_scored(corpora: Sequence[Corpus], max_tokens: int | None) -> int:
    """The number of tokens that `evaluate_held_out` scores."""
    counts = [count_targets(corpus.held_out) for corpus in corpora]
    return sum(counts if max_tokens is None else (min(max_tokens, count) for count in counts))


def _tokens_per_byte(view: CorpusView) -> float:
    return float(count_targets(view) / view.byte_lengths.sum())


def _summarize(sums: DocumentSums, tokens_per_byte: float) -> Score:
    scored = sums.tokens > 0
    count, total = int(scored.sum()), sums.tokens.sum()
    mean = sums.losses.sum() / total
    error = None
    if count > 1:
        # Documents are independent samples; the mean is a ratio of two sums over documents.
        residuals = (sums.losses - mean * sums.tokens)[scored]
        error = float(np.sqrt((residuals**2).sum() * count / (count - 1)) / total)
    return Score(float(mean), error, int(total), count, tokens_per_byte, sums)
