"""The plan, expanded in NumPy, must give every token the rows of the hash."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Int32
from tiny_runs import assert_identical

from engram_jax.batch_part import BatchPart
from engram_jax.compression import VocabularyProjection
from engram_jax.errors import InputError
from engram_jax.hashing import HashSpec, NgramHash
from engram_jax.memory import plan as plan_module
from engram_jax.memory.places import exchange_capacity, stored_places
from engram_jax.memory.plan import MemoryPlan, Planner, exchange_rounds, plan_buffers, plan_places


def make_hash(max_order: int = 3, rows: int = 11, heads: int = 2, vocabulary: int = 6) -> NgramHash:
    spec = HashSpec(
        layers=(0, 2), max_order=max_order, heads=heads, rows_per_head=(rows,) * (max_order - 1)
    )
    return NgramHash.build(spec, VocabularyProjection.identity(vocabulary))


def split(array: np.ndarray, shards: int) -> np.ndarray:
    """Reshapes [A, B, T, …] to the devices' parts [shards, A, B/shards, T, …]."""
    return array.reshape(len(array), shards, -1, *array.shape[2:]).swapaxes(0, 1)


def expand(plan: MemoryPlan, layer: int, shards: int) -> Int32[np.ndarray, "A B T H"]:
    """The devices' expansion, applied to places."""
    slots = split(plan.slots[layer].slots, shards)
    places = np.stack([rows[s] for rows, s in zip(plan.rows[layer].places, slots, strict=True)])
    return places.swapaxes(0, 1).reshape(plan.slots[layer].slots.shape)


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


@settings(max_examples=200)
@given(steps(), st.sampled_from([2, 3, 4]), st.sampled_from([2, 11, 5000]))
def test_plans(step: tuple[np.ndarray, np.ndarray, int], max_order: int, rows: int) -> None:
    tokens, segments, shards = step
    ngram_hash = make_hash(max_order, rows)
    plan = Planner(ngram_hash, shards=shards)(tokens, segments)
    bound = tokens.size * ngram_hash.columns // shards
    for index, layer in enumerate(ngram_hash.spec.layers):
        padded_rows = ngram_hash.padded_rows[index]
        places = stored_places(ngram_hash.hash_tokens(layer, tokens, segments), padded_rows)
        np.testing.assert_array_equal(expand(plan, layer, shards), places)
        of_rows, of_slots = plan.rows[layer], plan.slots[layer]
        for device, own in enumerate(split(places, shards)):
            distinct = np.unique(own)
            assert of_rows.distinct[device] == len(distinct)
            padding = padded_rows + np.arange(bound - len(distinct))
            expected = np.concatenate([distinct, padding])
            np.testing.assert_array_equal(of_rows.places[device], expected)
            slots, order = (split(array, shards)[device] for array in of_slots)
            for slots_of_part, order_of_part in zip(slots, order, strict=True):
                assert is_stable_order(slots_of_part.reshape(-1), order_of_part.reshape(-1))


