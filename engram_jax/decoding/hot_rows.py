"""Which rows of a table are hot: those that are most frequent in training text."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from engram_jax.data.corpus import CorpusView
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
        tokens: tokens of the text.
    """
    return {
        layer: by_frequency(read_rows(views, ngram_hash, layer, tokens))[:count]
        for layer in ngram_hash.spec.layers
    }


def read_rows(
    views: Sequence[CorpusView], ngram_hash: NgramHash, layer: int, count: int
) -> Int32[np.ndarray, "tokens H"]:
    """The places of the rows that each token of a text reads.

    Args:
        views: the sources; equally many tokens of each are read, documents in random order.
        ngram_hash: the hash.
        layer: layer id.
        count: number of tokens; fewer, if the sources have fewer.
    """
    texts = []
    for view in (view.by_hash() for view in views):
        left = count // len(views)
        for document in range(len(view)):
            texts.append(view.tokens(document)[:left])
            left -= len(texts[-1])
            if not left:
                break
    np.random.default_rng(0).shuffle(texts)
    tokens = np.concatenate(texts)[None]
    segments = np.repeat(np.arange(len(texts)), [len(text) for text in texts])[None]
    size = ngram_hash.padded_rows[ngram_hash.spec.layers.index(layer)]
    return stored_places(ngram_hash.hash_tokens(layer, tokens, segments), size)[0]


def by_frequency(places: Int32[np.ndarray, "tokens H"]) -> Int32[np.ndarray, "distinct"]:
    """The distinct places, the most frequent first."""
    distinct, times = np.unique(places, return_counts=True)
    return distinct[np.argsort(-times, kind="stable")]
