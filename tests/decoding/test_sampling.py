"""How a token is drawn: candidates, their distribution, seeds, log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.decoding.sampling import DrawSettings, draw

PIECES, VOCABULARY, DRAWS = 290, 300, 4096
LOGITS = np.float32(np.random.default_rng(0).normal(0, 2.0, VOCABULARY))
LOGITS[PIECES:] = 99.0  # ids without a piece
ALL = 2**31 - 1


@jax.jit
def draw_many(logits, settings, number):
    return draw(logits, jnp.int32(PIECES), settings, number)


def settings_of(
    temperature=1.0, top_k=ALL, top_p=1.0, min_p=0.0, seed=0, batch=DRAWS
) -> DrawSettings:
    parts = (temperature, np.float32), (top_k, np.int32), (top_p, np.float32), (min_p, np.float32)
    return DrawSettings(
        *(np.broadcast_to(np.array(value, dtype), batch) for value, dtype in parts),
        np.broadcast_to(np.uint32(seed), batch),
    )


def draw_with(numbers=None, **named) -> np.ndarray:
    """Draws from the same logits; sequence n takes its n-th uniform number."""
    numbers = np.arange(DRAWS, dtype=np.int32) if numbers is None else numbers
    tokens, _ = draw_many(np.tile(LOGITS, (DRAWS, 1)), settings_of(**named), numbers)
    return np.asarray(tokens)


def candidates(temperature=1.0, top_k=ALL, top_p=1.0, min_p=0.0) -> np.ndarray:
    """The distribution of the candidates, from a sorted list."""
    weights = np.exp((LOGITS[:PIECES].astype(np.float64) - LOGITS[:PIECES].max()) / temperature)
    chances = weights / weights.sum()
    order = np.argsort(-chances)
    more_likely = np.concatenate([[0], np.cumsum(chances[order])[:-1]])
    kept = (np.arange(PIECES) < top_k) & (more_likely < top_p)
    kept &= chances[order] >= min_p * chances.max()
    chosen = np.zeros(VOCABULARY)
    chosen[order[kept]] = chances[order[kept]]
    return chosen / chosen.sum()


@pytest.mark.parametrize(
    "named",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 30.0, "top_k": 3},
        {"top_k": 20},
        {"top_p": 0.7},
        {"temperature": 4.0, "top_p": 0.05},
        {"min_p": 0.1},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 1.5},
    ],
)
def test_drawn_tokens_have_the_distribution_of_the_candidates(named) -> None:
    expected, counts = candidates(**named), np.bincount(draw_with(**named), minlength=VOCABULARY)
    assert not counts[expected == 0].any()
    # Rare tokens are counted together, so that the statistic has the χ² distribution.
    common = expected * DRAWS > 5
    observed = [*counts[common], counts[~common].sum()]
    mean = [*expected[common] * DRAWS, max(expected[~common].sum() * DRAWS, 1e-9)]
    statistic = sum((o - m) ** 2 / m for o, m in zip(observed, mean, strict=True) if m > 1)
    degrees = max(len(mean) - 1, 1)
    assert statistic < degrees + 5 * np.sqrt(2 * degrees) + 5


@pytest.mark.parametrize("named", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}])
def test_one_candidate_is_the_most_likely(named) -> None:
    assert (draw_with(**named) == LOGITS[:PIECES].argmax()).all()


def test_two_candidates_of_many_equal_tokens_are_drawn_equally_often() -> None:
    """A next draw is from fewer tokens: drawn again from all 290, some draws would never end."""
    counts = np.bincount(draw_with(temperature=1e30, top_k=2))
    assert len(counts) == 2 and abs(counts[0] / DRAWS - 0.5) < 0.025


def test_equal_seeds_give_equal_tokens() -> None:
    first = draw_with(seed=3)
    np.testing.assert_array_equal(draw_with(seed=3), first)
    assert np.mean(draw_with(seed=4) != first) > 0.5
    numbers = np.full(DRAWS, 7, np.int32)
    assert len(np.unique(draw_with(numbers, seed=3))) == 1
    seeds = draw_with(numbers, seed=np.arange(DRAWS, dtype=np.uint32))
    assert len(np.unique(seeds)) > 20


def test_a_sequence_does_not_depend_on_the_others() -> None:
    """Not even on the settings of others, which may need more draws."""
    alone = draw_with(top_k=5, seed=9)
    top_k = np.where(np.arange(DRAWS) % 2, 5, 1).astype(np.int32)
    temperature = np.where(np.arange(DRAWS) % 2, 1, 50)
    mixed = draw_with(top_k=top_k, temperature=temperature, seed=9)
    np.testing.assert_array_equal(mixed[1::2], alone[1::2])


def test_log_probabilities_are_of_all_tokens() -> None:
    logits = np.tile(LOGITS, (DRAWS, 1))
    settings = settings_of(temperature=2.0, top_k=50)
    tokens, found = draw_many(logits, settings, np.arange(DRAWS, dtype=np.int32))
    expected = jax.nn.log_softmax(jnp.asarray(LOGITS[:PIECES]))[tokens]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_extreme_temperature_is_safe() -> None:
    for cold in (1e-30, 1e-40):
        assert (draw_with(temperature=cold) == LOGITS[:PIECES].argmax()).all()
    for hot in (1e30, 3e38):
        tokens = draw_with(temperature=hot)
        assert (tokens < PIECES).all() and len(np.unique(tokens)) > PIECES / 2


@pytest.mark.parametrize(
    ("bad", "where"), [(np.nan, 7), (np.inf, 7), (np.nan, slice(None)), (np.inf, slice(None))]
)
@pytest.mark.parametrize("named", [{"temperature": 0.0}, {"min_p": 0.1}, {"top_p": 0.5}, {}])
def test_logits_that_are_not_finite_end_the_draw(bad: float, where: int | slice, named) -> None:
    """With a valid id and a log-probability that shows it; other sequences are not disturbed."""
    logits = np.tile(LOGITS, (DRAWS, 1))
    logits[::2, where] = bad
    numbers = np.arange(DRAWS, dtype=np.int32)
    tokens, found = map(np.asarray, draw_many(logits, settings_of(**named), numbers))
    assert (tokens >= 0).all() and (tokens < PIECES).all()
    assert np.isnan(found[::2]).all() and np.isfinite(found[1::2]).all()
    np.testing.assert_array_equal(tokens[1::2], draw_with(**named)[1::2])


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"top_k": 1}, [4]),
        ({"top_k": 2}, [4, 200]),
        ({"top_p": 0.3}, [4]),
        ({"top_p": 0.6}, [4, 200]),
        ({"top_p": 0.9}, [3, 4, 200]),
        ({"temperature": 0.0}, [4]),
    ],
)
def test_of_equally_likely_tokens_the_first_are_candidates(named, expected) -> None:
    """Tokens 4 and 200 have 0.4 each, and tokens 3 and 5 have 0.1."""
    logits = np.full(VOCABULARY, -np.inf, np.float32)
    logits[[4, 200, 3, 5]] = np.log([0.4, 0.4, 0.1, 0.1])
    numbers = np.arange(DRAWS, dtype=np.int32)
    tokens, _ = draw_many(np.tile(logits, (DRAWS, 1)), settings_of(**named), numbers)
    np.testing.assert_array_equal(np.unique(tokens), expected)
