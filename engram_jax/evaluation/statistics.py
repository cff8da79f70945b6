"""Statistics of n-grams and of their table rows. Pure NumPy.

An n-gram consists of projected ids, as for the hash: before the start of a document or a row, it
has the pad id. Its key is one unsigned 64-bit integer, Σ x₋ⱼ · V′ʲ over its ids x, x₋₁, ….
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int32, Int64, UInt64

from engram_jax.errors import InputError
from engram_jax.hashing import NgramHash
from engram_jax.memory.places import stored_places

_PART = 1 << 18  # n-grams hashed at a time: 16 MiB of rows for 16 columns


@dataclass
class NgramCounts:
    """The frequencies of the n-grams of one order.

    Attributes:
        keys: of the distinct n-grams, ascending.
        times: frequency of each.
    """

    keys: UInt64[np.ndarray, "distinct"] = field(default_factory=lambda: np.empty(0, np.uint64))
    times: Int64[np.ndarray, "distinct"] = field(default_factory=lambda: np.empty(0, np.int64))

    def add(self, met: UInt64[np.ndarray, "*batch"]) -> None:
        """Adds n-grams to the counts."""
        keys, times = np.unique(met, return_counts=True)
        at, known = self._find(keys)
        self.times[at[known]] += times[known]
        self.keys = np.insert(self.keys, at[~known], keys[~known])
        self.times = np.insert(self.times, at[~known], times[~known])

    def of(self, keys: UInt64[np.ndarray, "*batch"]) -> Int64[np.ndarray, "*batch"]:
        """The frequency of each of these n-grams."""
        at, known = self._find(keys)
        times = np.zeros(keys.shape, np.int64)
        times[known] = self.times[at[known]]
        return times

    def _find(
        self, keys: UInt64[np.ndarray, "*batch"]
    ) -> tuple[Int64[np.ndarray, "*batch"], Bool[np.ndarray, "*batch"]]:
        """The index of each key in `keys` (or its insertion index), and whether it is there."""
        at = np.searchsorted(self.keys, keys)
        known = at < len(self.keys)
        known[known] = self.keys[at[known]] == keys[known]
        return at, known


def ngram_keys(
    ngram_hash: NgramHash,
    tokens: Int[np.ndarray, "*batch T"],
    segments: Int[np.ndarray, "*batch T"] | None = None,
) -> dict[int, UInt64[np.ndarray, "*batch T"]]:
    """The key of the n-gram that ends at each position, by order 2…N.

    Args:
        ngram_hash: the hash.
        tokens: token ids; −1 marks image placeholders.
        segments: document number of every position; None: each row of the batch is one document.

    Raises:
        InputError: keys do not fit into 64 bits, or an id is outside the vocabulary.
    """
    size, longest = ngram_hash.projection.size, ngram_hash.spec.max_order
    if size**longest > 2**64:
        raise InputError(
            f"{longest}-grams of {size:,} ids cannot be counted: their keys exceed 64 bits."
        )
    key, *older = ngram_hash.look_back(tokens, segments)
    keys = {}
    for back, ids in enumerate(older, start=1):
        key = key + ids * np.uint64(size**back)
        keys[back + 1] = key
    return keys


def count_ngrams(
    ngram_hash: NgramHash,
    rows: Iterable[tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]],
) -> dict[int, NgramCounts]:
    """Counts the n-grams of rows, by order 2…N.

    Memory use is 16 bytes per distinct n-gram, plus one part of the rows.

    Args:
        ngram_hash: the hash.
        rows: the rows in parts; each part is its tokens and segments.
    """
    counts = {order: NgramCounts() for order in range(2, ngram_hash.spec.max_order + 1)}
    for tokens, segments in rows:
        for order, keys in ngram_keys(ngram_hash, tokens, segments).items():
            counts[order].add(keys)
    return counts


def count_full_collisions(
    ngram_hash: NgramHash, layer: int, order: int, keys: UInt64[np.ndarray, "G"]
) -> int:
    """The number of n-grams that share the rows of all K heads with another n-gram.

    The memory cannot distinguish such n-grams. Rows are compared by a randomly weighted sum of 64
    bits. Two n-grams with different rows have equal sums with a probability of about 2⁻⁶⁴: one pair
    in 10⁵ counts of 10⁷ n-grams.

    Args:
        ngram_hash: the hash.
        layer: layer id.
        order: order of the n-grams.
        keys: distinct keys from `ngram_keys`.
    """
    generator = np.random.default_rng(0)
    weights = generator.integers(2**63, size=ngram_hash.spec.heads, dtype=np.uint64) * 2 + 1
    sums = np.empty(len(keys), np.uint64)
    for start in range(0, len(keys), _PART):
        part = slice(start, start + _PART)
        sums[part] = weights @ head_rows(ngram_hash, layer, order, keys[part]).astype(np.uint64)
    _, members = np.unique(sums, return_counts=True)
    return int(members[members > 1].sum())


def head_rows(
    ngram_hash: NgramHash, layer: int, order: int, keys: UInt64[np.ndarray, "G"]
) -> Int32[np.ndarray, "K G"]:
    """Table rows of n-grams of one order, in the K heads of that order."""
    size = ngram_hash.projection.size
    window = [keys // np.uint64(size**back) % np.uint64(size) for back in range(order)]
    return ngram_hash.hash_window(layer, window)[-ngram_hash.spec.heads :]


def row_occupancy(
    ngram_hash: NgramHash, layer: int, written: Bool[np.ndarray, "R"]
) -> Float64[np.ndarray, "orders K"]:
    """The share of each head's rows that training has written.

    Args:
        ngram_hash: the hash.
        layer: layer id.
        written: whether training has written each row, in the order in which tables are stored.
    """
    index = ngram_hash.spec.layers.index(layer)
    primes, offsets = ngram_hash.primes[index], ngram_hash.offsets[index]
    shares = np.empty(primes.shape)
    for head, rows in np.ndenumerate(primes):
        numbers = np.arange(offsets[head], offsets[head] + rows, dtype=np.int32)
        shares[head] = written[stored_places(numbers, len(written))].mean()
    return shares


def expected_occupancy(
    rows: Int64[np.ndarray, "*heads"], distinct: int
) -> Float64[np.ndarray, "*heads"]:
    """The expected share of a head's rows that `distinct` n-grams use, with an ideal hash."""
    return _chance_of_any(1 / rows, distinct)


