"""A finished table outside the devices, for generation and scoring."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.experimental.compute_on import compute_on
from jaxtyping import Array, Bool, Int32, Shaped, UInt32

from engram_jax.memory import records
from engram_jax.memory.initial_rows import mix
from engram_jax.memory.layout import RecordLayout, RowState, Table, initial_records
from engram_jax.memory.records import FEW
from engram_jax.memory.store import RowStore, TableInfo
from engram_jax.sharding import REPLICATED, platform_of

ALIGNMENT = 64  # bytes, of arrays that JAX shares instead of copying them
LANES = 128  # words of a line of a TPU's memory


@no_type_check  # no checks at run time: as a pytree it may also hold shapes or shardings
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


@no_type_check  # no checks at run time: as a pytree it may also hold shapes or shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PinnedTable:
    """A copy of a store in pinned memory of the host, which programs of a TPU read in their loops.

    The host gathers the rows as a part of the program, and the device gets only these. So the table
    takes no memory of the device. Each device of the process has its own copy.

    Attributes:
        slots: slot of every place, from 1; 0: the row was never written.
        lines: the records by slot, in lines of 128 words, because a TPU stores wider arrays in
            tiles. (Records that are no whole lines, which a TPU does not use, are one line each.)
        table: the table.
    """

    slots: Int32[Array, "R"]
    lines: UInt32[Array, "lines width"]
    table: TableInfo = field(metadata={"static": True})

    def read(self, places: Int32[Array, "n"]) -> RowState:
        """The rows of places; zeros for padding, from R up."""
        space, words = jax.memory.Space, self.table.layout.words
        of_record = words // self.lines.shape[1]

        def gather(slots: Array, lines: Array, places: Array, within: Array) -> tuple[Array, Array]:
            found = slots.at[places].get(mode="clip")
            numbers = (jnp.maximum(found, 1) - 1)[:, None] * of_record + within
            return found, lines.at[numbers].get(mode="clip").reshape(-1, words)

        on_host = compute_on(
            gather, compute_type="device_host", out_memory_spaces=(space.Device,) * 2
        )
        # All operands of the host are in its memory, also these constants.
        within = jax.device_put(jnp.arange(of_record, dtype=jnp.int32)[None], space.Host)
        slots, found = on_host(self.slots, self.lines, jax.device_put(places, space.Host), within)
        return _complete(self.table, places, slots, self.table.layout.unpack(found))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CallbackTable:
    """A store that compiled programs read by a callback.

    Attributes:
        store: the store.
    """

    store: RowStore = field(metadata={"static": True})

    @property
    def table(self) -> TableInfo:
        """The table."""
        return self.store.table

    @property
    def layout(self) -> RecordLayout:
        """Layout of a record."""
        return self.table.layout

    def fetch(self, places: Int32[np.ndarray, "n"]) -> UInt32[np.ndarray, "n words"]:
        """The records of places, on the host; zeros for padding, from R up."""
        found = np.empty((len(places), self.layout.words), np.uint32)
        rows = self.store.table.rows
        self.store.read_for_program(np.minimum(places, rows - 1), found)
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


BareTable = InPlaceTable | PinnedTable | CallbackTable


@no_type_check  # no checks at run time: as a pytree it may also hold shapes or shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HotTable:
    """A table outside the devices, with copies of some of its rows on the devices.

    If all rows that a program asks for are copied, only the copies are read. Otherwise the table
    outside the devices is read, too, with padding in place of the copied rows.

    Attributes:
        places: places whose rows are copied, ascending.
        copies: their records in this order, as a small table.
        table: the complete table.
    """

    places: Int32[Array, "C"]
    copies: Table
    table: BareTable

    def read(self, places: Int32[Array, "n"]) -> RowState:
        """The rows of places; zeros for padding, from R up."""
        rows = self.table.table.rows
        # If the search is unrolled, XLA makes one kernel of all its steps.
        numbers = jnp.searchsorted(self.places, places, method="scan_unrolled")
        is_copied = self.places.at[numbers].get(mode="clip") == places
        copied = records.read(self.copies, jnp.where(is_copied, numbers, len(self.places)))
        is_known = is_copied | (places >= rows)  # padding: zeros

        def read_others() -> RowState:
            others = self.table.read(jnp.where(is_known, rows, places))
            return jax.tree.map(partial(_where, is_known), copied, others)

        return jax.lax.cond(jnp.all(is_known), lambda: copied, read_others)


@no_type_check  # no checks at run time: as a pytree it may also hold shapes or shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VerifiedTable:
    """A table of which every row that a program reads is compared with the store.

    The program computes a checksum of each row, and the host, in a callback, that of the row as it
    reads it. The next `RowStore.check_complete` raises if one differs.

    Attributes:
        table: the table that is read.
        store: its store.
    """

    table: BareTable | HotTable
    store: RowStore = field(metadata={"static": True})

    def read(self, places: Int32[Array, "n"]) -> RowState:
        """The rows of at most 8,192 places; zeros for padding, from R up.

        (The arguments of a callback have less than 64 kB: see `CallbackTable.read`.)
        """
        rows = self.table.read(places)
        sums = checksums(self.store.table.layout.pack(rows))
        io_callback(self._compare, None, places, sums)
        return rows

    def _compare(self, places: Array, sums: Array) -> None:
        """Compares checksums of a program with those of the store."""
        numbers = np.asarray(places)
        own = checksums(CallbackTable(self.store).fetch(numbers))
        if len(wrong := numbers[own != np.asarray(sums)]):
            self.store.fail(
                f"A program read another row than the table of layer {self.store.table.layer} has "
                f"at place {wrong[0]} ({len(wrong)} of {len(numbers)} rows differ). Report this, "
                "and keep the tables on the device."
            )
        self.store.compared += len(numbers) - len(wrong)


def checksums(words: UInt32[Any, "n words"]) -> UInt32[Any, "n"]:
    """A checksum of each record, with NumPy or JAX. It differs if any one word does."""
    factors = mix(np.arange(1, words.shape[1] + 1, dtype=np.uint32)) | np.uint32(1)
    return (words * factors[None]).sum(axis=1, dtype=np.uint32)


StoreTable = BareTable | HotTable | VerifiedTable


def called_tables(tables: Mapping[int, StoreTable]) -> dict[int, CallbackTable]:
    """Those tables whose rows of prompts the host reads, before programs need them."""
    below = {layer: t.table if isinstance(t, HotTable) else t for layer, t in tables.items()}
    return {layer: table for layer, table in below.items() if isinstance(table, CallbackTable)}


def open_table(store: RowStore, mesh: jax.sharding.Mesh) -> BareTable:
    """A store of a complete table, for programs on a mesh. It must not be written meanwhile.

    A CPU reads it where it is, if its arrays are aligned. A TPU reads a copy in pinned memory, if
    the store is not in a file, there is room for the copy, and some rows that are read for
    comparison are equal. In all other cases (also on a GPU, or if rows are in another checkpoint),
    programs call the host.
    """
    assert store.first == 0 and store.count == store.table.rows, "a part of a table"
    arrays = store.slots, store.records
    aligned = not any(array.ctypes.data % ALIGNMENT for array in arrays)
    if store.table.start is not None:
        return CallbackTable(store)
    if platform_of(mesh) == "cpu" and aligned:
        replicated = jax.NamedSharding(mesh, REPLICATED)
        slots, rows = (jax.device_put(array, replicated, may_alias=True) for array in arrays)
        return InPlaceTable(slots, rows, store.table)
    if platform_of(mesh) == "tpu" and not store.in_file:
        size = len(mesh.local_devices) * (store.slots.nbytes + store.bytes)
        if size > (free := free_memory()):
            why = f"a copy for each device has {size / 1e9:.1f} GB, and {free / 1e9:.1f} are free"
        elif reads_rightly(table := pin_table(store, mesh), store, mesh):
            return table
        else:
            why = "programs read other rows from pinned memory"
        print(f"Rows are read by calls of the host, one per token: {why}.", file=sys.stderr)
    return CallbackTable(store)


def copy_hot_rows(
    table: BareTable,
    store: RowStore,
    places: Int32[np.ndarray, "C"],
    mesh: jax.sharding.Mesh,
) -> HotTable:
    """A table with copies of the rows of distinct places on every device of a mesh."""
    places, layout = np.sort(places), store.table.layout
    found = np.empty((len(places), layout.words), np.uint32)
    store.read(places, found)
    on_devices = jax.NamedSharding(mesh, REPLICATED)
    copied, found = jax.device_put((places, found), on_devices)
    return HotTable(copied, Table(found, layout, store.table.layer), table)


def pin_table(store: RowStore, mesh: jax.sharding.Mesh) -> PinnedTable:
    """A copy of a store in pinned memory of the host, for every device of a mesh."""
    pinned = jax.NamedSharding(mesh, REPLICATED, memory_kind="pinned_host")
    words = store.table.layout.words
    records = store.records[: max(store.used, 1)]
    lines = records.reshape(-1, words if words % LANES else LANES)
    slots, lines = jax.device_put((store.slots, lines), pinned)
    return PinnedTable(slots, lines, store.table)


def reads_rightly(table: PinnedTable, store: RowStore, mesh: jax.sharding.Mesh) -> bool:
    """Whether a compiled program reads the rows of a store, for 256 places from all parts of it."""
    places = np.linspace(0, store.count - 1, 256).astype(np.int32)
    expected = np.empty((len(places), store.table.layout.words), np.uint32)
    store.read(places, expected)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda table, places: table.read(places))(table, places)
    parts = zip(found, store.table.layout.unpack(jnp.asarray(expected)), strict=True)
    return all(np.asarray(one).tobytes() == np.asarray(other).tobytes() for one, other in parts)


def free_memory() -> int:
    """Bytes of memory that this process may still use (Linux)."""
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = 1024 * int(facts["MemAvailable"].split()[0])
    with suppress(OSError, ValueError):  # without a limit it is "max"
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


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
