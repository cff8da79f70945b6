"""Held-out scores with and without the memory, as a table and as JSON."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from engram_jax.data.corpus import Corpus
from engram_jax.data.sources import ALL_SOURCES
from engram_jax.evaluation.held_out import (
    Score,
    ScoredBatch,
    Scorer,
    Suppress,
    count_scored,
    difference,
    evaluate_held_out,
    make_scorer,
    pool,
)
from engram_jax.processes import is_leader
from engram_jax.program import Program
from engram_jax.train_state import Weights

POOLED = ALL_SOURCES

_ABLATIONS: dict[Suppress, str] = {"output": "memory dropped", "rows": "rows zeroed"}


@dataclass(frozen=True)
class Ablation:
    """Scores with a part of the memory suppressed.

    Attributes:
        score: the score of the model without that part.
        harm: the loss without that part minus the loss of the full model.
    """

    score: Score
    harm: Score


@dataclass(frozen=True)
class SourceReport:
    """The scores of one source, or of all sources.

    Attributes:
        score: of the full model.
        ablations: by the suppressed part (see `make_scorer`); empty for a model without memory.
    """

    score: Score
    ablations: dict[Suppress, Ablation]


def evaluate(
    program: Program,
    scorer: Scorer,
    weights: Weights,
    corpora: Sequence[Corpus],
    *,
    max_tokens: int | None = None,
    watch: Callable[[Suppress, ScoredBatch], object] | None = None,
    with_gates: bool = False,
) -> dict[str, SourceReport]:
    """Scores every corpus, and all of them pooled, under the key `POOLED`.

    A model with memory is also scored with parts of the memory suppressed (§6.3).

    Args:
        program: the program.
        scorer: of the full model, from `make_scorer`.
        weights: parameters and tables.
        corpora: corpora whose held-out documents are scored.
        max_tokens: number of tokens to score per corpus; None: all.
        watch: called after every batch, with the suppressed part; all passes use the same batches.
        with_gates: give the gates of the full model to `watch`.

    Raises:
        InputError: a corpus has no held-out documents.
    """
    parts: list[Suppress] = list(_ABLATIONS) if weights.tables else []
    with (
        program.use_mesh(),
        tqdm(
            total=count_scored(corpora, max_tokens) * (1 + len(parts)),
            unit=" tokens",
            unit_scale=True,
            leave=False,
            disable=not is_leader(),
        ) as bar,
    ):

        def score(part: Suppress, scorer: Scorer) -> dict[str, Score]:
            def see(scored: ScoredBatch) -> None:
                bar.update(int(scored.mask.sum()))
                if watch:
                    watch(part, scored)

            what = f"with {_ABLATIONS[part]}" if part in _ABLATIONS else "the full model"
            bar.set_description(f"scoring {what}")
            return evaluate_held_out(
                program,
                scorer,
                weights,
                corpora,
                max_tokens=max_tokens,
                watch=see,
                with_gates=with_gates and part == "nothing",
            )

        full = score("nothing", scorer)
        suppressed = {part: score(part, make_scorer(program, part)) for part in parts}
    return _compare(full, suppressed)


def _compare(
    full: dict[str, Score], suppressed: dict[Suppress, dict[str, Score]]
) -> dict[str, SourceReport]:
    """The reports of all sources, and of all pooled, from the scores of every pass."""
    harms = {
        part: {name: difference(scores[name], full[name]) for name in full}
        for part, scores in suppressed.items()
    }
    report = {
        name: SourceReport(
            full[name],
            {
                part: Ablation(scores[name], harms[part][name])
                for part, scores in suppressed.items()
            },
        )
        for name in full
    }
    report[POOLED] = SourceReport(
        pool(list(full.values())),
        {
            part: Ablation(pool(list(scores.values())), pool(list(harms[part].values())))
            for part, scores in suppressed.items()
        },
    )
    return report


def format_report(report: dict[str, SourceReport]) -> str:
    """Two tables: the full model; the increase of the loss without parts of the memory."""
    width = max(len("held-out text"), *map(len, report))
    lines = [
        f"{'held-out text':<{width}}  {'loss ± s.e.':>15}  {'perplexity':>10}  "
        f"{'bits/byte':>9}  {'tokens':>10}  {'documents':>9}"
    ]
    for name, of_source in report.items():
        score = of_source.score
        lines.append(
            f"{name:<{width}}  {_with_error(score):>15}  {score.perplexity:>10,.1f}  "
            f"{score.bits_per_byte:>9.3f}  {score.tokens:>10,}  {score.documents:>9,}"
        )
    parts = list(report[POOLED].ablations)
    if parts:
        header = [f"{_ABLATIONS[part]:>15}  {'increase ± s.e.':>16}" for part in parts]
        lines += ["", "  ".join([f"{'loss':<{width}}", f"{'full':>7}", *header])]
        for name, of_source in report.items():
            cells = [
                f"{ablation.score.loss:>15.3f}  {_with_error(ablation.harm, signed=True):>16}"
                for ablation in of_source.ablations.values()
            ]
            lines.append("  ".join([f"{name:<{width}}", f"{of_source.score.loss:>7.3f}", *cells]))
    lines += [
        "",
        "Losses are in nats per token. Standard errors are over documents; those of increases are"
        " over\npaired documents.",
    ]
    return "\n".join(lines)


def to_json(report: dict[str, SourceReport]) -> dict[str, Any]:
    """The report as JSON-serializable values."""
    return {
        name: _plain(of_source.score)
        | {
            "without_memory": {
                part: {
                    "loss": ablation.score.loss,
                    "standard_error": ablation.score.standard_error,
                    "difference": ablation.harm.loss,
                    "difference_standard_error": ablation.harm.standard_error,
                }
                for part, ablation in of_source.ablations.items()
            }
        }
        for name, of_source in report.items()
    }


def _plain(score: Score) -> dict[str, Any]:
    return {
        "loss": score.loss,
        "standard_error": score.standard_error,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "documents": score.documents,
    }


def _with_error(score: Score, *, signed: bool = False) -> str:
    loss = f"{score.loss:{'+' if signed else ''}.3f}"
    return loss if score.standard_error is None else f"{loss} ± {score.standard_error:.3f}"
