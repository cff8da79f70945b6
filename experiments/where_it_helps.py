"""Where the memory helps: Engram against its twin, by class of token and frequency of the n-gram.

    python -m experiments.where_it_helps [--jobs N]

Both models score the same held-out prose. Losses are summed by group of tokens and by block of
documents (a twentieth of them), so that differences are paired by document. A token's class is
that of its word (`token_classes.py`); its frequency is that of the 3-gram before it in the training
text.
Cost: 2 configurations × 3 seeds, 10 to 20 minutes each on one core of a CPU.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int32
from matplotlib.figure import Figure

from engram_jax.compression import project_vocabulary
from engram_jax.data.packing import Batch
from engram_jax.evaluation.held_out import ScoredBatch, evaluate_held_out, make_scorer
from engram_jax.evaluation.memory_report import training_rows
from engram_jax.evaluation.statistics import count_ngrams, frequency_bins, ngram_keys
from engram_jax.hashing import HashSpec, NgramHash
from engram_jax.run import Run
from engram_jax.tokenizer import Tokenizer
from engram_jax.train_state import Weights
from experiments.measure import prose_of
from experiments.report import STYLE
from experiments.results import Results, standard_error
from experiments.sweep import Arm, Experiment, Family, main
from experiments.token_classes import CLASSES, classify

BLOCKS = 20  # of documents
ORDER = 3
ENGRAM, BASELINE = "Engram", "no memory"


def arms(family: Family) -> Sequence[Arm]:
    """Engram and the same backbone without memory."""
    config = family("engram")
    return [
        Arm(BASELINE, config.without_memory(), measure=by_group),
        Arm(ENGRAM, config, measure=by_group),
    ]


def by_group(run: Run, weights: Weights) -> dict[str, Any]:
    """Sums of losses and numbers of tokens by group and block of documents: {"groups": {…}}."""
    tokenizer = run.tokenizer
    spec = HashSpec(pad_id=tokenizer.pad_id)
    ngram_hash = NgramHash.build(spec, project_vocabulary(tokenizer))
    rows = int(weights.step) * run.config.data.batch_size
    counts = count_ngrams(ngram_hash, training_rows(run, rows, at_once=4096))[ORDER]
    groups: dict[str, Any] = defaultdict(lambda: np.zeros((2, BLOCKS)))

    def add(scored: ScoredBatch) -> None:
        rows, chosen = scored.rows, scored.mask > 0
        keys = ngram_keys(ngram_hash, rows.tokens, rows.segments)[ORDER]
        block = rows.documents % BLOCKS
        for by_frequency, numbers in (
            (False, target_classes(tokenizer, rows)),
            (True, frequency_bins(counts.of(keys))),
        ):
            for number in np.unique(numbers[chosen & (numbers >= 0)]):
                of_group = chosen & (numbers == number)
                name = _seen(number) if by_frequency else CLASSES[number]
                for values, total in zip((scored.losses, scored.mask), groups[name], strict=True):
                    total += np.bincount(block[of_group], values[of_group], BLOCKS)

    scorer = make_scorer(run.program)
    with run.program.use_mesh():
        evaluate_held_out(run.program, scorer, weights, prose_of(run.corpora()), watch=add)
    return {
        "groups": {
            name: {"loss": np.round(sums[0], 3).tolist(), "tokens": sums[1].astype(int).tolist()}
            for name, sums in sorted(groups.items())
        }
    }


def target_classes(tokenizer: Tokenizer, rows: Batch) -> Int32[np.ndarray, "B T"]:
    """The class of the token after every position, or −1 for a special token."""
    classes = np.full(rows.tokens.shape, -1, np.int32)
    for row, segments in enumerate(rows.segments):
        starts = np.flatnonzero(np.diff(segments, prepend=-1))
        for start, end in pairwise([*starts, len(segments)]):
            ids = [int(i) for i in (*rows.tokens[row, start:end], rows.targets[row, end - 1])]
            special = np.array([tokenizer.is_special(i) for i in ids])
            texts = ["" if tokenizer.is_special(i) else _text(tokenizer.piece(i)) for i in ids]
            classes[row, start:end] = np.where(special, -1, classify(texts))[1:]
    return classes


def _text(piece: str) -> str:
    """The text of a piece; a byte of a character without a piece is U+FFFD."""
    return "\ufffd" if piece.startswith("<0x") else piece.replace("\u2581", " ")


def _seen(number: int) -> str:
    """The name of a bin of `frequency_bins`."""
    least = 2**number // 2
    return ("never seen", "seen once")[number] if number < 2 else f"seen {least}–{2 * least - 1} ×"


def draw(results: Results, figure: Figure) -> str:
    """Two panels of differences; returns a table of them."""
    left, right = figure.subplots(1, 2)
    groups = {name for record in results.records for name in record["groups"]}
    seen = [name for name in map(_seen, range(64)) if name in groups]
    lines = [
        "| held-out tokens | number | loss without memory | Engram minus it, ± s.e. over documents "
        "| s.e. over seeds |",
        "|---|---|---|---|---|",
    ]
    for axes, names in ((left, [name for name in CLASSES if name in groups]), (right, seen)):
        for place, name in enumerate(names):
            difference = compare(results, name)
            if difference is None:
                continue
            mean, error = difference.mean, difference.over_documents
            axes.errorbar(mean, place, xerr=error, color="#3b6fd4", **STYLE)
            lines.append(
                f"| {name} | {difference.tokens:,.0f} | {difference.twin:.3f} "
                f"| {mean:+.3f} ± {error:.3f} | {difference.over_seeds:.3f} |"
            )
        axes.axvline(0, color="#222", linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("nats per token")
    left.set_title("by class of the predicted token", fontsize=10)
    right.set_title(f"by frequency of the {ORDER}-gram before it", fontsize=10)
    return "\n".join(lines)


class Difference(NamedTuple):
    """Engram's loss on a group of tokens minus the twin's; of the seeds that both have.

    Attributes:
        mean: over seeds, in nats per token.
        over_documents: its standard error over documents.
        over_seeds: its standard error over seeds; NaN for one seed.
        twin: the twin's loss, mean over seeds.
        tokens: number of tokens, mean over seeds.
    """

    mean: float
    over_documents: float
    over_seeds: float
    twin: float
    tokens: float


def compare(results: Results, group: str) -> Difference | None:
    """The difference on a group; None: no seed has it.

    Groups of frequent n-grams depend on the training text, and so on the seed: each seed's sum of
    losses is divided by that seed's number of tokens.
    """
    labels = (ENGRAM, BASELINE)
    losses = results.paired(labels, "groups", group, "loss")  # [2, seeds, blocks]
    if not losses.size:
        return None
    engram, twin = losses
    tokens, of_twin = results.paired(labels, "groups", group, "tokens")
    assert np.array_equal(tokens, of_twin), f"{group}: with one seed, both score the same tokens"
    mean, error = ratio_and_error(engram - twin, tokens)
    totals = tokens.sum(axis=1)
    by_seed = (engram - twin).sum(axis=1) / totals
    return Difference(
        mean=mean,
        over_documents=error,
        over_seeds=standard_error(by_seed),
        twin=float((twin.sum(axis=1) / totals).mean()),
        tokens=float(totals.mean()),
    )


def ratio_and_error(
    sums: Float[np.ndarray, "seeds blocks"], tokens: Float[np.ndarray, "seeds blocks"]
) -> tuple[float, float]:
    """The mean over seeds of a ratio of two sums, and its standard error over the blocks.

    All seeds have the same documents in a block, so their residuals are averaged by block.
    """
    totals = tokens.sum(axis=1, keepdims=True)
    ratios = sums.sum(axis=1, keepdims=True) / totals
    residuals = ((sums - ratios * tokens) / totals).mean(axis=0)[tokens.any(axis=0)]
    count = len(residuals)
    error = np.sqrt((residuals**2).sum() * count / max(count - 1, 1))
    return float(ratios.mean()), float(error)


EXPERIMENT = Experiment("where_it_helps", arms, BASELINE, draw)

if __name__ == "__main__":
    main(EXPERIMENT)