def expected_full_collisions(rows: Int64[np.ndarray, "K"], distinct: int) -> float:
    """The expected value of `count_full_collisions` with an ideal hash."""
    chance = np.exp(-np.log(rows).sum(keepdims=True))  # that two n-grams share all rows
    return distinct * _chance_of_any(chance, distinct - 1).item()


def _chance_of_any(
    chance: Float64[np.ndarray, "*heads"], trials: int
) -> Float64[np.ndarray, "*heads"]:
    """The probability that one or more of some independent trials succeed."""
    certain = np.asarray(chance == 1)
    uncertain = np.where(certain, 0, chance)
    return np.where(certain, trials > 0, -np.expm1(trials * np.log1p(-uncertain)))


def frequency_bins(times: Int64[np.ndarray, "*batch"]) -> Int32[np.ndarray, "*batch"]:
    """Bin 0 for 0, and bin i for 2ⁱ⁻¹ to 2ⁱ − 1: 1, 2–3, 4–7, …"""
    return np.frexp(times)[1].astype(np.int32)


@dataclass(frozen=True)
class BinMeans:
    """A mean per bin, and its standard error over documents.

    The mean is NaN for a bin without tokens, the error for a bin of fewer than two documents.
    """

    mean: Float64[np.ndarray, "bins"]
    standard_error: Float64[np.ndarray, "bins"]


def mean_by_bin(
    values: Float[np.ndarray, "tokens"],
    bins: Int[np.ndarray, "tokens"],
    documents: Int[np.ndarray, "tokens"],
) -> BinMeans:
    """The mean of the values in each bin.

    Args:
        values: value of each token.
        bins: bin of each token.
        documents: document of each token. Documents are independent samples, tokens are not.
    """
    names, document = np.unique(documents, return_inverse=True)
    shape = len(names), int(bins.max()) + 1
    cell = document * shape[1] + bins
    tokens = np.bincount(cell, minlength=math.prod(shape)).reshape(shape)
    sums = np.bincount(cell, values, minlength=math.prod(shape)).reshape(shape)
    total, count = tokens.sum(axis=0), np.count_nonzero(tokens, axis=0).astype(float)
    mean = sums.sum(axis=0) / np.where(total > 0, total, np.nan)
    # The mean is a ratio of two sums over documents.
    squares = ((sums - mean * tokens) ** 2).sum(axis=0)
    correction = count / np.where(count > 1, count - 1, np.nan)
    return BinMeans(mean, np.sqrt(squares * correction) / total)
