"""Places of rows, and the capacity of the exchange."""

import numpy as np
import pytest

from engram_jax.compression import VocabularyProjection
from engram_jax.hashing import HashSpec, NgramHash
from engram_jax.memory.places import exchange_capacity, expected_distinct, stored_places


@pytest.mark.parametrize("padded_rows", [4096, 3 * 4096, 53 * 4096])
def test_every_row_has_a_place_of_its_own(padded_rows: int) -> None:
    places = stored_places(np.arange(padded_rows, dtype=np.int32), padded_rows)
    assert places.dtype == np.int32
    np.testing.assert_array_equal(np.sort(places), np.arange(padded_rows))


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


def test_capacity_leaves_room_for_chance_and_no_more() -> None:
    assert exchange_capacity(1000, 1) == 1000
    assert exchange_capacity(8, 4) == 8  # never more than there are
    for distinct, shards in ((65_536, 64), (65_536, 8), (32_768, 1024)):
        mean = expected_distinct(distinct) / shards
        capacity = exchange_capacity(distinct, shards)
        assert 1.05 * mean + 6 * mean**0.5 <= capacity < 1.05 * mean + 6 * mean**0.5 + 8
        assert capacity % 8 == 0


@pytest.mark.parametrize("shards", [8, 64, 256])
@pytest.mark.parametrize(
    ("tokens", "largest_share"),
    # Of all shipped sources and of each alone; the last two with n-grams of up to 4 tokens.
    [
        *((256, 0.984), (512, 0.970), (1024, 0.948), (2048, 0.914), (4096, 0.880)),
        *((8192, 0.852), (20_480, 0.793), (4096, 0.912), (20_480, 0.846)),
    ],
)
def test_text_needs_one_round(tokens: int, largest_share: float, shards: int) -> None:
    """Also for a pair of devices that has four standard deviations more than the mean."""
    reads = 16 * tokens
    mean = largest_share * reads / shards
    assert mean + 4 * mean**0.5 <= exchange_capacity(reads, shards)
