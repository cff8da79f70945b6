"""Several corpora as one endless sequence of rows."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int64

from engram_jax.data.packing import Batch, PackedRows, empty_rows, place_rows
from engram_jax.errors import InputError


class RowMixture:
    """Rows of several corpora, interleaved evenly in fixed shares.

    The shares are exact: each run of sum(shares) rows holds `shares[s]` rows of source s, in
    their order. Row i depends on (sources, weights, i) alone.

    Attributes:
        sources: the packed corpora.
        shares: whole numbers without a common factor, one a source.
    """

    def __init__(self, sources: Sequence[PackedRows], weights: Sequence[float] = ()) -> None:
        """Mix by `weights` (relative shares of rows); by default each corpus at its natural size.

        Raises:
            InputError: no sources, another number of weights, a weight that is not positive.
        """
        if not sources:
            raise InputError("no data sources; name at least one.")
        if weights and len(weights) != len(sources):
            raise InputError(f"{len(weights)} weights for {len(sources)} sources; give one each.")
        if not all(0 < weight < math.inf for weight in weights):
            raise InputError(f"weights must be positive, not {list(weights)}; leave a source out.")
        self.sources = tuple(sources)
        # By the decimals that the user wrote: 0.3 is 3/10, not the nearest binary fraction.
        exact = [Fraction(str(weight)) for weight in weights] or [
            Fraction(source.rows_per_epoch) for source in sources
        ]
        whole = [weight * math.lcm(*(each.denominator for each in exact)) for weight in exact]
        self.shares = tuple(int(weight / math.gcd(*map(int, whole))) for weight in whole)

    def locate(self, index: int) -> tuple[int, int]:
        """Return (source, row of that source) of row `index`.

        Source 0 takes its share of all rows, evenly spaced; source 1 its share of what is left;
        and so on: `left` of the first `index` rows are left to the later sources.
        """
        left, following, total = index, index + 1, sum(self.shares)
        for source, share in enumerate(self.shares):
            next_left = left * (total - share) // total
            next_following = following * (total - share) // total
            if next_left == next_following:
                return source, left - next_left
            left, following, total = next_left, next_following, total - share
        raise AssertionError("the last source takes all that is left")

    def rows(self, indices: Int64[np.ndarray, "B"]) -> Batch:
        """Return the rows of these numbers."""
        located = np.array([self.locate(int(index)) for index in indices], np.int64)
        packed = empty_rows(len(indices), self.sources[0].sequence_length)
        for number, source in enumerate(self.sources):
            chosen = located[:, 0] == number
            if chosen.any():
                place_rows(packed, chosen, source.rows(located[chosen, 1]))
        return packed
