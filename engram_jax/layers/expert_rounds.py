"""The computation of one device's experts: pairs of a token and an expert, in rounds of fixed size.

Pairs are sorted by expert, so that every expert multiplies one group of rows. A round has a fixed
capacity. If the load is uneven, more rounds run, so no pair is dropped.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from engram_jax.layers.grouped_matmul import grouped_matmul, padded_rows
from engram_jax.typing import PyTree


class Ranking(NamedTuple):
    """The pairs of a token and an expert that it chose, sorted by expert.

    Attributes:
        expert: the expert of every pair; X if another device stores it.
        order: the numbers of the pairs, sorted by expert.
        rank: the inverse permutation: the place of every pair in `order`.
        ends: the end of every expert's pairs in `order`.
    """

    expert: Int32[Array, "tokens active"]
    order: Int32[Array, "pairs"]
    rank: Int32[Array, "tokens active"]
    ends: Int32[Array, "X"]


class _Layout(NamedTuple):
    """The rows that the experts compute in one round, and the pairs in them.

    Attributes:
        sizes: number of rows of every expert, a multiple of the block size.
        pair_of_row: the pair of every row; the number of pairs if the row is padding.
        row_of_pair: the row of every pair; the number of rows if the pair is not in this round.
    """

    sizes: Int32[Array, "X"]
    pair_of_row: Int32[Array, "rows"]
    row_of_pair: Int32[Array, "tokens active"]


def rank_pairs(expert: Int32[Array, "tokens active"], experts: int) -> Ranking:
    """Sorts the pairs by expert; `experts` are stored here, and larger numbers elsewhere."""
    flat = expert.reshape(-1)
    # The order among one expert's pairs does not matter, and a stable sort takes twice as long to
    # compile on TPU.
    order = jnp.argsort(flat, stable=False)
    rank = jnp.argsort(order, stable=False).reshape(expert.shape)
    return Ranking(expert, order, rank, jnp.cumsum(count(flat, experts)))


def count(values: Int32[Array, "pairs"], bound: int) -> Int32[Array, "X"]:
    """How often each number below `bound` occurs."""
    return jnp.sum(values[:, None] == jnp.arange(bound)[None], axis=0, dtype=jnp.int32)


def _lay_out(
    ranking: Ranking, first: int | Int32[Array, ""], capacity: int, block: int | None
) -> _Layout:
    """The rows for pairs `first` to `first + capacity` of the order; each expert starts a block."""
    experts, pairs, unit = len(ranking.ends), len(ranking.order), block or 1
    ends = jnp.clip(ranking.ends - first, 0, capacity)
    begins = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    sizes = (ends - begins + unit - 1) // unit * unit
    last_rows = jnp.cumsum(sizes)
    # Difference between an expert's first row and the place of its first pair.
    shift = last_rows - sizes - begins

    rows = padded_rows(capacity, experts, block)
    row = jnp.arange(rows)
    expert = jnp.minimum(jnp.sum(row[:, None] >= last_rows[None], axis=1), experts - 1)
    place = row - shift[expert]
    pair = ranking.order[jnp.clip(first + place, 0, pairs - 1)]
    pair_of_row = jnp.where(place < ends[expert], pair, pairs)

    place = ranking.rank - first
    here = (ranking.expert < experts) & (place >= 0) & (place < capacity)
    row_of_pair = place + shift[jnp.minimum(ranking.expert, experts - 1)]
    return _Layout(sizes, pair_of_row, jnp.where(here, row_of_pair, rows))


def mix_experts(
    ranking: Ranking,
    inputs: tuple[Float[Array, "tokens D"], Float[Array, "tokens active"], tuple[Array, ...]],
    index: int | Int32[Array, ""] = 0,
    *,
    capacity: int,
    block: int | None,
) -> Float[Array, "tokens D"]:
    """Σ weight · expert(token) over the pairs of one round, in float32.

    Args:
        ranking: of all pairs.
        inputs: tokens, weights of their pairs, and the experts' gate, up and down matrices.
        index: number of the round.
        capacity: pairs of one round.
        block: result of `block_size`.
    """
    tokens, weights, (gate, up, down) = inputs
    layout = _lay_out(ranking, index * capacity, capacity, block)
    multiply = partial(grouped_matmul, sizes=layout.sizes, block=block)
    rows = _spread(tokens, layout)
    hidden = jax.nn.silu(multiply(rows, gate)) * multiply(rows, up)
    return _combine(multiply(hidden, down), weights, layout)


# `_spread` and `_combine` are gathers in the forward and in the backward pass. JAX's own gradient
# of a gather is a scatter-add, which is slow on TPU and has no fixed order on GPU.


@jax.custom_vjp
def _spread(tokens: Float[Array, "tokens D"], layout: _Layout) -> Float[Array, "rows D"]:
    """The token of every row; zeros for padding."""
    active = layout.row_of_pair.shape[1]
    return _take(tokens, layout.pair_of_row // active)


def _spread_forward(tokens: Array, layout: _Layout) -> tuple[Array, _Layout]:
    return _spread(tokens, layout), layout


def _spread_backward(layout: _Layout, gradient: Array) -> tuple[Array, None]:
    ones = jnp.ones(layout.row_of_pair.shape)
    return _combine(gradient, ones, layout).astype(gradient.dtype), None


@jax.custom_vjp
def _combine(
    rows: Float[Array, "rows D"], weights: Float[Array, "tokens active"], layout: _Layout
) -> Float[Array, "tokens D"]:
    """The weighted sum of every token's rows, in float32."""

    def add(pairs: tuple[Array, Array]) -> Array:
        row_of_pair, weights = pairs
        return jnp.sum(weights[:, None] * _take(rows, row_of_pair).astype(jnp.float32), axis=0)

    # An expert-parallel group has many times more pairs than a device has rows. So the sum runs in
    # parts, to bound memory.
    pairs = (layout.row_of_pair, weights)
    parts = math.ceil(weights.size / len(rows))
    if parts == 1:
        return jax.vmap(add)(pairs)
    return jax.lax.map(add, pairs, batch_size=math.ceil(len(weights) / parts))


