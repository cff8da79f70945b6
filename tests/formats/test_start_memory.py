"""Memories of other checkpoints under a new network."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import test_deepseek
import test_qwen
from checkpoints import write_checkpoint
from golden import load_golden, qwen_hash, released_hash
from tiny_runs import assert_identical, make_run, tiny_config, vary

from engram_jax.compression import VocabularyProjection
from engram_jax.config import Config, MemoryConfig
from engram_jax.decoding.generate import Generator
from engram_jax.decoding.settings import GenerationSettings
from engram_jax.errors import InputError
from engram_jax.formats import deepseek, mapped_table, start_memory
from engram_jax.formats.export import export_run, open_table
from engram_jax.formats.mapped_table import MappedTable
from engram_jax.formats.start_memory import MappedStart, open_start, open_tables, start_with
from engram_jax.hashing import NgramHash
from engram_jax.layers.engram import EngramConfig
from engram_jax.memory.layout import StorageConfig
from engram_jax.memory.places import stored_places
from engram_jax.memory.row_file import map_rows
from engram_jax.memory.store import RowStore
from engram_jax.memory.store_table import CallbackTable
from engram_jax.memory.store_table import open_table as open_store
from engram_jax.model import DecoderConfig
from engram_jax.placement import open_stores
from engram_jax.program import Program
from engram_jax.run import Run
from engram_jax.sharding import MeshConfig, make_mesh
from engram_jax.trainer import _first_state, train


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose rows had pending updates."""
    folder = tmp_path_factory.mktemp("engram")
    run = Run.open(make_run(folder, "engram").folder)
    export_run(run, run.restore_weights(), folder / "export")
    return folder / "export"


def wider(folder: Path, export: Path) -> Config:
    """A network of another width, with the export's memory."""
    config = tiny_config(folder)
    memory = {"start_from": str(export), "frozen": True}
    return vary(config, model={"width": 48}, memory=memory, train={"steps": 2})


def stored_rows(program: Program, state: object, layer: int) -> np.ndarray:
    """All rows of a table in the order of their numbers."""
    table = np.asarray(state.tables[layer].unpack().value)
    rows = program.ngram_hash.rows[program.ngram_hash.spec.layers.index(layer)]
    return table[stored_places(np.arange(rows, dtype=np.int32), len(table))]


def test_a_run_begins_with_the_memory_of_an_export(
    export: Path, tmp_path: Path, one_device: None
) -> None:
    run = Run.start(wider(tmp_path, export), tmp_path / "run")
    state = _first_state(run)
    mapped = open_table(export, 1)
    found = stored_rows(run.program, state, 1)
    np.testing.assert_array_equal(found, mapped.read(np.arange(mapped.rows)))
    assert not np.asarray(state.tables[1].clocks()).any() and int(state.step) == 0


def test_its_rows_are_copied_once_to_several_devices(
    export: Path, tmp_path: Path, one_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, passes, parts = Run.start(wider(tmp_path, export), tmp_path / "run"), [], MappedStart.parts
    monkeypatch.setattr(MappedStart, "parts", lambda *of: passes.append(1) or parts(*of))
    found = []
    for count in (1, 8):
        mesh = make_mesh(MeshConfig(), jax.devices()[:count])
        program = Program.build(run.config, run.program.ngram_hash, mesh)
        state = start_with(program, program.initial_state(), export)
        found.append(np.asarray(state.tables[1].records))
    np.testing.assert_array_equal(*found)
    assert found[0].any() and len(passes) == 2


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False])
def test_it_trains_equally_wherever_its_rows_are(
    export: Path, tmp_path: Path, one_device: None, frozen: bool
) -> None:
    mapped, states = open_table(export, 1), []
    for placement in ("device", "file"):
        config = vary(wider(tmp_path, export), memory={"placement": placement, "frozen": frozen})
        run = Run.start(config, tmp_path / placement)
        train(run)
        states.append(Run.open(run.folder).restore())
    assert_identical(*states)
    found = stored_rows(run.program, states[0], 1)
    assert np.array_equal(found, mapped.read(np.arange(mapped.rows))) == frozen
    [path] = run.folder.glob("checkpoints/00000002/tables/*")
    assert (len(map_rows(path)[1].places) == 0) == frozen


