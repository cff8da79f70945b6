"""A finished table outside the devices, for generation and scoring."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, Shaped, UInt32

from engram_jax.memory import records
from engram_jax.memory.layout import RecordLayout, RowState, Table, initial_records
from engram_jax.memory.records import FEW
from engram_jax.memory.store import RowStore, TableInfo
from engram_jax.sharding import REPLICATED, platform_of

ALIGNMENT = 64  # bytes, of arrays that JAX shares instead of copying them


@no_type_check  # at run time: as a pytree it also holds shapes and shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InPlaceTable:
    """A store that programs on a CPU read where it is: its arrays share the store's memory or file.

    Attributes:
        slots: slot of every place, from 1; 0: the row was never written.
        records: the records by slot.
        table: the table.
    """

    slots: Int32[Array, "R"]
    records: UInt32[Array, "n words"]
    table: TableInfo = field(metadata={"static": True})

    def read(self, places: Int32[Array, "n"]) -> RowState:
        """The rows of places; zeros for padding, from R up."""
        table, layout = self.table, self.table.layout
        if len(places) <= FEW:
            slots = jax.lax.map(lambda place: self.slots[place], places)
        else:
            slots = self.slots.at[places].get(mode="clip")
        written = records.read(Table(self.records, layout, table.layer), slots - 1)
        initial = layout.unpack(
            initial_records(places, table.seed, layout, table.layer, table.scale)
        )
        own = jax.tree.map(partial(_where, slots > 0), written, initial)
        return jax.tree.map(lambda part: _where(places < table.rows, part, 0), own)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CallbackTable:
    """A store that compiled programs of other platforms read by a callback.

    Attributes:
        store: the store.
    """

    store: RowStore = field(metadata={"static": True})

    @property
    def layout(self) -> RecordLayout:
        """Layout of a record."""
        return self.store.table.layout

    def fetch(self, places: Int32[np.ndarray, "n"]) -> UInt32[np.ndarray, "n words"]:
        """The records of places, on the host; zeros for padding, from R up."""
        found = np.empty((len(places), self.layout.words), np.uint32)
        rows = self.store.table.rows
        self.store.read(np.minimum(places, rows - 1), found)
        found[places >= rows] = 0
        return found

    def read(self, places: Int32[Array, "n"]) -> RowState:
        """The rows of places in a compiled program, for a few places.

        The callback gets arrays of JAX. Of more than some 64 kB they would be copied by threads
        that all may be busy (jax 0.12.0), so longer lists are for `fetch`.
        """
        shape = jax.ShapeDtypeStruct((len(places), self.layout.words), jnp.uint32)
        words = jax.pure_callback(lambda places: self.fetch(np.asarray(places)), shape, places)
        return self.layout.unpack(words)


StoreTable = InPlaceTable | CallbackTable


def open_table(store: RowStore, mesh: jax.sharding.Mesh) -> StoreTable:
    """A store of a complete table, for programs on a mesh. It must not be written meanwhile."""
    assert store.first == 0 and store.count == store.table.rows, "a part of a table"
    arrays = store.slots, store.records
    aligned = not any(array.ctypes.data % ALIGNMENT for array in arrays)
    if platform_of(mesh) != "cpu" or not aligned:
        return CallbackTable(store)
    replicated = jax.NamedSharding(mesh, REPLICATED)
    slots, rows = (jax.device_put(array, replicated, may_alias=True) for array in arrays)
    return InPlaceTable(slots, rows, store.table)


def _where(condition: Bool[Array, "n"], this: Shaped[Array, "n ..."], other: Any) -> Array:
    """Chooses rows."""
    return jnp.where(condition.reshape(-1, *[1] * (this.ndim - 1)), this, other)
