"""The memory of a checkpoint under a new network: `--memory.start-from CHECKPOINT`.

Only the tables are taken over. How the network reads them (keys, value, gates) is trained anew, so
the network may have any width; with `memory.frozen`, the result tells what the tables know.

Tables outside the devices are not copied: rows are read in the checkpoint until training writes
them, so its tables may be larger than memory and disk would hold with moments.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Int32, UInt32

from engram_jax.errors import InputError
from engram_jax.formats import deepseek, qwen
from engram_jax.formats.export_identity import check_files, check_parts
from engram_jax.formats.json_config import positive, read_json
from engram_jax.formats.mapped_table import MappedTable
from engram_jax.formats.own_table import map_table, require_finite
from engram_jax.formats.safetensors import SINGLE, Tensors
from engram_jax.hashing import NgramHash
from engram_jax.memory.layout import Table
from engram_jax.memory.mapped_rows import read_ahead
from engram_jax.memory.places import row_numbers, stored_places
from engram_jax.memory.store import PART, StartTable, Stores, TableInfo, Written, new_records
from engram_jax.processes import check_same_everywhere, collective, is_leader
from engram_jax.program import Program
from engram_jax.sharding import TABLE_RW
from engram_jax.train_state import TrainState


def open_start(folder: Path, ngram_hash: NgramHash, row_width: int) -> dict[int, MappedTable]:
    """The tables of a checkpoint, by the layer ids of a run. They are not read.

    Args:
        folder: an export of a run, or a checkpoint of DeepSeek-V4.1 or Qwen3.8-Flash-Next.
        ngram_hash: the hash of the run.
        row_width: row width F of the run.

    Raises:
        InputError: it is no such checkpoint, or its rows are for other n-grams or of another width.
    """
    theirs, tables = _open(folder)
    if not _reads_equally(ngram_hash, theirs):
        spec, ids = theirs.spec, theirs.projection
        raise InputError(
            f"The rows of the memory in {folder} are for other n-grams than those of this run, "
            f"which has {_differences(ngram_hash, theirs)}. They need --memory.layers "
            f"{_words(spec.layers)} --memory.max-order {spec.max_order} "
            f"--memory.heads {spec.heads} --memory.rows-per-head {_words(spec.rows_per_head)} "
            f"--memory.hash-seed {spec.seed} --memory.hash-variant {spec.variant}, pad id "
            f"{spec.pad_id}, and a vocabulary of {ids.vocab_size} ids, projected to {ids.size}."
        )
    width = tables[theirs.spec.layers[0]].width
    if width != row_width:
        raise InputError(
            f"The rows in {folder} have {width} numbers, those of this run {row_width}; set "
            f"--memory.row-width {width}."
        )
    return {layer: tables[layer] for layer in ngram_hash.spec.layers}


def start_with(
    program: Program, state: TrainState, folder: Path, stores: Stores | None = None
) -> TrainState:
    """The state with the tables of a checkpoint, whose rows have no moments.

    Args:
        program: the program.
        state: the state before the first step.
        folder: the checkpoint.
        stores: are initialized with the rows, if the tables are outside the devices.

    Raises:
        InputError: as in `open_start`.
    """
    with collective(f"read the memory in {folder}"):
        opened = open_tables(program, folder)
    check_same_everywhere(
        [int(rows.fingerprint[:7], 16) for rows in opened.values()],
        f"The processes see different memories in {folder}; it must be the same for all of them.",
    )
    if is_leader():
        print(f"The tables are initialized with the rows in {folder}.")
    if not stores:
        tables = {layer: read_table(program, rows) for layer, rows in opened.items()}
        return replace(state, tables=tables)
    for layer, store in stores.items():
        store.set_initial(opened[layer].table, opened[layer])
    return state


@dataclass(frozen=True, eq=False)
class MappedStart:
    """The rows of a checkpoint's table as a run's records, without moments (`store.StartRows`).

    Attributes:
        table: the table of the run.
        rows: its rows, without padding.
        mapped: the table of the checkpoint.
        folder: the checkpoint.
    """

    table: TableInfo
    rows: int
    mapped: MappedTable
    folder: Path

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the checkpoint's table."""
        assert self.table.start is not None
        return self.table.start.fingerprint

    def read(self, places: Int32[np.ndarray, "n"]) -> UInt32[np.ndarray, "n words"]:
        """The records of places; zeros for padding.

        Raises:
            InputError: there are numbers that are not finite.
        """
        numbers = row_numbers(places, self.table.rows)
        records = self._records(np.minimum(numbers, self.rows - 1))
        records[numbers >= self.rows] = 0
        return records

    def parts(self, first: int, last: int) -> Iterator[Written]:
        """The rows of the places first … last − 1, in the order of their numbers.

        Raises:
            InputError: there are numbers that are not finite, or a file was truncated.
        """
        read_ahead(*self.mapped.arrays)
        for start in range(0, self.rows, PART):
            numbers = np.arange(start, min(start + PART, self.rows), dtype=np.int32)
            places = stored_places(numbers, self.table.rows)
            own = (places >= first) & (places < last)
            self.check_complete()
            yield Written(places[own], self._records(numbers[own]))

    def check_complete(self) -> None:
        """Checks that the files still have their size.

        Raises:
            InputError: another program has truncated one.
        """
        if self.mapped.is_truncated:
            raise InputError(
                f"A file in {self.folder} was truncated while its rows were in use; download or "
                "export it again."
            )

    def _records(self, numbers: Int32[np.ndarray, "n"]) -> UInt32[np.ndarray, "n words"]:
        values = self.mapped.read(numbers)
        if self.table.layout.storage.value == "bfloat16":  # in which large numbers are infinite
            values = values.astype(ml_dtypes.bfloat16).astype(np.float32)
        require_finite(values, f"The memory of layer {self.table.layer}", self.folder)
        return new_records(self.table.layout, values)


