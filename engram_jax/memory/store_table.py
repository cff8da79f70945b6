"""A finished table outside the devices, for generation and scoring."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt32

from engram_jax.memory.layout import RecordLayout
from engram_jax.memory.store import RowStore


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StoreTable:
    """One layer's table in a store of all its rows. Compiled programs read it by a callback.

    Attributes:
        store: the store, which must not be written while programs use it.
    """

    store: RowStore = field(metadata={"static": True})

    @property
    def layout(self) -> RecordLayout:
        """Layout of a record."""
        return self.store.table.layout

    def fetch(self, places: Int32[np.ndarray, "n"]) -> UInt32[np.ndarray, "n words"]:
        """The records of places, on the host; zeros for padding, from R up."""
        records = np.empty((len(places), self.layout.words), np.uint32)
        rows = self.store.table.rows
        self.store.read(np.minimum(places, rows - 1), records)
        records[places >= rows] = 0
        return records

    def read(self, places: Int32[Array, "n"]) -> UInt32[Array, "n words"]:
        """The same in a compiled program, for a few places.

        The callback gets arrays of JAX. Of more than some 64 kB they would be copied by threads
        that all may be busy (jax 0.12.0), so longer lists are for `fetch`.
        """
        shape = jax.ShapeDtypeStruct((len(places), self.layout.words), jnp.uint32)
        return jax.pure_callback(lambda places: self.fetch(np.asarray(places)), shape, places)
