"""Several corpora as one infinite sequence of rows."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int64

from engram_jax.data.packing import Batch, PackedRows, empty_rows, place_rows
from engram_jax.errors import InputError

# `RowMixture.describe` has at most this many lines.
_MOST_LINES = 8


class RowMixture:
    """Rows of several corpora, interleaved evenly in fixed shares.

    The shares are exact: any sum(shares) consecutive rows contain `shares[s]` rows of source s, in
    the order of the source. Row i depends only on (sources, weights, i).

    Attributes:
        sources: the packed corpora.
        shares: one integer per source, without a common factor.
    """

    def __init__(self, sources: Sequence[PackedRows], weights: Sequence[float] = ()) -> None:
        """Mix by `weights` (relative shares of rows); by default, each corpus by its size.

        Raises:
            InputError: there are no sources, the number of weights is wrong, or a weight is not
                positive.
        """
        if not sources:
            raise InputError("no data sources; give at least one.")
        if weights and len(weights) != len(sources):
            raise InputError(
                f"{len(weights)} weights for {len(sources)} sources; give one weight per source."
            )
        if not all(0 < weight < math.inf for weight in weights):
            raise InputError(
                f"weights must be positive, not {list(weights)}; to leave a source out, remove it."
            )
        self.sources = tuple(sources)
        # Weights are exact decimals: 0.3 is 3/10, not the nearest binary fraction.
        exact = [Fraction(str(weight)) for weight in weights] or [
            Fraction(source.rows_per_epoch) for source in sources
        ]
        whole = [weight * math.lcm(*(each.denominator for each in exact)) for weight in exact]
        self.shares = tuple(int(weight / math.gcd(*map(int, whole))) for weight in whole)

    def locate(self, index: int) -> tuple[int, int]:
        """Return (source, row number in that source) of row `index`.

        Source 0 takes its share of all rows, evenly spaced. Source 1 takes its share of the
        remaining rows, and so on. `left` is how many of the first `index` rows remain for the
        sources not yet considered.
        """
        left, following, total = index, index + 1, sum(self.shares)
        for source, share in enumerate(self.shares):
            next_left = left * (total - share) // total
            next_following = following * (total - share) // total
            if next_left == next_following:
                return source, left - next_left
            left, following, total = next_left, next_following, total - share
        raise AssertionError("the last source takes all remaining rows")

    def rows(self, indices: Int64[np.ndarray, "B"]) -> Batch:
        """Return the rows of these numbers."""
        located = np.array([self.locate(int(index)) for index in indices], np.int64)
        packed = empty_rows(len(indices), self.sources[0].sequence_length)
        for number, source in enumerate(self.sources):
            chosen = located[:, 0] == number
            if chosen.any():
                place_rows(packed, chosen, source.rows(located[chosen, 1]))
        return packed

    def describe(self, count: int) -> list[str]:
        """Describe the first `count` rows: a line for each source, the largest share first."""
        shares = sorted(zip(self.shares, self.sources, strict=True), key=lambda pair: -pair[0])
        # The last line may be one for several sources.
        shown = len(shares) if len(shares) <= _MOST_LINES else _MOST_LINES - 1
        parts = [(pair[1].documents.corpus.name, [pair]) for pair in shares[:shown]]
        if others := shares[shown:]:
            parts.append((f"{len(others)} other sources", others))
        return [f"{name}: {_describe(part, count, sum(self.shares))}" for name, part in parts]


def _describe(part: Sequence[tuple[int, PackedRows]], count: int, total: int) -> str:
    """Sizes of sources with these shares of `total`, and their epochs in `count` rows."""
    views = [source.documents for _, source in part]
    epochs = [count * share / total / source.rows_per_epoch for share, source in part]
    ends = dict.fromkeys([_rounded(min(epochs)), _rounded(max(epochs))])
    return (
        f"{sum(map(len, views)):,} documents, "
        f"{_in_words(sum(view.token_count for view in views))} tokens, "
        f"{sum(share for share, _ in part) / total:.1%} of sequences, {' to '.join(ends)} epochs"
    )


def _in_words(tokens: int) -> str:
    if tokens >= 1e9:
        return f"{tokens / 1e9:.1f} B"
    return f"{tokens / 1e6:.1f} M" if tokens >= 1e6 else f"{tokens:,}"


def _rounded(epochs: float) -> str:
    return f"{epochs:,.1f}" if epochs >= 1 else f"{epochs:.1g}"
