from collections import Counter

import numpy as np
import pytest
from small_corpora import random_texts

from engram_jax.data.mixture import RowMixture
from engram_jax.data.packing import PackedRows
from engram_jax.errors import InputError


@pytest.fixture
def sources(corpus_of):
    corpora = [
        corpus_of(random_texts(count, 40, seed=count), name=f"texts{count}") for count in (30, 7, 3)
    ]
    return [PackedRows(corpus.train, 8, 0, number) for number, corpus in enumerate(corpora)]


@pytest.mark.parametrize("weights", [(), (0.3, 0.6, 0.1), (5.0, 1.0, 1.0)])
def test_each_source_gets_its_exact_share_in_its_own_order(sources, weights):
    mixture = RowMixture(sources, weights)
    period = sum(mixture.shares)
    located = [mixture.locate(index) for index in range(17 + 2 * period)]
    for start in (0, period, 17):
        counts = Counter(source for source, _ in located[start : start + period])
        assert tuple(counts[source] for source in range(3)) == mixture.shares
    for source in range(3):
        rows = [row for of, row in located if of == source]
        assert rows == list(range(len(rows)))
    # Evenly: in every prefix, the number of rows differs by at most two from the share.
    for count in range(1, period):
        for source, share in enumerate(mixture.shares):
            seen = sum(of == source for of, _ in located[:count])
            assert abs(seen - count * share / period) < 2


def test_shares_are_the_decimals_given_or_the_natural_sizes(sources):
    assert RowMixture(sources, (0.3, 0.6, 0.1)).shares == (3, 6, 1)
    natural = np.array([source.rows_per_epoch for source in sources])
    assert RowMixture(sources).shares == tuple(natural // np.gcd.reduce(natural))


def test_rows_are_those_of_the_sources(sources):
    mixture = RowMixture(sources, (2.0, 1.0, 1.0))
    indices = np.random.default_rng(0).integers(0, 1000, 50)
    rows = mixture.rows(indices)
    for place, index in enumerate(indices):
        source, row = mixture.locate(int(index))
        for field, expected in zip(
            rows[:5], sources[source].rows(np.array([row]))[:5], strict=True
        ):
            assert np.array_equal(field[place], expected[0])


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0, 0.0), (1.0, 1.0, -1.0), (1.0, 1.0, np.nan)])
def test_bad_weights_are_refused(sources, weights):
    with pytest.raises(InputError, match="weights"):
        RowMixture(sources, weights)


def test_no_sources_are_refused():
    with pytest.raises(InputError, match="no data sources"):
        RowMixture([])