def open_tables(program: Program, folder: Path) -> dict[int, MappedStart]:
    """The tables of a checkpoint for a program, by layer id. They are not read.

    Args:
        program: the program.
        folder: the checkpoint.

    Raises:
        InputError: as in `open_start`.
    """
    ngram_hash = program.ngram_hash
    assert ngram_hash is not None, "the configuration has memory"
    mapped = open_start(folder, ngram_hash, program.config.memory.row_width)
    opened = {}
    for rows, (layer, table) in zip(ngram_hash.rows, program.tables().items(), strict=True):
        start = StartTable(str(folder.absolute()), mapped[layer].fingerprint)
        opened[layer] = MappedStart(replace(table, start=start), rows, mapped[layer], folder)
    return opened


def read_table(program: Program, start: MappedStart) -> Table:
    """A table on the devices with the rows of a checkpoint.

    Raises:
        InputError: it is too large, or there are numbers that are not finite.
    """
    info = start.table
    shape, sharding = (info.rows, info.layout.words), jax.NamedSharding(program.mesh, TABLE_RW)

    def span(index: Any) -> tuple[int, int]:
        begin, end, _ = index[0].indices(info.rows)
        return begin, end

    # A process's devices have consecutive parts, so one pass over the rows fills them all.
    parts = [span(index) for index in sharding.addressable_devices_indices_map(shape).values()]
    first, last = min(begin for begin, _ in parts), max(end for _, end in parts)
    try:
        own = np.zeros((last - first, info.layout.words), np.uint32)
        for places, rows in start.parts(first, last):
            own[places - first] = rows
        records = jax.make_array_from_callback(
            shape, sharding, lambda index: own[slice(*np.subtract(span(index), first))]
        )
    except MemoryError as error:
        raise InputError(
            f"The table of layer {info.layer} has {4 * math.prod(shape) / 1e9:,.0f} GB with its "
            "moments; train with --memory.placement file, and generate with --tables file."
        ) from error
    return Table(records, info.layout, info.layer)


def _open(folder: Path) -> tuple[NgramHash, dict[int, MappedTable]]:
    """The hash and the tables of a checkpoint of any known format."""
    config = read_json(folder / "config.json")
    text = config.get("text_config", config)
    if (folder / "hash.json").exists():
        if not (folder / SINGLE).exists():
            raise InputError(
                f"{folder} is a run and no export; run python -m engram_jax.export {folder} "
                "FOLDER, and start from FOLDER."
            )
        check_files(folder, tensors=False)
        theirs, tensors = NgramHash.load(folder / "hash.json"), Tensors.open(folder)
        check_parts(tensors, folder, theirs)
        try:
            width = positive(config["memory"], "row_width")
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder / 'config.json'} is damaged ({error!r}).") from error
        return theirs, {
            layer: map_table(tensors, layer, (rows, width))
            for layer, rows in zip(theirs.spec.layers, theirs.rows, strict=True)
        }
    if isinstance(text, dict) and "engram_layer_ids" in text:
        memory = deepseek.open_memory(folder)
    elif isinstance(text, dict) and "ple_layer_ids" in text:
        memory = qwen.open_memory(folder)
    else:
        raise InputError(
            f"{folder} has no memory that is known here; give an export of a run, or a checkpoint "
            "of DeepSeek-V4.1-Flash or Qwen3.8-Flash-Next."
        )
    return memory.ngram_hash, memory.tables


def _differences(ours: NgramHash, theirs: NgramHash) -> str:
    """What ours has that theirs has not, in words."""
    pairs = {
        name.replace("_", " "): (value, getattr(theirs.spec, name))
        for name, value in vars(ours.spec).items()
        if name != "layers" or not {*ours.spec.layers} <= {*theirs.spec.layers}
    }
    sizes = ((of.projection.vocab_size, of.projection.size) for of in (ours, theirs))
    pairs["sizes of vocabulary and projection"] = tuple(sizes)  # type: ignore[assignment]
    found = [f"{name} {one}" for name, (one, other) in pairs.items() if one != other]
    return ", ".join(found) or "another projection of the vocabulary, or other multipliers"


def _reads_equally(ours: NgramHash, theirs: NgramHash) -> bool:
    """Whether all layers of ours have equal row numbers in theirs, which may have more layers."""
    if not set(ours.spec.layers) <= set(theirs.spec.layers):
        return False
    index = [theirs.spec.layers.index(layer) for layer in ours.spec.layers]
    return (
        ours.projection.fingerprint == theirs.projection.fingerprint
        and (ours.spec.variant, ours.pad) == (theirs.spec.variant, theirs.pad)
        and ours.end_of_text == theirs.end_of_text
        and np.array_equal(ours.multipliers, theirs.multipliers[index])
        and np.array_equal(ours.primes, theirs.primes[index])
    )


def _words(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))
