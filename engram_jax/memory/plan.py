"""The memory plan: which rows one optimizer step touches, and how tokens find them. Pure NumPy.

Built on the host, in the input pipeline. N-grams repeat, so each distinct one is hashed once; and
different n-grams collide in rows, so each distinct row is read and updated once. Shapes are
static: the bounds are exact (tokens × columns), and what is not used is padding. Plans
hold NumPy arrays on the host and JAX arrays on the device.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from engram_jax.hashing import NgramHash


class LayerPlan(NamedTuple):
    """The rows of one layer's table. G: n-grams per order = tokens of the step; U = orders·G·K.

    Attributes:
        rows: distinct table rows, ascending; then padding, R, R+1, … (R: padded rows), which a
            gather fills with zeros and a scatter drops.
        slot_of_ngram: position in `rows` of every n-gram's row in every head.
        slot_order: stable order that sorts the flattened `slot_of_ngram`.
        distinct_rows: how many of `rows` are not padding.
    """

    rows: Int32[Any, "U"]
    slot_of_ngram: Int32[Any, "orders G K"]
    slot_order: Int32[Any, "U"]
    distinct_rows: Int32[Any, ""]


class TokenPlan(NamedTuple):
    """How the tokens of the A micro-batches find their n-grams; shared by all layers and heads.

    Attributes:
        ngram_of_token: for every order, which distinct n-gram of the step ends at this token.
        token_order: order that sorts the tokens of one micro-batch on one device by their n-gram;
            indices into the device's own B·T tokens.
    """

    ngram_of_token: Int32[Any, "A orders B T"]
    token_order: Int32[Any, "A orders B T"]


class MemoryPlan(NamedTuple):
    """The plan of one optimizer step.

    Attributes:
        tokens: from tokens to n-grams.
        layers: from n-grams to rows, by layer id.
        distinct_ngrams: how many n-grams are not padding, by order.
    """

    tokens: TokenPlan
    layers: dict[int, LayerPlan]
    distinct_ngrams: Int32[Any, "orders"]


class Planner:
    """Maps the tokens of an optimizer step to its memory plan.

    Args:
        ngram_hash: the hash.
        batch_shards: devices that B is split over (their tokens are contiguous in B).
    """

    def __init__(self, ngram_hash: NgramHash, *, batch_shards: int = 1) -> None:
        self.ngram_hash = ngram_hash
        self.batch_shards = batch_shards

    def __call__(
        self, tokens: Int[np.ndarray, "A B T"], segments: Int[np.ndarray, "A B T"] | None = None
    ) -> MemoryPlan:
        """Plans one step.

        Args:
            tokens: raw token ids; −1 marks dead positions.
            segments: document number of every position; None: a row is one document.

        Raises:
            InputError: a token id is outside the vocabulary.
        """
        window = [ids.reshape(-1) for ids in self.ngram_hash.look_back(tokens, segments)]
        size = self.ngram_hash.projection.size
        keys = window[0].view(np.int64)
        ngram_of_token, examples = [], []
        for older in window[1:]:
            # An n-gram is an (n−1)-gram and one older token: numbering the distinct ones order by
            # order keeps the keys below tokens × V′, whatever N.
            numbers, _, example = _number_distinct(keys * size + older.view(np.int64))
            keys = numbers.astype(np.int64)
            ngram_of_token.append(numbers)
            examples.append(example)

        orders = [
            [ids[example] for ids in window[: order + 2]] for order, example in enumerate(examples)
        ]
        of_token = np.stack(ngram_of_token, 0).reshape(-1, *tokens.shape).swapaxes(0, 1)
        return MemoryPlan(
            tokens=TokenPlan(np.ascontiguousarray(of_token), self._order_tokens(of_token)),
            layers={
                layer: self._plan_layer(index, orders, tokens.size)
                for index, layer in enumerate(self.ngram_hash.spec.layers)
            },
            distinct_ngrams=np.array([len(example) for example in examples], np.int32),
        )

    def _order_tokens(
        self, ngram_of_token: Int32[np.ndarray, "A orders B T"]
    ) -> Int32[np.ndarray, "A orders B T"]:
        shape = ngram_of_token.shape
        by_device = ngram_of_token.reshape(*shape[:2], self.batch_shards, -1)
        order = np.argsort(by_device, axis=-1, kind="stable").astype(np.int32)
        return order.reshape(shape)

    def _plan_layer(self, index: int, orders: list[list[np.ndarray]], tokens: int) -> LayerPlan:
        ngram_hash = self.ngram_hash
        layer, beyond = ngram_hash.spec.layers[index], ngram_hash.padded_rows[index]
        rows = np.full((len(orders), ngram_hash.spec.heads, tokens), beyond, np.int32)
        for order, window in enumerate(orders):
            (rows_of_order,) = ngram_hash.hash_window(layer, window, least_order=order + 2)
            rows[order, :, : len(window[0])] = rows_of_order
        by_ngram = rows.swapaxes(1, 2).reshape(-1)
        slots, slot_order, firsts = _number_distinct(by_ngram)
        distinct = by_ngram[firsts]
        distinct = distinct[distinct < beyond]
        padding = beyond + np.arange(len(by_ngram) - len(distinct), dtype=np.int32)
        return LayerPlan(
            rows=np.concatenate([distinct, padding]),
            slot_of_ngram=slots.reshape(len(orders), tokens, -1),
            slot_order=slot_order,
            distinct_rows=np.array(len(distinct), np.int32),
        )


def _number_distinct(
    keys: Int[np.ndarray, "n"],
) -> tuple[Int32[np.ndarray, "n"], Int32[np.ndarray, "n"], Int[np.ndarray, "distinct"]]:
    """Numbers the distinct keys in ascending order.

    Returns the number of every key, the stable order that sorts the keys, and where each distinct
    key stands first.
    """
    order = np.argsort(keys, kind="stable")
    ascending = keys[order]
    is_new = np.empty(len(keys), bool)
    is_new[:1] = True
    np.not_equal(ascending[1:], ascending[:-1], out=is_new[1:])
    numbers = np.empty(len(keys), np.int32)
    numbers[order] = np.cumsum(is_new, dtype=np.int32) - 1
    return numbers, order.astype(np.int32), order[is_new]