@pytest.fixture
def in_place(export: Path, tmp_path: Path, one_device: None) -> tuple[Run, Config, np.ndarray]:
    """A run whose rows, except for two, are in a copy of the export, and all its records."""
    shutil.copytree(export, tmp_path / "memory")
    config = vary(
        wider(tmp_path, tmp_path / "memory"),
        memory={"placement": "file", "storage": StorageConfig("bfloat16", "bfloat16", "row")},
    )
    run = Run.start(config, tmp_path / "run")
    program = run.program.on_device()
    table = start_with(program, program.initial_state(), tmp_path / "memory").tables[1]
    expected = np.array(table.records)
    [rows], [padded] = program.ngram_hash.rows, program.ngram_hash.padded_rows
    filled = stored_places(np.arange(rows, dtype=np.int32), padded)
    assert not np.delete(expected, filled, axis=0).any()  # padding
    with open_stores(run.program, tmp_path, "file") as stores:
        state = _first_state(run, stores)
        assert state.tables == {} and stores[1].used == 0
        np.testing.assert_array_equal(read_all(stores[1]), expected)
        expected[[5, 1500]] += 1
        stores[1].write_changed(0, expected)
        assert stores[1].used == 2
        run.save(state, stores)
    return Run.open(run.folder), config, expected


def test_outside_the_devices_its_rows_are_not_copied(
    in_place: tuple[Run, Config, np.ndarray], tmp_path: Path
) -> None:
    run, _, expected = in_place
    np.testing.assert_array_equal(run.restore_weights().tables[1].records, expected)
    for placement in ("host", "file"):
        with open_stores(run.program, tmp_path, placement) as stores:
            run.restore_weights(None, stores)
            assert stores[1].used == 2
            assert isinstance(open_store(stores[1], run.program.mesh), CallbackTable)
            np.testing.assert_array_equal(read_all(stores[1]), expected)
            table = stores[1].table
            half = RowStore(replace(table, start=None), 2048, 2048)  # as of another process
            half.set_initial(table, stores[1]._start)
            places = np.arange(2048, 4096, dtype=np.int32)
            records = np.empty((2048, half.table.layout.words), np.uint32)
            half.read(places, records)
            np.testing.assert_array_equal(records, expected[2048:])


def test_its_rows_are_found_where_the_memory_was_moved(
    in_place: tuple[Run, Config, np.ndarray], tmp_path: Path
) -> None:
    run, config, expected = in_place
    moved = tmp_path / "moved"
    (tmp_path / "memory").rename(moved)
    with pytest.raises(InputError, match=r"memory\. Cannot read .* Move that back, or write"):
        run.restore_weights()
    with pytest.raises(InputError, match="holds another run"):
        Run.start(vary(config, memory={"start_from": str(moved)}), run.folder)
    with (  # before the corpora are read
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(InputError, match="Move that back, or write"),
    ):
        patch.setattr(Run, "corpora", None)
        Run.start(config, run.folder)
    path = run.folder / "config.json"
    path.write_text(path.read_text().replace(str(tmp_path / "memory"), str(moved)))
    theirs = replace(run, checkpoints=Run.open(run.folder).checkpoints)  # as of another run
    np.testing.assert_array_equal(theirs.restore_weights().tables[1].records, expected)
    for other in (False, True):  # something else may be at the old place
        if other:
            (tmp_path / "memory").mkdir()
        np.testing.assert_array_equal(
            Run.open(run.folder).restore_weights().tables[1].records, expected
        )
    Run.start(vary(config, memory={"start_from": str(moved)}), run.folder)


