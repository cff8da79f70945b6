"""Row numbers and places on the device are those of the host."""

import jax
import numpy as np
import pytest
from golden import golden_hash, load_golden, qwen_hash, released_hash

from engram_jax import hashing_device
from engram_jax.compression import VocabularyProjection
from engram_jax.hashing import DEAD, HashSpec, NgramHash
from engram_jax.hashing_device import HashConstants
from engram_jax.memory.places import stored_places

SHAPES = ((1, 2, 1), (2, 3, 2), (1, 4, 3))  # layers, largest order, heads
VOCABULARIES = (500, 131_000)
POSITIONS = (5, 1000)


@jax.jit
def hash_and_place(constants, tokens, segments):
    rows = hashing_device.hash_tokens(constants, tokens, segments)
    return rows, hashing_device.stored_places(constants, rows)


def hash_on_device(ngram_hash, tokens, segments):
    return map(np.asarray, hash_and_place(HashConstants.of(ngram_hash), tokens, segments))


def assert_equal_to_the_host(ngram_hash, tokens, segments) -> None:
    rows, places = hash_on_device(ngram_hash, tokens, segments)
    for index, layer in enumerate(ngram_hash.spec.layers):
        expected = ngram_hash.hash_tokens(layer, tokens, segments)
        np.testing.assert_array_equal(rows[index], expected)
        padded_rows = ngram_hash.padded_rows[index]
        np.testing.assert_array_equal(places[index], stored_places(expected, padded_rows))


def draw_hash(generator: np.random.Generator, shape: tuple[int, int, int], ids: int) -> NgramHash:
    """A random layout: heads of 1 row to nearly 2³⁰, and a projection to any number of ids."""
    layers, max_order, heads = shape
    columns = layers * (max_order - 1) * heads
    largest = np.log(2**30 / columns * layers)
    rows = np.exp(generator.uniform(np.log(2), largest - 0.01, max_order - 1)).astype(int)
    if generator.random() < 0.3:
        rows[0] = generator.integers(1, 3)
    if columns == 1 and generator.random() < 0.3:
        rows[0] = 2**30 - 35  # the largest prime below 2³⁰
    size = int(generator.integers(1, ids + 1))
    lookup = generator.integers(0, size, ids, dtype=np.int32)
    spec = HashSpec(
        layers=tuple(range(layers)),
        max_order=max_order,
        heads=heads,
        rows_per_head=tuple(map(int, rows)),
        pad_id=int(generator.integers(ids)),
        seed=int(generator.integers(2**31)),
        variant="qwen" if generator.random() < 0.3 else "engram",
    )
    return NgramHash.build(spec, VocabularyProjection(lookup))


def test_random_layouts() -> None:
    """A million n-grams in 200 layouts, with documents and dead positions."""
    generator, primes = np.random.default_rng(0), []
    for number in range(200):
        ids = VOCABULARIES[number % 2]
        ngram_hash = draw_hash(generator, SHAPES[number % 3], ids)
        tokens = generator.integers(0, ids, POSITIONS, dtype=np.int32)
        tokens[generator.random(POSITIONS) < 0.05] = DEAD
        tokens[generator.random(POSITIONS) < 0.1] = ngram_hash.spec.pad_id
        starts = generator.random(POSITIONS) < 0.1
        segments = np.cumsum(starts, axis=1, dtype=np.int32)
        if number % 5 == 0:
            segments = generator.integers(0, 3, POSITIONS, dtype=np.int32)  # in any order
        assert_equal_to_the_host(ngram_hash, tokens, segments)
        primes += ngram_hash.primes.flat
    assert {1, 2} <= set(primes) and max(primes) == 2**30 - 35
    assert hash_and_place._cache_size() <= len(SHAPES) * len(VOCABULARIES)


@pytest.mark.parametrize("name", ["a_small", "b_small", "c_demo_scale", "d_paper_scale"])
def test_golden_files(name: str) -> None:
    golden, sizes = load_golden(name)
    ngram_hash, ids = golden_hash(golden, sizes), golden["ids"].astype(np.int32)
    rows, _ = hash_on_device(ngram_hash, ids, np.zeros_like(ids))
    for index, layer in enumerate(sizes["layers"]):
        own = rows[index] - ngram_hash.offsets[index].reshape(-1)
        np.testing.assert_array_equal(own, golden[f"hash_{layer}"])


def test_golden_documents_and_dead_positions() -> None:
    golden, sizes = load_golden("e_documents")
    ngram_hash = golden_hash(golden, sizes)
    ids, segments = (golden[name].astype(np.int32) for name in ("compressed_ids", "segment_ids"))
    for tokens, name in ((ids, "hash"), (np.where(golden["dead"], DEAD, ids), "hash_dead")):
        rows, _ = hash_on_device(ngram_hash, tokens, segments)
        for index, layer in enumerate(sizes["layers"]):
            own = rows[index] - ngram_hash.offsets[index].reshape(-1)
            np.testing.assert_array_equal(own, golden[f"{name}_{layer}"])


def test_the_released_miniature() -> None:
    golden, sizes = load_golden("f_v41_mini")
    ngram_hash, ids = released_hash(golden, sizes), golden["ids"].astype(np.int32)[None]
    masked = np.where(golden["token_mask"], ids, DEAD).astype(np.int32)
    for tokens, name in ((ids, "rows"), (masked, "rows_masked")):
        rows, _ = hash_on_device(ngram_hash, tokens, np.zeros_like(ids))
        for index, layer in enumerate(sizes["engram_layer_ids"]):
            np.testing.assert_array_equal(rows[index, 0], golden[f"{name}_{layer}"])


def test_the_qwen_miniature() -> None:
    golden, sizes = load_golden("g_qwen_mini")
    ngram_hash, ids = qwen_hash(golden, sizes), golden["ids"].astype(np.int32)
    rows, _ = hash_on_device(ngram_hash, ids, np.zeros_like(ids))
    for index in range(len(rows)):
        np.testing.assert_array_equal(rows[index], golden[f"rows_{index}"])


def test_a_part_needs_only_the_tokens_just_before_it() -> None:
    spec = HashSpec(layers=(1,), max_order=3, heads=2, rows_per_head=(11, 13))
    ngram_hash = NgramHash.build(spec, VocabularyProjection.identity(9))
    tokens = np.random.default_rng(1).integers(-1, 9, (2, 20), dtype=np.int32)
    segments = np.repeat(np.int32([[1, 2], [3, 4]]), 10, axis=1)
    whole, _ = hash_on_device(ngram_hash, tokens, segments)
    constants = HashConstants.of(ngram_hash)
    part = jax.jit(hashing_device.hash_after)(constants, tokens[:, 5:], segments[:, 5:])
    np.testing.assert_array_equal(part, whole[:, :, 7:])


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_no_tokens_have_no_rows(shape: tuple[int, int]) -> None:
    ngram_hash = draw_hash(np.random.default_rng(0), SHAPES[1], VOCABULARIES[0])
    nothing = np.zeros(shape, np.int32)
    assert_equal_to_the_host(ngram_hash, nothing, nothing)
    assert ngram_hash.hash_tokens(0, nothing).shape == (*shape, ngram_hash.columns)
