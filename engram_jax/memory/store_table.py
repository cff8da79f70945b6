"""A finished table outside the devices, for generation and scoring."""

import os
from dataclasses import dataclass, field
from functools import partial
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compute_on import compute_on
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
        return _complete(table, places, slots, written)


@no_type_check  # at run time: as a pytree it also holds shapes and shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PinnedTable:
    """A copy of a store in pinned memory of the host, which programs of a TPU read in their loops.

    The host gathers the rows as a part of the program, and the device gets only these. So the table
    takes no memory of the device. Each device of the process has its own copy.

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

        def gather(slots: Array, records: Array, places: Array) -> tuple[Array, Array]:
            found = slots.at[places].get(mode="clip")
            return found, records.at[jnp.maximum(found, 1) - 1].get(mode="clip")

        on_host = compute_on(
            gather, compute_type="device_host", out_memory_spaces=(jax.memory.Space.Device,) * 2
        )
        slots, words = on_host(
            self.slots, self.records, jax.device_put(places, jax.memory.Space.Host)
        )
        return _complete(self.table, places, slots, self.table.layout.unpack(words))


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


StoreTable = InPlaceTable | PinnedTable | CallbackTable


def open_table(store: RowStore, mesh: jax.sharding.Mesh) -> StoreTable:
    """A store of a complete table, for programs on a mesh. It must not be written meanwhile.

    A CPU reads it where it is, a TPU from a copy in pinned memory, if there is room for it. Else
    programs call the host. Only the host can read the rows of another checkpoint.
    """
    assert store.first == 0 and store.count == store.table.rows, "a part of a table"
    if store.table.start is not None:
        return CallbackTable(store)
    replicated = jax.NamedSharding(mesh, REPLICATED)
    arrays = store.slots, store.records
    aligned = not any(array.ctypes.data % ALIGNMENT for array in arrays)
    if platform_of(mesh) == "cpu" and aligned:
        slots, rows = (jax.device_put(array, replicated, may_alias=True) for array in arrays)
        return InPlaceTable(slots, rows, store.table)
    if platform_of(mesh) == "tpu" and not store.in_file:
        size = len(mesh.local_devices) * (store.slots.nbytes + store.bytes)
        if size <= os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            return pin_table(store, replicated)
    return CallbackTable(store)


def pin_table(store: RowStore, sharding: jax.NamedSharding) -> PinnedTable:
    """A copy of a store in pinned memory of the host, for every device of a sharding."""
    pinned = sharding.with_memory_kind("pinned_host")
    slots, rows = jax.device_put((store.slots, store.records[: max(store.used, 1)]), pinned)
    return PinnedTable(slots, rows, store.table)


def _complete(
    table: TableInfo, places: Int32[Array, "n"], slots: Int32[Array, "n"], written: RowState
) -> RowState:
    """Rows that have slots, initial rows for the others, and zeros for padding."""
    layout = table.layout
    initial = layout.unpack(initial_records(places, table.seed, layout, table.layer, table.scale))
    own = jax.tree.map(partial(_where, slots > 0), written, initial)
    return jax.tree.map(lambda part: _where(places < table.rows, part, 0), own)


def _where(condition: Bool[Array, "n"], this: Shaped[Array, "n ..."], other: Any) -> Array:
    """Chooses rows."""
    return jnp.where(condition.reshape(-1, *[1] * (this.ndim - 1)), this, other)
