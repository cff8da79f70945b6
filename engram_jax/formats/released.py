"""The memory of a released checkpoint: hash, tables and layers, ready to use in another model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32, Int

from engram_jax.formats.mapped_table import MappedTable
from engram_jax.hashing import NgramHash
from engram_jax.layers.engram import Engram, EngramConfig

type LayerWeights = Mapping[str, np.ndarray]  # by name of `Engram`'s parameters


@dataclass(frozen=True, eq=False)
class ReleasedMemory:
    """The memory of a checkpoint, read in place.

    Attributes:
        ngram_hash: the hash; its layer ids are zero-based.
        tables: by layer id.
        form: options of the layers.
        width: model width D.
        branches: residual branches M.
        dtype: dtype of the layers' projections.
        load_weights: gives the dense weights of a layer.
    """

    ngram_hash: NgramHash
    tables: dict[int, MappedTable]
    form: EngramConfig
    width: int
    branches: int
    dtype: str
    load_weights: Callable[[int], LayerWeights]

    def read(
        self,
        layer: int,
        tokens: Int[np.ndarray, "*batch T"],
        segments: Int[np.ndarray, "*batch T"] | None = None,
    ) -> Float32[np.ndarray, "*batch T E"]:
        """The memory vectors of all positions; arguments as for `NgramHash.hash_tokens`."""
        numbers = self.ngram_hash.hash_tokens(layer, tokens, segments)
        return self.tables[layer].read(numbers).reshape(*tokens.shape, -1)

    def layer(self, layer: int) -> Engram:
        """The Engram layer with its weights, which are copied to the device."""
        memory_width = self.ngram_hash.columns * self.tables[layer].width
        module = nnx.eval_shape(
            lambda: Engram(
                *(self.width, memory_width, self.form),
                branches=self.branches,
                dtype=jnp.dtype(self.dtype),
                rngs=nnx.Rngs(0),
            )
        )
        graph, shapes = nnx.split(module)
        weights = {
            name: {"gain": array} if name.endswith("_norm") else array
            for name, array in self.load_weights(layer).items()
        }
        expected = jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(shapes))
        assert jax.tree.map(np.shape, weights) == expected, "a format gives all weights"
        return nnx.merge(graph, jax.tree.map(jnp.asarray, weights))
