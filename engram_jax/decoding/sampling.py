"""How a token is drawn: temperature, top-k, top-p and min-p, with one uniform number per token.

All settings are runtime values of every sequence, so no setting needs another program. Candidates
are chosen by a threshold on their weight exp(logit/temperature − maximum), which is found by
bisection. (Sorting 64 × 8,192 logits takes 108 ms on a CPU.)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

# Logits are arranged as [groups, LANES], so that sums run over the first of these axes: XLA on a
# CPU does not vectorize a sum of floats over the last axis.
LANES = 128


class DrawSettings(NamedTuple):
    """The settings of every sequence.

    Attributes:
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: number of candidates; all ids or more: all.
        top_p: the candidates are the fewest that have this probability together.
        min_p: smallest probability of a candidate, relative to the most likely one.
        seed: of the sequence's uniform numbers.
    """

    temperature: Float[Any, "B"]
    top_k: Int32[Any, "B"]
    top_p: Float[Any, "B"]
    min_p: Float[Any, "B"]
    seed: UInt32[Any, "B"]


def draw(
    logits: Float[Array, "B V"],
    pieces: Int32[Array, ""],
    settings: DrawSettings,
    number: Int32[Array, "B"],
) -> tuple[Int32[Array, "B"], Float[Array, "B"]]:
    """Draws every sequence's next token.

    Args:
        logits: of the next token, finite.
        pieces: only ids below this are drawn. (A model may have more ids than its tokenizer.)
        settings: settings of every sequence.
        number: how many tokens were drawn before, which selects the uniform number.

    Returns:
        The tokens, and their log-probabilities at temperature 1, without any selection of
        candidates.
    """
    ids = _arrange(jnp.arange(logits.shape[1])[None], logits.shape[1])
    valid = ids < pieces
    arranged = jnp.where(valid, _arrange(logits, 0), -jnp.inf)
    largest = _over_ids(jnp.max, arranged)
    likely = _over_ids(jnp.min, jnp.where(arranged == largest, ids, logits.shape[1]))

    is_greedy = settings.temperature == 0
    divisor = jnp.where(is_greedy, 1, settings.temperature)[:, None, None]
    weights = jnp.exp((arranged - largest) / divisor)
    weights = _choose(weights, settings)
    uniform = jax.vmap(lambda seed, n: jax.random.uniform(jax.random.fold_in(_key(seed), n)))
    place = _invert(weights, uniform(settings.seed, number))
    drawn = jnp.where(is_greedy, likely[:, 0, 0], place)
    normalizer = largest + jnp.log(_over_ids(jnp.sum, jnp.exp(arranged - largest)))
    chosen = jnp.take_along_axis(logits, drawn[:, None], axis=1)[:, 0]
    return drawn, chosen - normalizer[:, 0, 0]


def _key(seed: UInt32[Array, ""]) -> Array:
    return jax.random.wrap_key_data(jnp.stack([jnp.uint32(0), seed]), impl="threefry2x32")


def _arrange(x: Array, fill: float) -> Array:
    """[B, V] as [B, groups, LANES], filled up."""
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)), constant_values=fill)
    return padded.reshape(len(x), -1, LANES)


def _over_ids(reduce: Any, x: Array) -> Array:
    """A reduction over all ids of a sequence, over groups first."""
    return reduce(reduce(x, axis=1, keepdims=True), axis=2, keepdims=True)


def _choose(
    weights: Float[Array, "B groups lanes"], settings: DrawSettings
) -> Float[Array, "B groups lanes"]:
    """The weights, with zeros for ids that are no candidates: by top-k, then top-p, then min-p."""

    def keep_largest(weights: Array, amounts: Array, needed: Array) -> Array:
        least = _threshold(weights, amounts, needed[:, None, None])
        return jnp.where(_bits(weights) >= least, weights, 0)

    def keep_k(weights: Array) -> Array:
        ones = jnp.ones(weights.shape, jnp.int32)
        return keep_largest(weights, ones, settings.top_k)

    def keep_p(weights: Array) -> Array:
        total = _over_ids(jnp.sum, weights)[:, 0, 0]
        kept = keep_largest(weights, weights, settings.top_p * total)
        return jnp.where((settings.top_p < 1)[:, None, None], kept, weights)

    size = weights.shape[1] * weights.shape[2]
    weights = jax.lax.cond(jnp.any(settings.top_k < size), keep_k, lambda same: same, weights)
    weights = jax.lax.cond(jnp.any(settings.top_p < 1), keep_p, lambda same: same, weights)
    return jnp.where(weights >= settings.min_p[:, None, None], weights, 0)


def _bits(weights: Float[Array, "*n"]) -> Int32[Array, "*n"]:
    """Integers in the order of the weights, which are from 0 to 1."""
    return jax.lax.bitcast_convert_type(weights, jnp.int32)


def _threshold(
    weights: Float[Array, "B groups lanes"], amounts: Array, needed: Array
) -> Int32[Array, "B 1 1"]:
    """The largest t such that the amounts of weights ≥ t sum to `needed`; 0 if all do not.

    Weights and t are compared as integers. So the bisection ends at adjacent numbers, and the
    result is exact. It ends earlier where a sum equals `needed`.
    """
    bits = _bits(weights)

    def is_open(bounds: tuple[Array, Array]) -> Bool[Array, ""]:
        return jnp.any(bounds[1] - bounds[0] > 1)

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        found = _over_ids(jnp.sum, jnp.where(bits >= middle, amounts, 0))
        low = jnp.where(found >= needed, middle, low)
        high = jnp.where(found == needed, middle + 1, jnp.where(found > needed, high, middle))
        return low, jnp.maximum(high, low + 1)

    low = jnp.zeros((len(bits), 1, 1), jnp.int32)
    high = jnp.full_like(low, _bits(jnp.float32(1)) + 1)
    return jax.lax.while_loop(is_open, halve, (low, high))[0]


def _invert(
    weights: Float[Array, "B groups lanes"], uniform: Float[Array, "B"]
) -> Int32[Array, "B"]:
    """The id at a quantile of the distribution; ids are in the order of lanes, then groups."""
    by_lane = jnp.sum(weights, axis=1)
    lane, rest = _locate(by_lane, uniform * jnp.sum(by_lane, axis=1))
    in_lane = jnp.take_along_axis(weights, lane[:, None, None], axis=2)[:, :, 0]
    group, _ = _locate(in_lane, rest)
    return group * LANES + lane


def _locate(
    weights: Float[Array, "B n"], target: Float[Array, "B"]
) -> tuple[Int32[Array, "B"], Float[Array, "B"]]:
    """The first entry at which the cumulative sum exceeds a target, and the rest of the target.

    An entry with weight 0 is never chosen: if rounding puts the target at the end, the last
    positive entry is chosen.
    """
    size = weights.shape[1]
    # A product, because XLA's cumulative sum on a CPU takes quadratic time without vectorization.
    before = jnp.triu(jnp.ones((size, size)), 1)
    begins = jnp.matmul(weights, before, precision=jax.lax.Precision.HIGHEST)
    entry = jnp.arange(size)[None]
    reached = (weights > 0) & (begins <= target[:, None])
    found = jnp.max(jnp.where(reached, entry, 0), axis=1)
    return found, target - jnp.take_along_axis(begins, found[:, None], axis=1)[:, 0]
