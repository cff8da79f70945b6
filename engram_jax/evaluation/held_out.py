"""Held-out loss, by source and document, with the memory or without it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Float32, Float64

from engram_jax.data.corpus import Corpus, CorpusView
from engram_jax.data.packing import Batch, pack_held_out
from engram_jax.loss import token_losses
from engram_jax.memory import lookup
from engram_jax.memory.plan import MemoryPlan
from engram_jax.model import Gates
from engram_jax.run import Run
from engram_jax.train_state import Weights

type Suppress = Literal["nothing", "output", "rows"]
type StepGates = dict[int, Float[Array, "A B T M"]]  # by layer id
type Scorer = Callable[[Weights, Batch], tuple[Array, StepGates]]


class ScoredBatch(NamedTuple):
    """A batch and what it scored, for those who watch an evaluation.

    Attributes:
        source: name of the corpus.
        rows: the batch.
        mask: 1 where the loss counts.
        losses: of every token, that of the token after it.
        gates: by layer id.
    """

    source: str
    rows: Batch
    mask: Float32[np.ndarray, "B T"]
    losses: Float[np.ndarray, "B T"]
    gates: dict[int, Float[np.ndarray, "B T M"]]


class DocumentSums(NamedTuple):
    """Per document: the sum of its tokens' losses, and how many of its tokens were scored."""

    losses: Float64[np.ndarray, "documents"]
    tokens: Float64[np.ndarray, "documents"]


@dataclass(frozen=True)
class Score:
    """The held-out loss of one source, or the difference of two.

    Attributes:
        loss: mean cross-entropy of a token, in nats.
        standard_error: of that mean, over documents (as a ratio of two sums); None if there are
            fewer than two.
        tokens: tokens scored.
        documents: documents they belong to.
        tokens_per_byte: of the source's held-out documents.
        by_document: what the score was made from; None for a pool.
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
        """Cross-entropy per UTF-8 byte, in bits; comparable between tokenizers."""
        return self.loss * self.tokens_per_byte / math.log(2)


def make_scorer(run: Run, suppress: Suppress = "nothing") -> Scorer:
    """A jitted function (weights, batch) → (loss of every token, gates by layer).

    Call it inside `jax.set_mesh(run.mesh)`.

    Args:
        run: the run.
        suppress: "output" drops what the memory layers add (paper §6.3); "rows" lets them run on
            rows of zeros.
    """

    def score(weights: Weights, batch: Batch) -> tuple[Float[Array, "A B T"], StepGates]:
        plans, slots = batch.plan or MemoryPlan({}, {})
        rows: dict[int, Array] = {}
        if suppress != "output":
            for layer, table in weights.tables.items():
                rows[layer] = lookup.read_rows(
                    table, plans[layer], run.row_adam, weights.step, run.config.memory.gather
                ).values
        if suppress == "rows":
            rows = jax.tree.map(jnp.zeros_like, rows)

        def score_part(part: tuple[Batch, Any]) -> tuple[Array, Gates]:
            batch, slots = part
            gather = run.config.memory.gather
            losses, report = token_losses(
                run.graph, weights.params, rows, slots, batch, weights.expert_bias, gather
            )
            return losses, report.gates

        return jax.lax.map(score_part, (batch._replace(plan=None), slots))

    return jax.jit(score)


def evaluate_held_out(
    run: Run,
    scorer: Scorer,
    weights: Weights,
    corpora: Sequence[Corpus],
    *,
    max_tokens: int | None = None,
    watch: Callable[[ScoredBatch], object] = lambda scored: None,
) -> dict[str, Score]:
    """Scores the held-out documents of every corpus; call it inside `jax.set_mesh(run.mesh)`.

    Args:
        run: the run.
        scorer: as `make_scorer` gives it.
        weights: parameters and tables.
        corpora: where the documents come from.
        max_tokens: how many tokens to score per corpus, from its first document on; None: all.
        watch: called after every batch.

    Returns:
        Scores by corpus name; they are sums over all processes' rows, the same on each.

    Raises:
        InputError: a corpus holds no held-out documents.
    """
    data, planner = run.config.data, run.planner()
    rows = data.batch_size // run.config.train.accumulation
    scores = {}
    for corpus in corpora:
        documents = len(corpus.held_out)
        sums = DocumentSums(np.zeros(documents), np.zeros(documents))
        for packed in pack_held_out(corpus.held_out, data.sequence_length, rows):
            batch = _own_rows(packed._replace(documents=None).map(lambda field: field[None]))
            if planner:
                batch = batch._replace(plan=planner(batch.tokens, batch.segments))
            read = multihost_utils.process_allgather(scorer(weights, run.put(batch)), tiled=True)
            by_token, gates = jax.tree.map(lambda array: np.asarray(array)[0], read)
            mask = packed.target_mask
            if max_tokens is not None:
                left = max_tokens - sums.tokens.sum()
                mask = mask * (np.cumsum(mask, dtype=np.int64).reshape(mask.shape) <= left)
            np.add.at(sums.losses, packed.documents, by_token.astype(np.float64) * mask)
            np.add.at(sums.tokens, packed.documents, mask)
            watch(ScoredBatch(corpus.name, packed, mask, by_token, gates))
            if sums.tokens.sum() == max_tokens:
                break
        scores[corpus.name] = _summarize(sums, _tokens_per_byte(corpus.held_out))
    return scores


def difference(one: Score, other: Score) -> Score:
    """How much larger the loss of `one` is than that of `other`, on the same tokens.

    Its standard error is that of the documents' paired differences, which is far below what the
    two scores' own errors would give: hard documents are hard for both.
    """
    ours, theirs = one.by_document, other.by_document
    if ours is None or theirs is None or not np.array_equal(ours.tokens, theirs.tokens):
        raise ValueError("Only scores of the same documents have paired differences.")
    sums = DocumentSums(ours.losses - theirs.losses, ours.tokens)
    return _summarize(sums, one.tokens_per_byte)


def pool(scores: Sequence[Score]) -> Score:
    """The score of several sources' tokens together; its error is that of a stratified mean."""
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


def _own_rows(batch: Batch) -> Batch:
    """This process's rows of a batch that every process built whole."""
    rows = batch.tokens.shape[1] // jax.process_count()
    mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    return batch.map(lambda field: field[:, mine])


def count_targets(view: CorpusView) -> int:
    """The tokens of some documents that are scored: all but each one's bos."""
    return int(view.token_count - len(view))


def _tokens_per_byte(view: CorpusView) -> float:
    return float(count_targets(view) / view.byte_lengths.sum())


def _summarize(sums: DocumentSums, tokens_per_byte: float) -> Score:
    scored = sums.tokens > 0
    count, total = int(scored.sum()), sums.tokens.sum()
    mean = sums.losses.sum() / total
    error = None
    if count > 1:
        # Documents are the independent draws; the mean is a ratio of two sums over them.
        residuals = (sums.losses - mean * sums.tokens)[scored]
        error = float(np.sqrt((residuals**2).sum() * count / (count - 1)) / total)
    return Score(float(mean), error, int(total), count, tokens_per_byte, sums)
