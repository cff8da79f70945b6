"""The memory of a checkpoint under a new network: `--memory.start-from CHECKPOINT`.

Only the tables are taken over. How the network reads them (keys, value, gates) is trained anew, so
the network may have any width; with `memory.frozen`, the result tells what the tables know.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from engram_jax.errors import InputError
from engram_jax.formats import deepseek, qwen
from engram_jax.formats.export_identity import check_parts
from engram_jax.formats.json_config import positive, read_json
from engram_jax.formats.mapped_table import MappedTable
from engram_jax.formats.own_table import fill_store, make_table, map_table, read_rows
from engram_jax.formats.safetensors import SINGLE, Tensors
from engram_jax.hashing import NgramHash
from engram_jax.placement import Stores
from engram_jax.program import Program
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
            f"The rows of the memory in {folder} are for other n-grams than those of this run. It "
            f"has --memory.layers {_words(spec.layers)} --memory.max-order {spec.max_order} "
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
    """The state with the tables of a checkpoint; the optimizer state of their rows is reset.

    Args:
        program: the program.
        state: the state before the first step.
        folder: the checkpoint.
        stores: get the rows, if the tables are outside the devices.

    Raises:
        InputError: as in `open_start`.
    """
    ngram_hash = program.ngram_hash
    assert ngram_hash is not None, "the configuration has memory"
    mapped = open_start(folder, ngram_hash, program.config.memory.row_width)
    tables = {}
    for layer, rows in zip(ngram_hash.spec.layers, ngram_hash.rows, strict=True):
        parts = read_rows(mapped[layer], rows, f"The memory of layer {layer}", folder)
        if stores:
            fill_store(program, stores[layer], parts)
        else:
            tables[layer] = make_table(program, layer, parts)
    return replace(state, tables=tables)


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
