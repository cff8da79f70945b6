import multiprocessing
from itertools import islice
from typing import NamedTuple

import numpy as np
import pytest
from small_corpora import random_texts

from engram_jax.batch_part import WHOLE, BatchPart
from engram_jax.data.pipeline import make_batches, prefetch_to_device
from engram_jax.errors import InputError
from engram_jax.memory.plan import Planner

SIZES = {"sequence_length": 8, "batch_size": 8, "accumulation": 2, "seed": 5}


class Plan(NamedTuple):
    rows: np.ndarray
    nested: tuple[np.ndarray, ...]


class Checksums(Planner):
    """A checksum of every token of a process's part, and of the order of rows."""

    def __init__(self):
        self.buffered = False

    def __call__(self, tokens, segments=None, part=WHOLE):
        return Plan(np.unique(tokens), ((tokens * segments * np.arange(8)).sum(axis=2),))


plan = Checksums()


@pytest.fixture
def corpora(corpus_of):
    # About 25 and 7 rows per epoch, so some batches contain rows of two epochs.
    return [corpus_of(random_texts(n, 40, seed=n), name=f"texts{n}") for n in (9, 3)]


def first_batches(corpora, count=10, **changes):
    with make_batches(corpora, (0.7, 0.3), **SIZES | changes) as batches:
        return list(islice(batches, count))


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for name in batch._fields[:5]:
            ours, theirs = getattr(batch, name), getattr(other, name)
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
        assert (batch.plan is None) == (other.plan is None)
        if batch.plan is not None:
            assert np.array_equal(batch.plan.rows, other.plan.rows)
            assert np.array_equal(batch.plan.nested[0], other.plan.nested[0])


def test_batches_have_the_shapes_and_types_of_the_interface(corpora):
    (batch,) = first_batches(corpora, 1)
    for name in ("tokens", "targets", "segments", "positions"):
        assert getattr(batch, name).shape == (2, 4, 8) and getattr(batch, name).dtype == np.int32
    assert batch.target_mask.dtype == np.float32 and batch.plan is None


def test_the_number_of_workers_changes_no_batch(corpora):
    """Neither does the number of prefetched batches, or the batch at which a run resumes."""
    alone = first_batches(corpora, 12, planner=plan)
    resumed = first_batches(corpora, 7, planner=plan, first_batch=5, workers=2, prefetch=3)
    assert_equal(resumed, alone[5:])
    assert_equal(first_batches(corpora, 12, planner=plan, prefetch=0), alone)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("count", "sharing"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_processes_hold_and_plan_the_slices_of_one_global_batch(corpora, count, sharing):
    """Processes that share rows have slices of T, and plan from complete rows."""
    whole = first_batches(corpora)
    for index in range(count):
        found = first_batches(corpora, planner=plan, part=BatchPart(index, count, sharing))
        row, position = divmod(index, sharing)
        for batch, own in zip(whole, found, strict=True):
            rows = batch.map(lambda field: np.split(field, count // sharing, axis=1)[row])  # noqa: B023
            expected = rows.map(lambda field: np.split(field, sharing, axis=2)[position])  # noqa: B023
            assert_equal([own], [expected._replace(plan=plan(rows.tokens, rows.segments))])


def test_a_resumed_run_meets_the_batches_of_an_uninterrupted_one(corpora):
    whole = first_batches(corpora, 12, planner=plan)
    # 7 and 3 rows of 10, 8 rows a batch: the epochs end within batches 3 to 5.
    for start in range(1, 12):
        resumed = first_batches(corpora, 12 - start, planner=plan, first_batch=start)
        assert_equal(resumed, whole[start:])


def test_accumulation_only_splits_the_batch(corpora):
    whole = first_batches(corpora, accumulation=1)
    for batch, split in zip(whole, first_batches(corpora, accumulation=4), strict=True):
        assert split.tokens.shape == (4, 2, 8)
        for name in batch._fields[:5]:
            assert np.array_equal(getattr(split, name).reshape(1, 8, 8), getattr(batch, name))


def test_another_seed_gives_other_batches(corpora):
    (batch,), (other,) = first_batches(corpora, 1), first_batches(corpora, 1, seed=6)
    assert not np.array_equal(batch.tokens, other.tokens)


def test_a_closed_iterator_is_exhausted(corpora):
    batches = make_batches(corpora, **SIZES)
    next(batches)
    batches.close()
    batches.close()
    assert next(batches, None) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 7},
        {"accumulation": 3},
        {"part": BatchPart(0, 3)},
        {"part": BatchPart(0, 8)},
        {"part": BatchPart(2, 2)},
        {"accumulation": 0},
        {"first_batch": -1},
        {"workers": -1},
        {"sequence_length": 0},
        {"sequence_length": 10_000},
    ],
)
def test_sizes_that_do_not_fit_are_refused(corpora, changes):
    with pytest.raises(InputError):
        make_batches(corpora, **SIZES | changes)


@pytest.mark.parametrize("depth", [0, 2])
def test_batches_are_put_on_the_device_ahead_of_use(depth):
    put = []
    ahead = prefetch_to_device(iter(range(6)), lambda batch: put.append(batch) or -batch, depth)
    for number in range(6):
        assert next(ahead) == -number
        assert len(put) == min(number + depth + 1, 6)
    assert next(ahead, None) is None
