"""Stores of written rows: against a dictionary, in memory and in files."""

import errno
import math
import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_jax.errors import InputError
from engram_jax.memory import mapped_rows
from engram_jax.memory import store as store_module
from engram_jax.memory.layout import RecordLayout, StorageConfig, init_table
from engram_jax.memory.mapped_rows import RowReads
from engram_jax.memory.records import FEW
from engram_jax.memory.row_file import map_rows, save_rows
from engram_jax.memory.store import EXTENT, RowStore, TableInfo, new_records
from engram_jax.memory.store_table import (
    CallbackTable,
    InPlaceTable,
    StoreTable,
    VerifiedTable,
    copy_hot_rows,
    open_table,
    pin_table,
    reads_rightly,
)
from engram_jax.sharding import MeshConfig, make_mesh

TABLE = TableInfo(layer=3, rows=8192, layout=RecordLayout(5), seed=9, scale=0.02, hash="abc")
SMALL = replace(TABLE, layout=RecordLayout(5, StorageConfig("bfloat16", "bfloat16", "row")))


def make_store(path: Path | None, table: TableInfo = TABLE) -> RowStore:
    return RowStore(table, 4096, 4096, path)


def read(store: RowStore, places: np.ndarray) -> np.ndarray:
    out = np.full((len(places), store.table.layout.words), 7, np.uint32)
    store.read(places, out)
    return out


@pytest.mark.parametrize("table", [TABLE, SMALL], ids=["float32", "bfloat16"])
def test_rows_that_were_never_written_are_those_of_a_table_on_the_device(table: TableInfo) -> None:
    expected = init_table(9, 8192, table.layout, 3, 0.02).records
    places = np.random.default_rng(0).permutation(np.arange(4096, 8192, dtype=np.int32))
    np.testing.assert_array_equal(read(make_store(None, table), places), expected[places])


@settings(max_examples=25)
@given(
    writes=st.lists(st.sets(st.integers(4096, 8191), max_size=40), max_size=6),
    asked=st.sets(st.integers(4096, 8191), max_size=40),
    in_file=st.booleans(),
)
def test_a_store_is_a_dictionary_in_the_order_of_first_writes(
    tmp_path_factory: pytest.TempPathFactory,
    writes: list[set[int]],
    asked: set[int],
    in_file: bool,
) -> None:
    folder = tmp_path_factory.mktemp("store")
    store = make_store(folder / "a" if in_file else None)
    generator, known = np.random.default_rng(1), {}
    for number in writes:
        places = generator.permutation(np.array(sorted(number), np.int32))
        records = generator.integers(2**32, size=(len(places), TABLE.layout.words), dtype=np.uint32)
        store.write(places, records)
        known |= dict(zip(places.tolist(), records, strict=True))
    places = np.array(sorted(asked), np.int32)
    expected = TABLE.initial_records(places)
    for row, place in enumerate(places.tolist()):
        expected[row] = known.get(place, expected[row])
    np.testing.assert_array_equal(read(store, places), expected)
    save_rows(store, folder / "saved")
    table, written = map_rows(folder / "saved")
    assert table == TABLE and written.places.tolist() == list(known)
    np.testing.assert_array_equal(written.records, np.array(list(known.values())).reshape(-1, 16))
    store.close()


@pytest.mark.parametrize("table", [TABLE, SMALL], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("count", "pinned"), [(FEW, False), (FEW + 1, False), (FEW, True)])
def test_programs_read_a_store(table: TableInfo, count: int, pinned: bool) -> None:
    """Written rows, rows that were never written, and padding, in every way."""
    rows = RowStore(table, 0, table.rows)
    generator, words = np.random.default_rng(0), table.layout.words
    written = generator.permutation(table.rows)[:3000].astype(np.int32)
    rows.write(written, generator.integers(2**32, size=(3000, words), dtype=np.uint32))
    places = generator.integers(table.rows, size=count, dtype=np.int32)
    places[7] = table.rows  # padding
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    if pinned:
        found = pin_table(rows, mesh)
        assert found.lines.size == 3000 * words and reads_rightly(found, rows, mesh)
        other = RowStore(table, 0, table.rows)
        assert not reads_rightly(pin_table(other, mesh), rows, mesh)
    else:
        found = open_table(rows, mesh)
        assert isinstance(found, InPlaceTable)
        for array, shared in ((found.slots, rows.slots), (found.records, rows.records)):
            for shard in array.addressable_shards:  # nothing is copied, on no device
                assert shard.data.unsafe_buffer_pointer() == shared.ctypes.data
    with jax.set_mesh(mesh):
        state = jax.jit(lambda table, places: table.read(places))(found, places)
    expected = read(rows, np.minimum(places, table.rows - 1))
    expected[7] = 0
    for part, wanted in zip(state, table.layout.unpack(jnp.asarray(expected)), strict=True):
        np.testing.assert_array_equal(part, wanted)


