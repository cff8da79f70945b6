"""Engram with its table as a parameter, for notebooks and for use inside another model.

With a large table this is expensive: each step computes a dense gradient of the table and applies
the optimizer to every row. `engram_jax.trainer` avoids that: there, tables are not parameters.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from engram_jax.hashing import NgramHash
from engram_jax.layers.engram import FLOAT32, Engram, EngramConfig
from engram_jax.sharding import extend_spec


class EngramWithTable(nnx.Module):
    """An Engram layer that owns its table and reads it at given row numbers.

    Args:
        width: model width D.
        row_width: width F of a table row.
        ngram_hash: the hash; its `hash_tokens` computes the row numbers.
        layer: layer id, one of `ngram_hash.spec.layers`.
        config: options of the layer.
        branches: residual branches M.
        init_scale: standard deviation of the initial rows.
        dtype: dtype of the projections.
        rngs: random streams.
    """

    def __init__(
        self,
        width: int,
        row_width: int,
        ngram_hash: NgramHash,
        layer: int,
        config: EngramConfig,
        *,
        branches: int = 1,
        init_scale: float = 0.0,
        dtype: jnp.dtype = FLOAT32,
        rngs: nnx.Rngs,
    ) -> None:
        rows = ngram_hash.padded_rows[ngram_hash.spec.layers.index(layer)]
        init = nnx.initializers.normal(init_scale)
        self.table = nnx.Param(init(rngs.params(), (rows, row_width)))
        self.engram = Engram(
            *(width, ngram_hash.columns * row_width, config),
            branches=branches,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        hidden: Float[Array, "B T M D"],
        rows: Int32[Array, "B T H"],
        segments: Int32[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T M D"], Float[Array, "B T M"]]:
        """Returns what to add to the residual branches, and the gates (see `Engram`).

        Args:
            hidden: the residual branches.
            rows: row numbers, from `NgramHash.hash_tokens` on the host.
            segments: document number of every position; None: each row of the batch is one
                document.
        """
        memory = self.table.at[rows].get(out_sharding=extend_spec(rows, None))
        return self.engram(hidden, memory.reshape(*rows.shape[:2], -1), segments)
