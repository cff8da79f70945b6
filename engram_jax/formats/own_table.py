"""Our tables as tensors: row r is the row of number r, as the model reads it, and back."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from engram_jax.errors import InputError
from engram_jax.formats.mapped_table import MappedTable
from engram_jax.formats.quantize import SCALES, STORED, TableType, blocks, quantize
from engram_jax.formats.safetensors import Parts, Tensors
from engram_jax.hashing import NgramHash
from engram_jax.memory.layout import Table
from engram_jax.memory.places import stored_places
from engram_jax.memory.store import PART, new_records
from engram_jax.program import Program
from engram_jax.train_state import Weights


def settled_rows(
    program: Program, weights: Weights, layer: int
) -> Iterator[Float32[np.ndarray, "n F"]]:
    """The rows of a table in the order of their numbers, as the model reads them, in parts."""
    assert program.ngram_hash is not None
    table, layout = weights.tables[layer], weights.tables[layer].layout
    records, row_adam = np.asarray(table.records), jax.device_get(program.row_adam)
    step = jax.device_get(weights.step)
    read = jax.jit(lambda part: row_adam.current(layout.unpack(part), step))
    for places in _place_parts(program.ngram_hash, layer):
        whole = np.resize(places, PART)  # one shape, so that `read` is compiled once
        yield np.asarray(read(records[whole]))[: len(places)]


def make_table(program: Program, layer: int, parts: Iterable[Float32[np.ndarray, "n F"]]) -> Table:
    """A table with these rows, in the order of their numbers, without moments.

    Args:
        program: the program that the table is for.
        layer: layer id.
        parts: the rows, in parts as those of `settled_rows`.
    """
    assert program.ngram_hash is not None
    abstract = program.abstract_state().tables[layer]
    records = np.zeros(abstract.records.shape, np.uint32)
    for places, values in zip(_place_parts(program.ngram_hash, layer), parts, strict=True):
        records[places] = new_records(abstract.layout, values)
    return replace(abstract, records=jax.device_put(records, abstract.records.sharding))


def table_tensors(
    program: Program, weights: Weights, layer: int, table_type: TableType
) -> dict[str, Parts]:
    """The tensors of a table. Each reads and quantizes the table by itself, to save memory.

    Args:
        program: the program.
        weights: its weights.
        layer: layer id.
        table_type: the storage type.
    """
    assert program.ngram_hash is not None
    rows = program.ngram_hash.rows[program.ngram_hash.spec.layers.index(layer)]
    width = weights.tables[layer].layout.width

    def quantized(tensor: int) -> Iterator[Any]:
        for part in settled_rows(program, weights, layer):
            yield quantize(part, table_type)[tensor]

    tensors = {f"tables.{layer}.weight": Parts(STORED[table_type], (rows, width), quantized(0))}
    if table_type in SCALES:
        shape = rows, blocks(width)
        tensors[f"tables.{layer}.scale"] = Parts(SCALES[table_type], shape, quantized(1))
    return tensors


def map_table(
    tensors: Tensors, layer: int, shape: tuple[int, int], *, random: bool = True
) -> MappedTable:
    """A table of an export, read in place.

    Args:
        tensors: tensors of the export.
        layer: layer id.
        shape: rows and row width of the table.
        random: it will be read at random rows, so the system should not read ahead.

    Raises:
        InputError: there is no such table.
    """
    view = partial(tensors.view, random=random)
    name = f"tables.{layer}"
    info = tensors.require(f"{name}.weight", shape, "F32", "BF16", "F8_E4M3", "I8")
    scales = None
    if info.dtype in ("F8_E4M3", "I8"):
        scale = "F8_E8M0" if info.dtype == "F8_E4M3" else "BF16"
        tensors.require(f"{name}.scale", (shape[0], blocks(shape[1])), scale)
        scales = (view(f"{name}.scale"),)
    return MappedTable((view(f"{name}.weight"),), scales)


def read_rows(
    mapped: MappedTable, rows: int, name: str, folder: Path
) -> Iterator[Float32[np.ndarray, "n F"]]:
    """The first rows of a table in the order of their numbers, in parts.

    Raises:
        InputError: there are numbers that are not finite.
    """
    for start in range(0, rows, PART):
        part = mapped.read(np.arange(start, min(start + PART, rows)))
        yield require_finite(part, name, folder)


def require_finite(numbers: np.ndarray, name: str, folder: Path) -> np.ndarray:
    """The numbers.

    Raises:
        InputError: not all are finite.
    """
    if not np.isfinite(numbers).all():
        raise InputError(
            f"{name} in {folder} has numbers that are not finite; export the run, or download the "
            "checkpoint again."
        )
    return numbers


def _place_parts(ngram_hash: NgramHash, layer: int) -> Iterator[np.ndarray]:
    """The places of a layer's rows, in the order of their numbers."""
    index = ngram_hash.spec.layers.index(layer)
    rows, padded = ngram_hash.rows[index], ngram_hash.padded_rows[index]
    for start in range(0, rows, PART):
        yield stored_places(np.arange(start, min(start + PART, rows), dtype=np.int32), padded)
