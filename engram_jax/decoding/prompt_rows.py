"""Rows of texts that are known in advance, for tables that programs read by a callback."""

import numpy as np
from jaxtyping import Int32

from engram_jax.decoding.extend import FetchedRecords
from engram_jax.decoding.weights import DecodeWeights
from engram_jax.memory.places import stored_places
from engram_jax.memory.store_table import called_tables
from engram_jax.program import Program


class PromptRows:
    """The rows of texts, which the host reads while the devices compute the chunk before.

    Args:
        program: the program.
        weights: its prepared weights.
        tokens: a document in every row, [B, T], then padding.
    """

    def __init__(
        self, program: Program, weights: DecodeWeights, tokens: Int32[np.ndarray, "B T"]
    ) -> None:
        self._tables = called_tables(weights.outside)
        ngram_hash = program.ngram_hash
        self._places = {
            layer: stored_places(ngram_hash.hash_tokens(layer, tokens), table.store.table.rows)
            for layer, table in self._tables.items()
            if ngram_hash is not None
        }

    def chunk(self, first: int, count: int) -> FetchedRecords | None:
        """The records of tokens first … first + count − 1 of every text; None: not needed."""
        fetched = {}
        for layer, places in self._places.items():
            part = places[:, first : first + count]
            records = self._tables[layer].fetch(part.reshape(-1))
            fetched[layer] = records.reshape(*part.shape, -1)
        return fetched or None
