from collections import Counter

import numpy as np
import pytest
from small_corpora import random_texts

from engram_jax.data import mixture
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
    mixed = RowMixture(sources, weights)
    period = sum(mixed.shares)
    located = [mixed.locate(index) for index in range(17 + 2 * period)]
    for start in (0, period, 17):
        counts = Counter(source for source, _ in located[start : start + period])
        assert tuple(counts[source] for source in range(3)) == mixed.shares
    for source in range(3):
        rows = [row for of, row in located if of == source]
        assert rows == list(range(len(rows)))
    # Evenly: in every prefix, the number of rows differs by at most two from the share.
    for count in range(1, period):
        for source, share in enumerate(mixed.shares):
            seen = sum(of == source for of, _ in located[:count])
            assert abs(seen - count * share / period) < 2


def test_shares_are_the_decimals_given_or_the_natural_sizes(sources):
    assert RowMixture(sources, (0.3, 0.6, 0.1)).shares == (3, 6, 1)
    natural = np.array([source.rows_per_epoch for source in sources])
    assert RowMixture(sources).shares == tuple(natural // np.gcd.reduce(natural))


def test_rows_are_those_of_the_sources(sources):
    mixed = RowMixture(sources, (2.0, 1.0, 1.0))
    indices = np.random.default_rng(0).integers(0, 1000, 50)
    rows = mixed.rows(indices)
    for place, index in enumerate(indices):
        source, row = mixed.locate(int(index))
        for field, expected in zip(
            rows[:5], sources[source].rows(np.array([row]))[:5], strict=True
        ):
            assert np.array_equal(field[place], expected[0])


def test_a_description_has_the_documents_shares_and_epochs_of_each_source(sources, monkeypatch):
    weights = {"texts30": 1.0, "texts7": 2.0, "texts3": 5.0}
    described = RowMixture(sources, list(weights.values())).describe(8000)
    read = {s.documents.corpus.name: (s, 1000 * weights[s.documents.corpus.name]) for s in sources}
    for line, name in zip(described, ("texts3", "texts7", "texts30"), strict=True):
        source, rows = read[name]
        documents, tokens = len(source.documents), source.documents.token_count
        epochs = f"{rows / source.rows_per_epoch:.1f} epochs"
        share = f"{weights[name] / 8:.1%} of sequences"
        assert line == f"{name}: {documents} documents, {tokens} tokens, {share}, {epochs}"
    monkeypatch.setattr(mixture, "_MOST_LINES", 2)
    first, others = RowMixture(sources, list(weights.values())).describe(8000)
    assert first == described[0]
    epochs = [line.split(", ")[-1].removesuffix(" epochs") for line in described]
    assert others.startswith("2 other sources: 37 documents, ")
    assert others.endswith(f", 37.5% of sequences, {epochs[2]} to {epochs[1]} epochs")


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0, 0.0), (1.0, 1.0, -1.0), (1.0, 1.0, np.nan)])
def test_bad_weights_are_refused(sources, weights):
    with pytest.raises(InputError, match="weights"):
        RowMixture(sources, weights)


def test_no_sources_are_refused():
    with pytest.raises(InputError, match="no data sources"):
        RowMixture([])
