"""The plan, expanded in NumPy, must give every token the rows that the hash gives it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Int32

from engram_jax.compression import VocabularyProjection
from engram_jax.errors import InputError
from engram_jax.hashing import HashSpec, NgramHash
from engram_jax.memory.plan import MemoryPlan, Planner


def make_hash(max_order: int = 3, rows: int = 11, heads: int = 2, vocabulary: int = 6) -> NgramHash:
    spec = HashSpec(
        layers=(0, 2), max_order=max_order, heads=heads, rows_per_head=(rows,) * (max_order - 1)
    )
    return NgramHash.build(spec, VocabularyProjection.identity(vocabulary))


def expand(plan: MemoryPlan, layer: int) -> Int32[np.ndarray, "A B T H"]:
    """What the device does with rows, done with row numbers."""
    of_layer = plan.layers[layer]
    of_ngram = of_layer.rows[of_layer.slot_of_ngram]
    orders = [
        of_ngram[order][plan.tokens.ngram_of_token[:, order]] for order in range(len(of_ngram))
    ]
    return np.concatenate(orders, axis=-1)


@st.composite
def steps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens [A, B, T] with many repeats and dead positions, their segments, and shards of B."""
    shards = draw(st.sampled_from([1, 2, 4]))
    shape = (
        draw(st.integers(1, 3)),
        shards * draw(st.integers(1, 2)),
        draw(st.integers(1, 9)),
    )
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    distinct = draw(st.integers(1, 6))
    tokens = generator.integers(0, distinct, shape, dtype=np.int32)
    tokens[generator.random(shape) < draw(st.sampled_from([0.0, 0.2]))] = -1
    segments = np.cumsum(generator.random(shape) < 0.2, axis=-1, dtype=np.int32)
    return tokens, segments, shards


def is_stable_order(keys: np.ndarray, order: np.ndarray) -> bool:
    """Whether `order` is the one permutation that sorts by (key, place)."""
    pairs = list(zip(keys[order].tolist(), order.tolist(), strict=True))
    return pairs == sorted(pairs) and sorted(order.tolist()) == list(range(len(keys)))


@settings(max_examples=200, deadline=None)
@given(steps(), st.sampled_from([2, 3, 4]), st.sampled_from([2, 11, 500]))
def test_plans(step: tuple[np.ndarray, np.ndarray, int], max_order: int, rows: int) -> None:
    tokens, segments, shards = step
    ngram_hash = make_hash(max_order, rows)
    plan = Planner(ngram_hash, batch_shards=shards)(tokens, segments)
    window = np.stack(ngram_hash.look_back(tokens, segments), axis=-1).reshape(-1, max_order)

    for index, layer in enumerate(ngram_hash.spec.layers):
        of_layer, bound = plan.layers[layer], tokens.size * ngram_hash.columns
        hashed = ngram_hash.hash_tokens(layer, tokens, segments)
        np.testing.assert_array_equal(expand(plan, layer), hashed)

        distinct = np.unique(hashed)
        assert of_layer.distinct_rows == len(distinct)
        np.testing.assert_array_equal(of_layer.rows[: len(distinct)], distinct)
        first_padding = ngram_hash.padded_rows[index]
        np.testing.assert_array_equal(
            of_layer.rows[len(distinct) :], first_padding + np.arange(bound - len(distinct))
        )
        assert of_layer.slot_of_ngram.min() >= 0
        assert of_layer.slot_of_ngram.max() < bound
        assert is_stable_order(of_layer.slot_of_ngram.reshape(-1), of_layer.slot_order)
        # What is not a row of the table is not a row of any n-gram that is there.
        for order, count in enumerate(plan.distinct_ngrams):
            assert (of_layer.slot_of_ngram[order, :count] < of_layer.distinct_rows).all()
            assert (of_layer.slot_of_ngram[order, count:] >= of_layer.distinct_rows).all()

    for order in range(2, max_order + 1):
        assert plan.distinct_ngrams[order - 2] == len(np.unique(window[:, :order], axis=0))
        numbers = plan.tokens.ngram_of_token[:, order - 2]
        assert set(numbers.reshape(-1)) == set(range(plan.distinct_ngrams[order - 2]))
    by_device = [array.reshape(*array.shape[:2], shards, -1) for array in plan.tokens]
    for place in np.ndindex(by_device[0].shape[:3]):
        assert is_stable_order(by_device[0][place], by_device[1][place])


def test_shapes_and_dtypes_do_not_depend_on_the_tokens() -> None:
    planner = Planner(make_hash(), batch_shards=2)
    shape = (2, 4, 8)
    generator = np.random.default_rng(0)
    varied = planner(generator.integers(0, 6, shape, dtype=np.int32))
    for tokens in (np.zeros(shape, np.int32), np.full(shape, -1, np.int32)):
        plan = planner(tokens, np.ones(shape, np.int32))
        assert plan.layers.keys() == varied.layers.keys()
        for layer in plan.layers:
            for a, b in zip(plan.layers[layer], varied.layers[layer], strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.dtype == np.int32
        for a, b in zip(plan.tokens, varied.tokens, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.dtype == np.int32


def test_a_step_without_repeats_has_no_padding() -> None:
    """The bound tokens × columns is met exactly; nothing may run over it."""
    ngram_hash = make_hash(max_order=2, rows=50_000, heads=1, vocabulary=64)
    tokens = np.arange(64, dtype=np.int32).reshape(1, 1, 64)
    plan = Planner(ngram_hash)(tokens)
    hashed = ngram_hash.hash_tokens(0, tokens)
    assert len(np.unique(hashed)) == hashed.size  # no collision, or this tests nothing
    np.testing.assert_array_equal(plan.layers[0].rows, np.sort(hashed.reshape(-1)))
    np.testing.assert_array_equal(expand(plan, 0), hashed)


def test_large_vocabularies_and_orders_do_not_overflow_the_keys() -> None:
    spec = HashSpec(layers=(0,), max_order=5, heads=2, rows_per_head=(997,) * 4)
    ngram_hash = NgramHash.build(spec, VocabularyProjection.identity(300_000))
    generator = np.random.default_rng(0)
    tokens = generator.choice(np.array([0, 299_998, 299_999], np.int32), (1, 2, 400))
    plan = Planner(ngram_hash)(tokens)
    np.testing.assert_array_equal(expand(plan, 0), ngram_hash.hash_tokens(0, tokens))


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="6"):
        Planner(make_hash())(np.full((1, 1, 4), 6, np.int32))
