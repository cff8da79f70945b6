"""The figures of a trained run: held-out losses, and what the memory does."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engram_jax.data.corpus import Corpus
from engram_jax.evaluation.health import HealthStudy
from engram_jax.evaluation.held_out import Scorer, evaluate_held_out, make_scorer, pool
from engram_jax.hashing import NgramHash
from engram_jax.program import Program
from engram_jax.run import Run
from engram_jax.train_state import Weights

VERSION = (
    2  # part of every key; raise it when figures are computed in another way, in any experiment
)
PROSE = ("vital_en", "austen")
OTHER_TOKENS = 16_384  # held-out tokens of a source that is not prose


def measure(run: Run, weights: Weights) -> dict[str, Any]:
    """The figures of a trained run: held-out losses, and what the memory does.

    - loss: nats per token by source, and of all prose ("prose"); standard_error of the latter, over
      documents.
    - dropped: increase of the prose loss without the memory's output.
    - other_hash: increase of the prose loss if rows are looked up with other hash multipliers.
    - health: by layer id (`HealthStudy`).
    """
    corpora = run.corpora()
    prose = prose_of(corpora)
    rest = [corpus for corpus in corpora if corpus not in prose]
    program, study = run.program, HealthStudy()
    scorer = make_scorer(program)

    def prose_loss(program: Program, scorer: Scorer) -> float:
        return pool(list(evaluate_held_out(program, scorer, weights, prose).values())).loss

    with program.use_mesh():
        scores = evaluate_held_out(program, scorer, weights, prose, watch=study)
        pooled = pool(list(scores.values()))
        scores |= evaluate_held_out(program, scorer, weights, rest, max_tokens=OTHER_TOKENS)
        losses = {name: score.loss for name, score in scores.items()} | {"prose": pooled.loss}
        figures: dict[str, Any] = {"loss": losses, "standard_error": pooled.standard_error}
        if program.ngram_hash is not None:
            spec, projection = program.ngram_hash.spec, program.ngram_hash.projection
            other = NgramHash.build(replace(spec, seed=spec.seed + 1), projection)
            rehashed = prose_loss(replace(program, ngram_hash=other), scorer)
            dropped = prose_loss(program, make_scorer(program, "output"))
            figures |= {"dropped": dropped - pooled.loss, "other_hash": rehashed - pooled.loss}
        if health := study.report():
            figures["health"] = health
    return figures


def prose_of(corpora: Sequence[Corpus]) -> list[Corpus]:
    """The corpora of prose; all, if there is none."""
    return [corpus for corpus in corpora if corpus.name in PROSE] or list(corpora)
