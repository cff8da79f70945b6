"""Which rows of a table are hot: those that are most frequent in training text."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from engram_jax.data.corpus import CorpusView
from engram_jax.errors import InputError
from engram_jax.hashing import NgramHash
from engram_jax.memory.places import stored_places

COUNTED = 2_000_000  # tokens of training text


def hot_rows(
    views: Sequence[CorpusView], ngram_hash: NgramHash, count: int, *, tokens: int = COUNTED
) -> dict[int, Int32[np.ndarray, "C"]]:
    """The places of the rows that a text reads most often, by layer id; the most frequent first.

    Args:
        views: the sources of the text.
        ngram_hash: the hash.
        count: number of rows; fewer, if the text reads fewer.
        tokens: tokens of the text, equally many of each source.

    Raises:
        InputError: there is no text.
    """
    text = sample_text(views, tokens)
    return {
        layer: by_frequency(places_of(text, ngram_hash, layer))[:count]
        for layer in ngram_hash.spec.layers
    }


class Text(NamedTuple):
    """Tokens and the number of their document, as one row."""

    tokens: Int32[np.ndarray, "1 tokens"]
    segments: Int32[np.ndarray, "1 tokens"]


def sample_text(views: Sequence[CorpusView], count: int) -> Text:
    """Documents in random order, the same each time.

    Args:
        views: the sources; equally many tokens of each are taken.
        count: number of tokens; fewer, if the sources have fewer.

    Raises:
        InputError: the sources have no documents.
    """
    texts = []
    for view in (view.by_hash() for view in views):
        left = count // len(views)
        for document in range(len(view)):
            texts.append(view.tokens(document)[:left])
            left -= len(texts[-1])
            if not left:
                break
    if not texts:
        raise InputError("The training text has no documents; change data.held_out.")
    np.random.default_rng(0).shuffle(texts)
    numbers = np.arange(len(texts), dtype=np.int32)
    segments = np.repeat(numbers, [len(text) for text in texts])
    return Text(np.concatenate(texts)[None], segments[None])


def places_of(text: Text, ngram_hash: NgramHash, layer: int) -> Int32[np.ndarray, "tokens H"]:
    """The places of the rows that each token of a text reads in a layer."""
    size = ngram_hash.padded_rows[ngram_hash.spec.layers.index(layer)]
    return stored_places(ngram_hash.hash_tokens(layer, *text), size)[0]


def by_frequency(places: Int32[np.ndarray, "tokens H"]) -> Int32[np.ndarray, "distinct"]:
    """The distinct places, the most frequent first."""
    distinct, times = np.unique(places, return_counts=True)
    return distinct[np.argsort(-times, kind="stable")]
