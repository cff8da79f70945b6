"""Statistics of n-grams and rows, compared with manual counts."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_jax.compression import VocabularyProjection
from engram_jax.errors import InputError
from engram_jax.evaluation import statistics
from engram_jax.evaluation.statistics import (
    count_full_collisions,
    count_ngrams,
    expected_full_collisions,
    expected_occupancy,
    frequency_bins,
    mean_by_bin,
    ngram_keys,
    row_occupancy,
)
from engram_jax.hashing import HashSpec, NgramHash
from engram_jax.memory.places import stored_places

PROJECTION = VocabularyProjection(np.array([0, 1, 2, 1, 3, 4, 2], np.int32))


def make_hash(max_order: int = 3, rows: int = 5, heads: int = 2) -> NgramHash:
    sizes = (rows,) * (max_order - 1)
    spec = HashSpec(layers=(2, 0), max_order=max_order, heads=heads, rows_per_head=sizes)
    return NgramHash.build(spec, PROJECTION)


def draw_text(seed: int, shape: tuple[int, int] = (6, 40)) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with dead positions, and their segments."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 7, shape, dtype=np.int32)
    tokens[generator.random(shape) < 0.05] = -1
    return tokens, np.cumsum(generator.random(shape) < 0.1, axis=-1, dtype=np.int32)


def spell(tokens: np.ndarray, segments: np.ndarray, order: int) -> list[tuple[int, ...]]:
    """The n-gram at every position, latest id first, from a loop over earlier positions."""
    ngrams = []
    for row, documents in zip(tokens.tolist(), segments.tolist(), strict=True):
        for end in range(len(row)):
            ids: list[int] = []
            for place in range(end, end - order, -1):
                if place < 0 or row[place] == -1 or documents[place] != documents[end]:
                    break
                ids.append(int(PROJECTION.lookup[row[place]]))
            ngrams.append(tuple(ids) + (0,) * (order - len(ids)))
    return ngrams


def spell_key(ngram: tuple[int, ...]) -> int:
    return sum(id_ * 5**back for back, id_ in enumerate(ngram))


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), max_order=st.integers(2, 4), at_once=st.integers(1, 6))
def test_counts_are_those_by_hand(seed: int, max_order: int, at_once: int) -> None:
    tokens, segments = draw_text(seed)
    starts = range(0, len(tokens), at_once)
    parts = [(tokens[i : i + at_once], segments[i : i + at_once]) for i in starts]
    ngram_hash = make_hash(max_order)
    counts = count_ngrams(ngram_hash, parts)
    assert list(counts) == list(range(2, max_order + 1))
    others = draw_text(seed + 1)
    for order, of_order in counts.items():
        expected = Counter(map(spell_key, spell(tokens, segments, order)))
        assert dict(zip(of_order.keys.tolist(), of_order.times.tolist(), strict=True)) == expected
        assert np.all(np.diff(of_order.keys.astype(np.int64)) > 0)
        times = of_order.of(ngram_keys(ngram_hash, *others)[order])
        assert times.shape == others[0].shape
        assert times.ravel().tolist() == [expected[spell_key(n)] for n in spell(*others, order)]


def test_nothing_read_is_nothing_met() -> None:
    ngram_hash = make_hash()
    for order, counts in count_ngrams(ngram_hash, []).items():
        assert not counts.of(ngram_keys(ngram_hash, *draw_text(0))[order]).any()
        assert count_full_collisions(ngram_hash, 2, order, counts.keys) == 0
        assert expected_full_collisions(ngram_hash.primes[0, order - 2], 0) == 0


def test_keys_of_more_than_64_bits_are_refused() -> None:
    spec = HashSpec(max_order=4, rows_per_head=(5, 5, 5))
    fits = NgramHash.build(spec, VocabularyProjection.identity(2**16))
    largest = np.full((1, 4), 2**16 - 1)
    assert ngram_keys(fits, largest)[4][0, -1] == 2**64 - 1
    with pytest.raises(InputError, match="4-grams of 65,537 ids"):
        ngram_keys(NgramHash.build(spec, VocabularyProjection.identity(2**16 + 1)), largest)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("layer", [2, 0])
@pytest.mark.parametrize("heads", [1, 2])
def test_full_collisions_share_every_row(
    layer: int, order: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_PART", 16)
    ngram_hash, text = make_hash(heads=heads), draw_text(7)
    columns = slice((order - 2) * heads, (order - 1) * heads)
    rows = ngram_hash.hash_tokens(layer, *text)[..., columns].reshape(-1, heads)
    rows_of = {
        ngram: tuple(own) for ngram, own in zip(spell(*text, order), rows.tolist(), strict=True)
    }
    shared = Counter(rows_of.values())
    expected = sum(shared[own] > 1 for own in rows_of.values())
    keys = count_ngrams(ngram_hash, [text])[order].keys
    assert count_full_collisions(ngram_hash, layer, order, keys) == expected
    assert expected > 0 and (heads == 1 or expected < len(keys))


@pytest.mark.parametrize("layer", [2, 0])
def test_occupancy_is_by_head(layer: int) -> None:
    ngram_hash = make_hash(rows=1500)  # 4,096 padded rows would have place = row number
    index = ngram_hash.spec.layers.index(layer)
    rows = ngram_hash.hash_tokens(layer, *draw_text(3, (2, 20)))
    padded = ngram_hash.padded_rows[index]
    assert padded == 8192
    written = np.zeros(padded, bool)
    written[stored_places(rows, padded)] = True
    written[stored_places(np.array([ngram_hash.rows[index]], np.int32), padded)] = True  # padding
    found = row_occupancy(ngram_hash, layer, written)
    for column, (head, size) in enumerate(np.ndenumerate(ngram_hash.primes[index])):
        assert found[head] == len(set(rows[..., column].ravel().tolist())) / size


def test_an_ideal_hash_does_on_average_what_is_expected() -> None:
    generator, sizes = np.random.default_rng(0), np.array([7, 11])
    shares, colliding = [], []
    for _ in range(4000):
        rows = generator.integers(0, sizes, (9, 2))
        shares.append([len(set(head)) / size for head, size in zip(rows.T, sizes, strict=True)])
        shared = Counter(map(tuple, rows.tolist()))
        colliding.append(sum(count for count in shared.values() if count > 1))
    for drawn, expected in (
        (np.array(shares), expected_occupancy(sizes, 9)),
        (np.array(colliding), expected_full_collisions(sizes, 9)),
    ):
        error = drawn.std(axis=0) / np.sqrt(len(drawn))
        assert np.all(np.abs(drawn.mean(axis=0) - expected) < 4 * error)


def test_heads_of_one_row_are_full_after_one_ngram() -> None:
    for distinct, used in ((0, 0), (1, 1), (9, 1)):
        found = expected_occupancy(np.array([1, 2]), distinct)
        np.testing.assert_allclose(found, [used, 1 - 0.5**distinct])
    collide = [expected_full_collisions(np.array([1, 1]), distinct) for distinct in (0, 1, 9)]
    assert collide == [0, 0, 9]
    # One of two heads can distinguish n-grams.
    assert expected_full_collisions(np.array([1, 2]), 3) == pytest.approx(3 * 0.75)


def test_bins_double() -> None:
    times = [*range(5000), 2**40 - 1, 2**40]
    found = frequency_bins(np.array(times))
    assert found.tolist() == [number.bit_length() for number in times]


def test_means_by_bin_and_their_errors() -> None:
    """Compared with the bootstrap. Bin 2 has one document, bin 3 none."""
    generator = np.random.default_rng(4)
    documents = np.repeat(np.arange(300) * 10**10, generator.integers(5, 60, 300))
    bins = generator.choice([0, 1], len(documents))
    values = generator.normal(4, 1, len(documents)) + np.sin(documents)
    bins[-1] = 4
    bins[:5] = 2  # of one document
    means = mean_by_bin(values, bins, documents)
    for number in (0, 1, 2, 4):
        assert means.mean[number] == pytest.approx(values[bins == number].mean())
    assert np.isnan(means.mean[3]) and np.isnan(means.standard_error[2:]).all()
    for number in (0, 1):
        chosen = bins == number
        _, of = np.unique(documents[chosen], return_inverse=True)
        tokens, sums = np.bincount(of), np.bincount(of, values[chosen])
        draws = generator.integers(0, len(tokens), (4000, len(tokens)))
        drawn = sums[draws].sum(1) / tokens[draws].sum(1)
        assert means.standard_error[number] == pytest.approx(drawn.std(), rel=0.06)