def test_another_memory_in_its_place_is_refused(
    in_place: tuple[Run, Config, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of a small table counts, and 4,096 of a large one."""
    run, _, _ = in_place
    with (tmp_path / "memory" / "model.safetensors").open("r+b") as file:
        file.seek(-4 * 8 * 7, os.SEEK_END)  # a number of a row near the end
        file.write(b"\0\0\0\1")
    with pytest.raises(InputError, match="memory is not that one"):
        run.restore_weights()
    table = open_table(tmp_path / "memory", 1)
    whole = table.fingerprint
    monkeypatch.setattr(mapped_table, "_HASHED", 0)
    monkeypatch.setattr(mapped_table, "_SAMPLED", 100)
    rows = np.array(table.parts[0])
    sampled = MappedTable((rows.copy(),)).fingerprint
    assert sampled != whole
    for row, is_read in ((0, True), (1, False), (len(rows) - 1, True)):
        other = rows.copy()
        other[row, -1] += 1
        assert (MappedTable((other,)).fingerprint != sampled) == is_read
    with pytest.raises(IndexError):
        table.gather(np.array([table.rows]))


def test_rows_of_a_device_that_were_not_changed_are_not_stored(
    in_place: tuple[Run, Config, np.ndarray], tmp_path: Path
) -> None:
    """A checkpoint with arrays goes on with tables outside the devices, if the memory is there."""
    run, config, expected = in_place
    on_devices = Run.start(vary(config, memory={"placement": "device"}), tmp_path / "devices")
    on_devices.save(run.restore())
    trains = Run.start(config, on_devices.folder)
    for is_there in (True, False):
        with open_stores(run.program, tmp_path, "host") as stores:
            trains.restore(stores=stores)
            assert (stores[1].used == 2) == (stores[1].table.start is not None) == is_there
            np.testing.assert_array_equal(read_all(stores[1]), expected)
        if is_there:
            (tmp_path / "memory").rename(tmp_path / "gone")


def test_a_memory_truncated_while_it_is_copied_is_one_sentence(
    in_place: tuple[Run, Config, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, _ = in_place
    opened = open_tables(run.program, tmp_path / "memory")[1]
    monkeypatch.setattr(start_memory, "PART", 512)
    path, parts = tmp_path / "memory" / "model.safetensors", opened.parts(0, 4096)
    next(parts)
    os.truncate(path, 4096)
    with pytest.raises(InputError, match="memory was truncated while its rows were in use"):
        next(parts)
    assert opened.mapped.is_truncated
    with pytest.raises(InputError, match="truncated while it was read"):
        replace(opened.mapped).fingerprint  # noqa: B018


def test_damage_is_one_sentence_when_its_rows_are_read(
    in_place: tuple[Run, Config, np.ndarray], tmp_path: Path
) -> None:
    """Also if a compiled program reads them, which cannot raise an error itself."""
    run, _, expected = in_place
    with open_stores(run.program, tmp_path, "host") as stores:
        run.restore_weights(None, stores)
        table = open_store(stores[1], run.program.mesh)
        path = tmp_path / "memory" / "model.safetensors"
        with path.open("r+b") as file:  # the mapped bytes change, too
            file.seek(-32, os.SEEK_END)
            file.write(np.full(8, np.nan, np.float32).tobytes())
        with pytest.raises(InputError, match=r"layer 1 in .* not finite"):
            read_all(stores[1])
        with path.open("r+b") as file:  # infinite in bfloat16
            file.seek(-32, os.SEEK_END)
            file.write(np.full(8, 3.4e38, np.float32).tobytes())
        with pytest.raises(InputError, match=r"layer 1 in .* not finite"):
            read_all(stores[1])
        good = np.array([5, 6], np.int32)
        assert np.array_equal(table.fetch(good), expected[good])
        stores[1].check_complete()
        assert not table.fetch(np.arange(len(expected), dtype=np.int32)).any()
        with pytest.raises(InputError, match=r"layer 1 in .* not finite"):
            stores[1].check_complete()
        os.truncate(path, path.stat().st_size - 4096)
        with pytest.raises(InputError, match="memory was truncated while its rows were in use"):
            stores[1].check_complete()


def test_two_memories_to_start_from_are_refused(export: Path, tmp_path: Path, one_device) -> None:
    with pytest.raises(InputError, match=r"leave out --memory\.start-from"):
        Run.start(wider(tmp_path, export), tmp_path / "run", start_from=export.parent / "run")


@pytest.mark.slow
def test_texts_are_those_of_a_copied_memory(
    in_place: tuple[Run, Config, np.ndarray], tmp_path: Path
) -> None:
    run, _, _ = in_place
    settings = GenerationSettings(tokens=20, temperature=0.0)
    parts = run.program, run.tokenizer
    expected = Generator(*parts, run.restore_weights()).generate(["the", "a book"], settings)
    with open_stores(run.program, tmp_path, "file") as stores:
        generator = Generator(*parts, run.restore_weights(None, stores), stores)
        assert generator.generate(["the", "a book"], settings) == expected


def read_all(store: RowStore) -> np.ndarray:
    records = np.empty((store.count, store.table.layout.words), np.uint32)
    store.read(np.arange(store.count, dtype=np.int32), records)
    return records


def build(ngram_hash: NgramHash, row_width: int) -> Program:
    spec = ngram_hash.spec
    config = Config(
        model=DecoderConfig(
            vocabulary=ngram_hash.projection.vocab_size,
            width=16,
            layers=4,
            feed_forward=16,
            engram=EngramConfig(),
        ),
        memory=MemoryConfig(
            layers=spec.layers,
            max_order=spec.max_order,
            heads=spec.heads,
            rows_per_head=spec.rows_per_head,
            row_width=row_width,
            hash_variant=spec.variant,
        ),
    )
    return Program.build(config, ngram_hash, make_mesh(MeshConfig(), jax.devices()[:1]))


def test_a_released_memory_under_another_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden, sizes = load_golden("f_v41_mini")
    entries = [test_deepseek.entries(1), test_deepseek.entries(3)]
    folder = write_checkpoint(tmp_path / "deepseek", entries, {"text_config": sizes})
    program = build(released_hash(golden, sizes), 64)
    with pytest.raises(InputError, match=r"tokenizer\.json"):  # nothing else tells its projection
        start_with(program, program.initial_state(), folder)
    theirs = [program.ngram_hash.projection]  # the miniature has a projection and no tokenizer
    monkeypatch.setattr(deepseek, "load_tokenizer", lambda path: path)
    monkeypatch.setattr(deepseek, "project_vocabulary", lambda tokenizer: theirs[0])
    theirs[0] = VocabularyProjection(theirs[0].lookup[::-1].copy())  # of another tokenizer
    with pytest.raises(InputError, match="other n-grams"):
        open_start(folder, program.ngram_hash, 64)
    theirs[0] = program.ngram_hash.projection
    state = start_with(program, program.initial_state(), folder)
    released = deepseek.open_memory(folder, program.ngram_hash.projection)
    for layer in (1, 3):
        rows = np.arange(released.tables[layer].rows)
        found = stored_rows(program, state, layer)
        np.testing.assert_array_equal(found, released.tables[layer].read(rows))
    # One of its layers is enough.
    first = replace(program.ngram_hash.spec, layers=(1,))
    alone = NgramHash.build(first, program.ngram_hash.projection)
    assert open_start(folder, alone, 64).keys() == {1}

    *of_scales, scales = entries[0]["layers.1.engram.embed.scale"]
    entries[0]["layers.1.engram.embed.scale"] = (*of_scales, b"\xff" + scales[1:])  # NaN
    folder = write_checkpoint(tmp_path / "damaged", entries, {"text_config": sizes})
    with pytest.raises(InputError, match=r"layer 1 in .* not finite"):
        start_with(program, program.initial_state(), folder)

    golden, sizes = load_golden("g_qwen_mini")
    folder = write_checkpoint(
        tmp_path / "qwen", [test_qwen.entries(0), test_qwen.entries(1)], sizes
    )
    program = build(qwen_hash(golden, sizes), 8)
    state = start_with(program, program.initial_state(), folder)
    for index, layer in enumerate((1, 3)):
        found = stored_rows(program, state, layer)
        np.testing.assert_array_equal(found, golden[f"table_{index}"][: len(found)])


def test_a_memory_that_does_not_fit_is_one_sentence(
    export: Path, tmp_path: Path, one_device: None
) -> None:
    config = wider(tmp_path, export)
    folder = tmp_path / "run"
    for change, message in (
        (
            {"heads": 1},
            r"grams .* has heads 1\. .* --memory\.layers 1 --memory\.max-order 3 --memory\.heads 2",
        ),
        ({"layers": (0,)}, "other n-grams"),
        ({"hash_variant": "qwen"}, "--memory.hash-variant engram"),
        ({"row_width": 9}, "--memory.row-width 8"),
        ({"start_from": str(export.parent / "run")}, "is a run and no export"),
        ({"start_from": " "}, "memory.start_from is empty"),
        ({"start_from": str(tmp_path / "none")}, r"Cannot read .*config\.json"),
    ):
        with pytest.raises(InputError, match=message):
            Run.start(vary(config, memory=change), folder)
        assert not folder.exists()
    ngram_hash = NgramHash.load(export / "hash.json")
    assert open_start(export, ngram_hash, 8).keys() == {1}
    swapped = ngram_hash.projection.lookup.copy()
    swapped[[-1, -2]] = swapped[[-2, -1]]
    other = replace(ngram_hash, projection=VocabularyProjection(swapped))
    assert other.projection.size == ngram_hash.projection.size
    with pytest.raises(InputError, match="other n-grams"):
        open_start(export, other, 8)
    with pytest.raises(InputError, match="needs memory"):
        vary(config, memory={"layers": ()})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="no memory that is known here"):
        Run.start(vary(config, memory={"start_from": str(tmp_path / "other")}), folder)


def test_the_variant_of_a_run(tmp_path: Path, one_device: None) -> None:
    """Qwen's variant has the end of a text as pad id, and the model's vocabulary."""
    config = vary(
        tiny_config(tmp_path),
        memory={"hash_variant": "qwen", "project_vocabulary": False, "rows_per_head": (50, 50)},
        model={"vocabulary": 8300},
    )
    run = Run.start(config, tmp_path / "run")
    spec = run.program.ngram_hash.spec
    assert spec.variant == "qwen" and spec.pad_id == run.tokenizer.eos_id
    assert run.program.ngram_hash.projection.size == 8300
    reopened = Run.open(tmp_path / "run").program.ngram_hash
    assert reopened.fingerprint == run.program.ngram_hash.fingerprint
