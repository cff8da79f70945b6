"""Tables outside the devices in a run: their stores, and their rows in checkpoints.

A checkpoint of a run whose tables are on the devices has arrays of R rows. Otherwise it has files
`tables/LAYER-FIRST.rows` with the written rows (`memory.row_file`), of each process those of its
devices. Both can be restored by runs of any placement, on any mesh.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt32

from engram_jax.checkpoint import TABLES
from engram_jax.config import load_config
from engram_jax.errors import InputError
from engram_jax.files import expand_home
from engram_jax.formats.start_memory import (
    MappedStart,
    open_start,
    open_tables,
    read_table,
)
from engram_jax.memory import lookup
from engram_jax.memory.layout import Table, init_table
from engram_jax.memory.row_adam import RowAdam
from engram_jax.memory.row_feed import RowFeed
from engram_jax.memory.row_file import map_rows, save_rows
from engram_jax.memory.store import (
    PART,
    Placement,
    RowStore,
    Stores,
    TableInfo,
    Written,
)
from engram_jax.processes import all_agree, collective
from engram_jax.program import Program
from engram_jax.sharding import TABLE_RW, TOKEN_AXES, MeshConfig, make_mesh
from engram_jax.train_state import Weights


@contextmanager
def open_feed(program: Program, folder: Path) -> Iterator[RowFeed | None]:
    """Empty stores for a training run and their feed; None if its tables are on the devices.

    Raises:
        InputError: a file cannot be created.
    """
    memory = program.config.memory
    with open_stores(program, folder, memory.placement) as stores:
        if not stores:
            yield None
            return
        assert isinstance(program.mesh, jax.sharding.Mesh)
        with RowFeed(stores, program.mesh, frozen=memory.frozen) as feed:
            yield feed


@contextmanager
def open_stores(
    program: Program, folder: Path, placement: Placement
) -> Iterator[dict[int, RowStore]]:
    """Empty stores for the tables of this process's devices; none if they are on the devices.

    Args:
        program: the program.
        folder: where files without a name are created.
        placement: where the rows are.

    Raises:
        InputError: a file cannot be created.
    """
    mesh = program.mesh
    assert isinstance(mesh, jax.sharding.Mesh)
    ours, first = len(mesh.local_devices), jax.process_index() * len(mesh.local_devices)
    with ExitStack() as stack:
        stores = {}
        for layer, table in program.tables().items() if placement != "device" else ():
            owned, where = table.rows // mesh.size, folder if placement == "file" else None
            stores[layer] = RowStore(table, first * owned, ours * owned, where)
            stack.callback(stores[layer].close)
        yield stores


def bytes_of_all(stores: Stores) -> int:
    """Bytes of the written rows, over all processes if each has as many as this one."""
    return jax.process_count() * sum(store.bytes for store in stores.values())


def save_stores(stores: Stores, folder: Path) -> None:
    """Writes this process's files of a checkpoint."""
    folder = folder / TABLES
    folder.mkdir(exist_ok=True)
    for layer, store in stores.items():
        save_rows(store, folder / _file_name(layer, store.first))


def row_files(checkpoint: Path, tables: Mapping[int, TableInfo]) -> dict[int, list[Path]]:
    """The files of a checkpoint's tables, by layer id; none if it has arrays.

    Raises:
        InputError: a layer has none.
    """
    folder = checkpoint / TABLES
    if not tables or not folder.is_dir():
        return {}
    found = {layer: sorted(folder.glob(_file_name(layer, None))) for layer in tables}
    if missing := [layer for layer, paths in found.items() if not paths]:
        raise InputError(f"{folder} has no rows of layer {missing[0]}; restore another checkpoint.")
    return found


