"""Places of rows, and the capacity of the exchange."""

import itertools

import numpy as np
import pytest

from engram_jax.compression import VocabularyProjection
from engram_jax.data.documents import read_documents
from engram_jax.hashing import HashSpec, NgramHash
from engram_jax.memory.places import exchange_capacity, row_numbers, stored_places
from engram_jax.memory.plan import Planner
from engram_jax.tokenizer import load_tokenizer


@pytest.mark.parametrize("padded_rows", [4096, 3 * 4096, 53 * 4096])
def test_every_row_has_a_place_of_its_own(padded_rows: int) -> None:
    places = stored_places(np.arange(padded_rows, dtype=np.int32), padded_rows)
    assert places.dtype == np.int32
    np.testing.assert_array_equal(np.sort(places), np.arange(padded_rows))
    np.testing.assert_array_equal(row_numbers(places, padded_rows), np.arange(padded_rows))


@pytest.mark.parametrize("shards", [2, 64, 1024])
def test_every_head_is_spread_evenly_over_all_devices(shards: int) -> None:
    spec = HashSpec(layers=(1,), rows_per_head=(226_240, 40_000))
    ngram_hash = NgramHash.build(spec, VocabularyProjection.identity(1000))
    padded_rows = ngram_hash.padded_rows[0]
    for offset, size in zip(ngram_hash.offsets[0].flat, ngram_hash.primes[0].flat, strict=True):
        numbers = np.arange(offset, offset + size, dtype=np.int32)
        places = stored_places(numbers, padded_rows)
        counts = np.bincount(places // (padded_rows // shards), minlength=shards)
        # Complete sequences of 4,096 rows, and the incomplete ones at both ends of a head.
        assert counts.max() - counts.min() <= 2 * 4096 // shards


def test_capacity_is_never_more_than_there_are() -> None:
    assert exchange_capacity(1000, 1, 4096) == 1000
    assert exchange_capacity(8, 4, 1024) == 8
    assert exchange_capacity(4096, 8, 512) == 512  # all rows of a small table
    assert exchange_capacity(4000, 8, 512) == 512
    assert exchange_capacity(65_536, 64, 10**6) < 1.2 * 65_536 / 64


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    """The source with the largest share of distinct rows, as 64 rows of 512 tokens."""
    tokenizer = load_tokenizer("default")
    documents = itertools.islice(read_documents("vital_en"), 300)
    ids = np.concatenate([tokenizer.encode(document.text) for document in documents])
    return ids[: 64 * 512].reshape(1, 64, 512).astype(np.int32)


@pytest.mark.parametrize("max_order", [3, 4])
def test_text_needs_one_round(text: np.ndarray, max_order: int) -> None:
    """With 16 columns, and with 24 of n-grams of up to 4 tokens; a device has 1,024 to 16,384."""
    rows = (500_000,) * (max_order - 1)
    spec = HashSpec(layers=(0,), max_order=max_order, heads=8, rows_per_head=rows)
    ngram_hash = NgramHash.build(spec, VocabularyProjection.identity(8192))
    for shards in (2, 8, 32):
        plan = Planner(ngram_hash, shards=shards)(text).rows[0]
        assert plan.rounds.max() == 1
        owned = ngram_hash.padded_rows[0] // shards
        capacity = exchange_capacity(plan.places.shape[1], shards, owned)
        assert capacity * shards < 1.45 * plan.distinct.max()  # and not much more