@pytest.mark.parametrize("kind", ["called", "in place", "pinned"])
def test_a_table_is_read_only_for_rows_without_a_copy(kind: str, monkeypatch) -> None:
    store = RowStore(SMALL, 0, SMALL.rows)
    values = np.random.default_rng(0).normal(size=(900, SMALL.layout.width)).astype(np.float32)
    store.write(np.arange(900, dtype=np.int32), new_records(SMALL.layout, values))
    mesh, asked = make_mesh(MeshConfig(), jax.devices()[:2]), []
    tables = {
        "called": lambda *_: CallbackTable(store),
        "in place": open_table,
        "pinned": pin_table,
    }
    hot = np.array([1000, 3, 8, 5], np.int32)  # one was never written
    table = copy_hot_rows(tables[kind](store, mesh), store, hot, mesh)
    fetch = CallbackTable.fetch

    def note(table: CallbackTable, places: np.ndarray) -> np.ndarray:
        asked.append(places.tolist())
        return fetch(table, places)

    monkeypatch.setattr(CallbackTable, "fetch", note)
    for places in ([8, 5, 3, 1000], [8, SMALL.rows, 3, 5], [SMALL.rows - 1, 7, 3, SMALL.rows]):
        with jax.set_mesh(mesh):
            found = jax.jit(lambda table, places: table.read(places))(table, np.int32(places))
        expected = read(store, np.minimum(places, SMALL.rows - 1).astype(np.int32))
        expected[np.array(places) == SMALL.rows] = 0
        for part, wanted in zip(found, SMALL.layout.unpack(jnp.asarray(expected)), strict=True):
            np.testing.assert_array_equal(part, wanted)
    called = {(SMALL.rows - 1, 7, SMALL.rows, SMALL.rows)}
    assert {*map(tuple, asked)} == (called if kind == "called" else set())


def test_verified_rows_that_differ_are_one_sentence() -> None:
    """One bit of one row, read by a program from a copy."""
    store, other = (RowStore(SMALL, 0, SMALL.rows) for _ in range(2))
    values = np.random.default_rng(0).normal(size=(900, SMALL.layout.width)).astype(np.float32)
    for rows in (store, other):
        rows.write(np.arange(900, dtype=np.int32), new_records(SMALL.layout, values))
    other.records[500, 0] ^= 1 << 31
    places = np.arange(0, SMALL.rows + 1, 2, dtype=np.int32)  # the last one is padding
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])

    def read_verified(table: StoreTable) -> None:
        with jax.set_mesh(mesh):
            jax.jit(lambda table, places: table.read(places))(VerifiedTable(table, store), places)
        jax.effects_barrier()
        store.check_complete()

    read_verified(CallbackTable(store))
    read_verified(pin_table(store, mesh))
    assert store.compared == 2 * len(places)
    with pytest.raises(InputError, match=r"layer 3 has at place 500 \(1 of 4097 rows differ\)"):
        read_verified(pin_table(other, mesh))
    store.fail("A consequence.")
    with pytest.raises(InputError, match="layer 3 has at place 500"):
        store.check_complete()


@pytest.mark.parametrize("cold", [0, math.inf])
def test_rows_on_a_slow_disk_are_asked_for_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cold: float
) -> None:
    asked, ask_for = [], store_module.prefetch

    def count(records: np.ndarray, slots: np.ndarray) -> None:
        ask_for(records, slots)
        asked.append(len(slots))

    monkeypatch.setattr(store_module, "prefetch", count)
    monkeypatch.setattr(mapped_rows, "COLD", cold)
    monkeypatch.setattr(mapped_rows, "CALLS", 0)
    rows = make_store(tmp_path)
    places = np.arange(4096, 8192, dtype=np.int32)
    records = np.random.default_rng(0).integers(2**32, size=(4096, 16), dtype=np.uint32)
    rows.write(places, records)
    order = np.random.default_rng(1).permutation(2000)
    np.testing.assert_array_equal(read(rows, places[order]), records[order])
    assert asked == ([] if cold else [512, 512, 2000 - 3 * 512])
    np.testing.assert_array_equal(read(rows, places[:3]), records[:3])
    assert asked[3:] == ([] if cold else [3])
    rows.close()