def take_over(
    program: Program,
    checkpoint: Path,
    weights: Weights,
    before: RowAdam | None,
    keep_moments: bool,
    stores: Stores | None,
) -> dict[int, Table]:
    """The rows of a checkpoint as tables on the devices, or in stores; then there are no tables.

    Args:
        program: the program that will use them.
        checkpoint: folder of the checkpoint.
        weights: what was restored; its tables have no arrays if their rows are in files.
        before: the row optimizer that wrote the checkpoint, if its pending updates are to be
            applied.
        keep_moments: keep the moments then.
        stores: empty stores, which get the rows.
    """
    files, tables, step = row_files(checkpoint, program.tables()), weights.tables, weights.step
    memories = StartMemories(program, checkpoint)
    with program.use_mesh():
        if stores and files:
            in_place = program.tables_on_device and before is None
            fill_stores(memories, stores, files, in_place=in_place)
            if before is not None:
                settle_stores(stores, before, step, keep_moments=keep_moments)
            return {}
        if files:
            tables = load_tables(memories, files)
        if before is not None:
            tables = {
                layer: lookup.settle(table, before, step, keep_moments=keep_moments)
                for layer, table in tables.items()
            }
        if stores:
            if not program.tables_on_device:  # it trains; for decoding, a copy is read faster
                memories.set_initial(stores)
            fill_from_tables(stores, tables)
            return {}
    return tables


def check_start_memory(program: Program, checkpoint: Path) -> None:
    """Checks that the rows which a checkpoint does not have can be found, without reading them.

    Raises:
        InputError: the memory that its run began with is missing.
    """
    memories, tables = StartMemories(program, checkpoint), []
    with suppress(InputError):  # a damaged checkpoint, instead of which an older one is read
        for paths in row_files(checkpoint, program.tables()).values():
            tables.append(map_rows(paths[0])[0])
    for table in tables:
        memories.check(table)


def fill_stores(
    memories: "StartMemories",
    stores: Stores,
    files: Mapping[int, list[Path]],
    *,
    in_place: bool = False,
) -> None:
    """Writes the rows of a checkpoint's files to empty stores.

    Args:
        memories: where the initial rows may be.
        stores: the stores.
        files: by layer id.
        in_place: stores in files map the rows of a single file instead of copying them. Then they
            can only be read.
    """
    for layer, store in stores.items():
        maps = in_place and store.in_file and len(files[layer]) == 1
        theirs, rows = _map_files(files[layer], store.table, random=maps)
        with collective(f"read the memory of layer {layer}"):
            start = memories.find(theirs)
        store.set_initial(start.table if start else theirs, start)
        if maps:
            store.adopt(files[layer][0], rows[0])
            continue
        for written in rows:
            for part in written.parts():
                store.write_own(part)


def fill_from_tables(stores: Stores, tables: Mapping[int, Table]) -> None:
    """Writes the rows of tables on the devices that differ from the initial ones."""
    for layer, store in stores.items():
        for shard in tables[layer].records.addressable_shards:
            store.write_changed(shard.index[0].start or 0, np.asarray(shard.data))


def load_tables(memories: "StartMemories", files: Mapping[int, list[Path]]) -> dict[int, Table]:
    """Tables on the devices from a checkpoint's files."""
    return {
        layer: _load_table(memories, table, files[layer])
        for layer, table in memories.program.tables().items()
    }


def settle_stores(
    stores: Stores, adam: RowAdam, step: Int32[Array, ""], *, keep_moments: bool
) -> None:
    """Applies the pending updates of all written rows (see `lookup.settle`)."""
    adam, step = jax.device_get((adam, step))
    # On one device: each process has other rows, and another number of parts.
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        for layer, store in stores.items():
            layout = store.table.layout
            for places, records in store.written():
                whole = np.resize(records, (PART, layout.words))  # one shape
                part = jax.device_put(whole, jax.NamedSharding(mesh, TABLE_RW))
                table = Table(part, layout, layer)
                settled = lookup.settle(table, adam, step, keep_moments=keep_moments)
                store.write(places, np.asarray(settled.records)[: len(places)])


def _file_name(layer: int, first: int | None) -> str:
    return f"{layer}-{'*' if first is None else first}.rows"


def _map_files(
    paths: list[Path], ours: TableInfo, *, random: bool = False
) -> tuple[TableInfo, list[Written]]:
    """A table as its files describe it, and its written rows, file by file.

    Raises:
        InputError: a file is damaged, or of another table: only the initial rows may differ.
    """
    found = [map_rows(path, random=random) for path in paths]
    for path, (theirs, _) in zip(paths, found, strict=True):
        expected = replace(ours, seed=theirs.seed, scale=theirs.scale, start=theirs.start)
        if not theirs == expected == found[0][0]:
            raise InputError(
                f"{path} has the rows of another table than this run ({theirs}, here {ours}); give "
                "this run the same memory."
            )
    return found[0][0], [written for _, written in found]


