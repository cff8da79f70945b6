"""Several corpora as one infinite sequence of rows."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int64

from engram_jax.data.packing import Batch, PackedRows, empty_rows, place_rows
from engram_jax.errors import InputError


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