@pytest.mark.parametrize("context", [2, 4])
def test_devices_that_share_sequences_plan_their_positions(context: int) -> None:
    """Consecutive devices share rows. N-grams reach into the part of the device before."""
    tokens = np.random.default_rng(0).integers(0, 6, (2, 4, 8), dtype=np.int32)
    ngram_hash = make_hash()
    plan = Planner(ngram_hash, shards=4, context=context)(tokens)
    places = stored_places(ngram_hash.hash_tokens(2, tokens), ngram_hash.padded_rows[1])
    slots, order = plan.slots[2]
    for device in range(4):
        row, position = divmod(device, context)

        def own(array: np.ndarray) -> np.ndarray:
            rows = np.split(array, 4 // context, axis=1)[row]  # noqa: B023
            return np.split(rows, context, axis=2)[position]  # noqa: B023

        np.testing.assert_array_equal(plan.rows[2].places[device][own(slots)], own(places))
        for keys, sorting in zip(own(slots), own(order), strict=True):
            assert is_stable_order(keys.reshape(-1), sorting.reshape(-1))


@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("buffered", [False, True])
def test_every_process_plans_its_own_part(buffered: bool, context: int) -> None:
    """With a context of four devices, both processes have all rows, and a half of T."""
    tokens = np.random.default_rng(0).integers(0, 6, (2, 8, 8), dtype=np.int32)
    segments, sharing = np.ones_like(tokens), max(1, context // 2)
    whole = Planner(make_hash(), shards=4, context=context, buffered=buffered)(tokens)
    for process in range(2):
        local = 4 if buffered else 2
        planner = Planner(
            make_hash(), shards=4, local_shards=local, context=context, buffered=buffered
        )
        part = planner.plan_part(tokens, segments, BatchPart(process, 2, sharing))
        mine, shards = (slice(size * process, size * (process + 1)) for size in (4, 2))

        def cut(plans: Any, part: Any) -> Any:
            return jax.tree.map(lambda array: array[part], plans)

        own_slots = (slice(None), slice(None), mine) if sharing > 1 else (slice(None), mine)
        assert_identical(part.slots, cut(whole.slots, own_slots))
        assert_identical(part.rows, cut(whole.rows, shards))
        assert_identical(part.buffers, cut(whole.buffers, shards))
        assert (part.buffers is None) == (not buffered)


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("rows", [4096, 4096 * 9])
def test_buffers_hold_the_rows_that_any_device_requests(shards: int, rows: int) -> None:
    """Also if most rows have one owner, which needs a larger buffer."""
    for most in (rows, rows // shards):
        generator = np.random.default_rng(most)
        places = generator.integers(0, most, (2, 16, 16, 4), dtype=np.int32)
        plan, _ = plan_places(places, rows, shards=shards, local_shards=shards)
        buffers, buffered = plan_buffers(plan, rows)
        size = buffers.places.shape[1]
        assert size <= rows // shards or shards == 1
        held = [own[:count] for own, count in zip(*buffers, strict=True)]
        np.testing.assert_array_equal(np.concatenate(held), np.unique(places))
        for device, count in enumerate(plan.distinct):
            own, index = plan.places[device, :count], buffered[device, :count]
            np.testing.assert_array_equal(buffers.places[own // (rows // shards), index], own)
            assert (buffered[device, count:] >= size).all()
        for own, count in zip(*buffers, strict=True):
            assert (own[count:] >= rows).all()


def test_shapes_and_dtypes_do_not_depend_on_the_tokens() -> None:
    planner = Planner(make_hash(), shards=2, buffered=True)
    shape = (2, 4, 8)
    varied = planner(np.random.default_rng(0).integers(0, 6, shape, dtype=np.int32))
    for tokens in (np.zeros(shape, np.int32), np.full(shape, -1, np.int32)):
        plan = planner(tokens, np.ones(shape, np.int32))
        assert plan.rows.keys() == plan.slots.keys() == plan.buffers.keys() == {0, 2}
        for a, b in zip(jax.tree.leaves(plan), jax.tree.leaves(varied), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.dtype == np.int32


def test_a_step_without_repeats_has_no_padding() -> None:
    """The bound tokens × columns is reached, and must not be exceeded."""
    ngram_hash = make_hash(max_order=2, rows=50_000, heads=1, vocabulary=64)
    tokens = np.arange(64, dtype=np.int32).reshape(1, 1, 64)
    plan = Planner(ngram_hash)(tokens)
    places = stored_places(ngram_hash.hash_tokens(0, tokens), ngram_hash.padded_rows[0])
    assert len(np.unique(places)) == places.size  # there must be no collision
    np.testing.assert_array_equal(plan.rows[0].places[0], np.sort(places.reshape(-1)))
    np.testing.assert_array_equal(expand(plan, 0, 1), places)


def test_rounds_are_as_few_as_every_pair_of_devices_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Many rows of one owner need more rounds; in each, no pair exceeds the capacity."""
    bound, padded_rows = 512, 8192
    owned = padded_rows // 4
    capacity = exchange_capacity(bound, 4, owned)

    def fullest(found: np.ndarray, rounds: int) -> int:
        own, owner = found % owned, found // owned
        return max(
            np.count_nonzero((owner == device) & (own * rounds // owned == part))
            for device in range(4)
            for part in range(rounds)
        )

    spread = np.arange(0, padded_rows, padded_rows // bound, dtype=np.int32)
    crowded = owned + np.arange(0, owned, 4, dtype=np.int32)
    at_one_place = owned + np.arange(300, dtype=np.int32)
    for found, rounds in ((spread, 1), (crowded, 4), (at_one_place, 16)):
        assert exchange_rounds(found, capacity, owned) == rounds
        assert fullest(found, rounds) <= capacity
        assert rounds == 1 or fullest(found, rounds // 2) > capacity
    monkeypatch.setattr(plan_module, "MOST_ROUNDS", 8)
    with pytest.raises(InputError, match="16 rounds"):
        exchange_rounds(at_one_place, capacity, owned)


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="6"):
        Planner(make_hash())(np.full((1, 1, 4), 6, np.int32))


@pytest.mark.parametrize("shards", [1, 4])
def test_a_small_table_is_planned_by_its_rows(shards: int) -> None:
    """No device requests more rows than there are, however many tokens it has."""
    places = np.random.default_rng(0).integers(0, 4096, (2, 4, 600, 8), dtype=np.int32)
    rows, slots = plan_places(places, 4096, shards=shards, local_shards=shards)
    assert rows.places.shape == (shards, 4096) and slots.slots.shape == places.shape
    for device, part in enumerate(np.split(np.arange(4), shards)):
        found = rows.places[device][slots.slots[:, part]]
        np.testing.assert_array_equal(found, places[:, part])
        distinct = rows.distinct[device]
        assert (rows.places[device, distinct:] >= 4096).all()