class StartMemories:
    """The checkpoints whose rows are the initial ones of a run's tables, each opened once.

    They may have been moved. They are looked for where the configuration of the program says, then
    where that of the checkpoint's run says, then where they were when the checkpoint was saved.

    Args:
        program: the program whose tables these are.
        checkpoint: folder of the checkpoint, in the folder of its run.
    """

    def __init__(self, program: Program, checkpoint: Path) -> None:
        self.program = program
        self._configured = [program.config.memory.start_from]
        with suppress(InputError):  # the run's own files may be gone
            of_run = load_config(checkpoint.parents[1] / "config.json")
            self._configured.append(of_run.memory.start_from)
        self._open = cache(partial(open_tables, program))

    def find(self, table: TableInfo) -> MappedStart | None:
        """The initial rows of a table, if they are in another checkpoint.

        Raises:
            InputError: it is missing, or its rows are others than before.
        """

        def open_one(folder: Path) -> MappedStart:
            found = self._open(folder)[table.layer]
            if table.start is None or found.fingerprint != table.start.fingerprint:
                raise InputError(f"The memory in {folder} is not that one.")
            return found

        return self._first_of(table, open_one)

    def check(self, table: TableInfo) -> None:
        """Like `find`, without reading rows."""
        memory, ngram_hash = self.program.config.memory, self.program.ngram_hash
        assert ngram_hash is not None
        self._first_of(table, lambda folder: open_start(folder, ngram_hash, memory.row_width))

    def set_initial(self, stores: Stores) -> None:
        """Lets the rows of the configured memory be the initial ones of empty stores, if possible.

        Then rows of a complete table that equal them are not written.
        """
        folder, opened = self.program.config.memory.start_from, {}
        with suppress(InputError):
            opened = {} if folder is None else self._open(expand_home(folder))
        if all_agree(bool(opened)):
            for layer, store in stores.items():
                store.set_initial(opened[layer].table, opened[layer])

    def _first_of[Opened](
        self, table: TableInfo, open_one: Callable[[Path], Opened]
    ) -> Opened | None:
        """What can be opened first; None: the initial rows are computed."""
        if table.start is None:
            return None
        problem, recorded = "", table.start.folder
        for folder in dict.fromkeys([*filter(None, self._configured), recorded]):
            try:
                return open_one(expand_home(folder))
            except InputError as error:
                problem = problem or str(error)
        raise InputError(
            f"Checkpoints of this run have only the rows that training has changed; the others are "
            f"in the memory that it began with, {recorded}. {problem} Move that back, or write "
            "where it is as memory.start_from into the run's config.json."
        )


def _load_table(memories: StartMemories, ours: TableInfo, paths: list[Path]) -> Table:
    theirs, rows = _map_files(paths, ours)
    program = memories.program
    sharding = jax.NamedSharding(program.mesh, TABLE_RW)

    def initial(seed: Array) -> UInt32[Array, "R words"]:
        return init_table(seed, ours.rows, ours.layout, ours.layer, theirs.scale).records

    with collective(f"read the memory of layer {ours.layer}"):
        start = memories.find(theirs)
    if start is not None:
        records = read_table(program, start).records
    else:
        make = jax.sharding.auto_axes(initial, axes=TOKEN_AXES, out_sharding=sharding)
        records = jax.jit(make)(np.uint32(theirs.seed))
    for written in rows:
        for places, part in written.parts():
            missing = PART - len(places)
            records = _put_rows(
                records,
                np.pad(places, (0, missing), constant_values=ours.rows),
                np.pad(part, ((0, missing), (0, 0))),
            )
    return Table(records, ours.layout, ours.layer)


@partial(jax.jit, donate_argnums=0)
def _put_rows(
    records: UInt32[Array, "R words"], places: Int32[Array, "n"], rows: UInt32[Array, "n words"]
) -> UInt32[Array, "R words"]:
    """Replaces records at places; those from R up are dropped."""

    def place_own(records: Array, places: Array, rows: Array) -> Array:
        own = places - len(records) * jax.lax.axis_index(TOKEN_AXES)
        own = jnp.where(own < 0, len(records), own)  # negative numbers would count from the end
        return records.at[own].set(rows, mode="drop")

    split = jax.P(TOKEN_AXES)
    return jax.shard_map(place_own, in_specs=(split, jax.P(), jax.P()), out_specs=split)(
        records, places, rows
    )