def _combine_forward(
    rows: Array, weights: Array, layout: _Layout
) -> tuple[Array, tuple[Array, Array, _Layout]]:
    return _combine(rows, weights, layout), (rows, weights, layout)


def _combine_backward(
    kept: tuple[Array, Array, _Layout], gradient: Array
) -> tuple[Array, Array, None]:
    rows, weights, layout = kept
    spread = _spread(gradient.astype(rows.dtype), layout).astype(jnp.float32)
    weight_of_row = _take(weights.reshape(-1), layout.pair_of_row)
    product = jnp.sum(rows.astype(jnp.float32) * spread, axis=1)
    weights_gradient = _take(product, layout.row_of_pair)
    return (weight_of_row[:, None] * spread).astype(rows.dtype), weights_gradient, None


_spread.defvjp(_spread_forward, _spread_backward)
_combine.defvjp(_combine_forward, _combine_backward)


def _take(values: Float[Array, "n *rest"], numbers: Int32[Array, "..."]) -> Array:
    return values.at[numbers].get(mode="fill", fill_value=0)


def sum_rounds(
    mix: Callable[..., Array], ranking: Ranking, inputs: PyTree, capacity: int
) -> Float[Array, "tokens D"]:
    """Σ mix over the rounds that this device's pairs need: one round, unless the load is uneven.

    Each device runs its own number of rounds, so `mix` must not contain a collective. The backward
    pass keeps only the inputs and recomputes every round. Gradients of rounds are added in their
    own dtype. (A `scan` over the largest possible number of rounds would, in reverse mode, add a
    zero gradient of all experts for every unused round.)
    """

    @jax.custom_vjp
    def total(ranking: Ranking, inputs: PyTree) -> Array:
        def add(index: Array, y: Array) -> Array:
            return y + mix(ranking, inputs, index)

        return jax.lax.fori_loop(1, _rounds(ranking), add, mix(ranking, inputs, 0))

    def _rounds(ranking: Ranking) -> Array:
        return (ranking.ends[-1] + capacity - 1) // capacity

    def forward(ranking: Ranking, inputs: PyTree) -> tuple[Array, Any]:
        return total(ranking, inputs), (ranking, inputs)

    def backward(kept: Any, gradient: Array) -> tuple[None, PyTree]:
        ranking, inputs = kept

        def pull_back(index: int | Array) -> PyTree:
            return jax.vjp(lambda inputs: mix(ranking, inputs, index), inputs)[1](gradient)[0]

        def add(index: Array, gradients: PyTree) -> PyTree:
            return jax.tree.map(jnp.add, gradients, pull_back(index))

        return None, jax.lax.fori_loop(1, _rounds(ranking), add, pull_back(0))

    total.defvjp(forward, backward)
    return total(ranking, inputs)