@pytest.mark.parametrize("count", [24, 2000])
def test_rows_are_asked_for_only_while_they_are_on_the_disk(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """With a simulated clock, in which asking for rows takes longer than reading them in memory."""
    clock, reads, asked = [0.0], RowReads(), []
    monkeypatch.setattr(mapped_rows.time, "perf_counter", lambda: clock[0])

    def ask(part: slice) -> None:
        clock[0] += 10e-6 * (part.stop - part.start)
        asked.append(part)

    def read_all(seconds: float) -> float:
        """The share of rows that are asked for, in 40 reads; the others take `seconds` each."""
        asked.clear()
        for _ in range(40):
            done = 0
            for part in reads.parts(count, ask):
                assert part.start == done < part.stop
                done = part.stop
                clock[0] += (0 if part in asked[-1:] else seconds) * (part.stop - part.start)
            assert done == count
        return sum(part.stop - part.start for part in asked) / (40 * count)

    assert read_all(0.5e-6) == 0
    assert read_all(100e-6) > 0.85
    assert read_all(0.5e-6) < 0.25
    assert read_all(0.5e-6) == 0


@pytest.mark.parametrize("in_file", [True, False])
def test_a_store_without_rows_is_read_in_place(tmp_path: Path, in_file: bool) -> None:
    """As a checkpoint of a frozen table is; all rows are initial ones."""
    save_rows(RowStore(TABLE, 0, TABLE.rows), tmp_path / "rows")
    rows = RowStore(TABLE, 0, TABLE.rows, tmp_path if in_file else None)
    rows.adopt(tmp_path / "rows", map_rows(tmp_path / "rows")[1])
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    found = open_table(rows, mesh)
    for places in (np.arange(5, dtype=np.int32), np.arange(FEW + 1, dtype=np.int32)):
        with jax.set_mesh(mesh):
            state = found.read(jnp.asarray(places))
        expected = TABLE.layout.unpack(jnp.asarray(TABLE.initial_records(places)))
        np.testing.assert_array_equal(state.value, expected.value)
    rows.close()


def test_a_file_truncated_after_it_was_taken_over_is_one_sentence(tmp_path: Path) -> None:
    """Reading its mapped rows would end the process."""
    places = np.arange(9, dtype=np.int32)
    written = RowStore(TABLE, 0, TABLE.rows)
    written.write(places, np.ones((9, TABLE.layout.words), np.uint32))
    save_rows(written, tmp_path / "rows")
    rows = RowStore(TABLE, 0, TABLE.rows, tmp_path)
    rows.adopt(tmp_path / "rows", map_rows(tmp_path / "rows")[1])
    np.testing.assert_array_equal(read(rows, places), 1)
    os.truncate(tmp_path / "rows", 100)
    with pytest.raises(InputError, match="rows was truncated while its rows were in use"):
        read(rows, places)
    rows.close()


def test_only_changed_records_are_written() -> None:
    store = make_store(None)
    places = np.arange(4096, 8192, dtype=np.int32)
    records = TABLE.initial_records(places)
    records[[5, 4000]] += 1
    store.write_changed(4096, records)
    assert store.used == 2
    np.testing.assert_array_equal(read(store, places), records)


def test_a_full_disk_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = replace(TABLE, rows=1 << 20, layout=RecordLayout(42))
    store = RowStore(wide, 0, 1 << 20, tmp_path)
    assert store._file is not None and not any(tmp_path.iterdir())  # it has no name
    number = store._file.file.fileno()
    first = np.arange(1000, dtype=np.int32)
    store.write(first, np.ones((1000, 128), np.uint32))
    assert EXTENT <= os.fstat(number).st_blocks * 512 < 2 * EXTENT  # the rest is a hole

    extent = np.arange(1000, EXTENT // 512, dtype=np.int32)
    for places in (extent, first[:1] + EXTENT // 512):  # the last row needs a second extent
        store.write(places, np.ones((len(places), 128), np.uint32))
    assert os.fstat(number).st_blocks * 512 >= 2 * EXTENT

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    store.write(first, np.full((1000, 128), 2, np.uint32))  # needs no space
    used, many = store.used, np.arange(500, 400_000, dtype=np.int32)
    with pytest.raises(InputError, match=r"Cannot extend .*No space left on device"):
        store.write(many, np.zeros((len(many), 128), np.uint32))
    assert store.used == used and (read(store, first) == 2).all()
    unwritten = many[many > EXTENT // 512]
    np.testing.assert_array_equal(read(store, unwritten), wide.initial_records(unwritten))
    store.close()


def test_a_file_of_the_wrong_kind_or_size_is_one_sentence(tmp_path: Path) -> None:
    store = make_store(None)
    store.write(np.array([5000], np.int32), np.ones((1, 16), np.uint32))
    save_rows(store, tmp_path / "good")
    content = (tmp_path / "good").read_bytes()
    assert len(content) % 64 == 4 and map_rows(tmp_path / "good")[1].places == [5000]
    bad = [b"", content[:-1], content + b"1234", content.replace(b'"rows"', b'"cows"')]
    bad += [content.replace(b'"written": 1', b'"written": 2'), b"ENGRAMRW" + b"\xff" * 80]
    for damaged in bad:
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(InputError, match="bad is damaged"):
            map_rows(tmp_path / "bad")
    with pytest.raises(InputError, match="missing is damaged"):
        map_rows(tmp_path / "missing")


def test_a_table_that_no_system_maps_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = replace(TABLE, rows=2**31 - 4096, layout=RecordLayout(1 << 20))
    with pytest.raises(InputError, match=r"map|Cannot create"):
        RowStore(huge, 0, huge.rows, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Cannot create"):
        make_store(tmp_path / "file")
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    with pytest.raises(InputError, match="posix_fallocate"):
        make_store(tmp_path)
