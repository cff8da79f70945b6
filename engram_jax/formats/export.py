"""Our runs as files for other programs, and back.

An export is a folder:

    model.safetensors          dense parameters (`blocks.1.engram.key`), biases of the experts
                               (`expert_bias.2`), tables (`tables.1.weight`, `tables.1.scale`)
    config.json  hash.json     as in a run folder
    tokenizer.model or .json   the tokenizer
    eval.json                  results of eval.py, if there are any
    README.md                  model card
    checksums.json             size and CRC-32 of the files that must not change

Row r of a table is the row of number r (`NgramHash.hash_tokens`), with its pending update applied.
`tables.L.scale` has a factor for each 32 consecutive numbers of a row, if the type has scales.
"""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import Config, load_config, save_config
from engram_jax.errors import InputError
from engram_jax.files import atomic_folder, check_run_path
from engram_jax.formats.export_identity import (
    FORMAT,
    TENSORS,
    check_files,
    check_parts,
    fingerprints,
    write_checksums,
)
from engram_jax.formats.mapped_table import MappedTable
from engram_jax.formats.model_card import model_card
from engram_jax.formats.own_table import (
    make_table,
    map_table,
    read_rows,
    require_finite,
    table_tensors,
)
from engram_jax.formats.quantize import TableType
from engram_jax.formats.safetensors import Tensors, write
from engram_jax.hashing import NgramHash
from engram_jax.memory.layout import Precision, Table
from engram_jax.program import Program
from engram_jax.run import Run
from engram_jax.run_folder import load_run_tokenizer, write_beginning
from engram_jax.sharding import MeshConfig, make_mesh
from engram_jax.train_state import Weights

_TABLE_PARTS = "weight", "scale"  # tensors of a table; not all types have scales


def export_run(
    run: Run, weights: Weights, folder: str | Path, table_type: TableType = "float32"
) -> None:
    """Writes an export. Equal weights give equal bytes.

    Args:
        run: the run.
        weights: its weights, from `run.restore_weights`.
        folder: the folder to create.
        table_type: storage type of the tables.

    Raises:
        InputError: the folder is not empty, or there are numbers that are not finite.
    """
    config, hashes = exported_config(run.config, table_type), run.program.ngram_hash
    tensors: dict[str, Any] = dict(_dense(weights))
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise InputError(
                f"{name} has numbers that are not finite, so the run in {run.folder} has diverged; "
                "export another step."
            )
    dense = sum(tensor.size for tensor in tensors.values())
    for layer in weights.tables:
        tensors |= table_tensors(run.program, weights, layer, table_type)
    metadata = {"format": FORMAT, "step": str(int(weights.step)), "tables": table_type}
    metadata |= fingerprints(hashes, run.tokenizer)
    with atomic_folder(Path(folder)) as partial:
        write(partial / TENSORS, tensors, metadata)
        if hashes is not None:
            hashes.save(partial / "hash.json")
        save_config(config, partial / "config.json")
        (partial / f"tokenizer{run.tokenizer.suffix}").write_bytes(run.tokenizer.file)
        if (run.folder / "eval.json").exists():
            shutil.copyfile(run.folder / "eval.json", partial / "eval.json")
        card = model_card(
            *(config, hashes),
            step=int(weights.step),
            dense=dense,
            table_type=table_type,
            evaluation=partial / "eval.json",
        )
        (partial / "README.md").write_text(card, "utf-8")
        write_checksums(partial)


def import_run(folder: str | Path, run_folder: str | Path) -> Run:
    """Creates a run folder from an export, with a checkpoint of the exported step.

    Rows have no moments, and the optimizer of the dense parameters starts anew. Exporting the run
    with the same storage type gives the same bytes.

    Raises:
        InputError: the export is damaged, or the run folder is not empty.
    """
    folder, run_folder = Path(folder), Path(run_folder)
    check_run_path(run_folder)
    if (folder / "checkpoints").is_dir():
        raise InputError(f"{folder} is a run already, and no export.")
    config = load_config(folder / "config.json")
    check_files(folder, tensors=True)
    tokenizer = load_run_tokenizer(config, folder)
    ngram_hash = NgramHash.load(folder / "hash.json") if config.memory.layers else None
    program = Program.build(config, ngram_hash, make_mesh(MeshConfig(), jax.local_devices()[:1]))
    with atomic_folder(run_folder) as partial:
        tensors = Tensors.open(folder)
        check_parts(tensors, folder, ngram_hash, tokenizer)
        weights = _read_weights(program, tensors, folder)
        texts = {"tokenizer": tokenizer.fingerprint, "corpora": {}}
        write_beginning(partial, config, tokenizer, ngram_hash, texts)
        if (folder / "eval.json").exists():
            shutil.copyfile(folder / "eval.json", partial / "eval.json")
        with program.use_mesh():
            state = program.state_from_weights(weights)
            Run.open(partial).save(replace(state, step=weights.step))
    return Run.open(run_folder)


def open_table(folder: Path, layer: int) -> MappedTable:
    """A table of an export, read in place at its rows.

    Raises:
        InputError: the export has no such table.
    """
    config, tensors = load_config(folder / "config.json"), Tensors.open(folder)
    ngram_hash = NgramHash.load(folder / "hash.json")
    if layer not in config.memory.layers:
        raise InputError(f"{folder} has no table of layer {layer}; it has {config.memory.layers}.")
    rows = ngram_hash.rows[config.memory.layers.index(layer)]
    return map_table(tensors, layer, (rows, config.memory.row_width))


def exported_config(config: Config, table_type: TableType) -> Config:
    """The configuration of an export.

    Rows are stored so that they keep the exported numbers, and come from no other checkpoint.
    """
    value: Precision = "bfloat16" if table_type == "bfloat16" else "float32"
    storage = replace(config.memory.storage, value=value)
    return replace(config, memory=replace(config.memory, storage=storage, start_from=None))


def _dense(weights: Weights) -> Iterator[tuple[str, np.ndarray]]:
    """Dense parameters and biases of experts, by their names in an export."""
    for path, leaf in jax.tree.leaves_with_path(weights.params):
        yield _name(path), np.asarray(leaf)
    for layer, bias in weights.expert_bias.items():
        yield f"expert_bias.{layer}", np.asarray(bias)


def _read_weights(program: Program, tensors: Tensors, folder: Path) -> Weights:
    """The weights of an export; they must have the shapes of the program."""
    abstract = program.abstract_state().weights
    _check_names(tensors, abstract, folder)

    def read(name: str, leaf: Any) -> jax.Array:
        tensors.require(name, leaf.shape, "F32")
        return jax.device_put(require_finite(tensors.view(name), name, folder), leaf.sharding)

    def read_dense(path: Any, leaf: Any) -> jax.Array:
        return read(_name(path), leaf)

    def rows_of(layer: int, table: Table) -> Iterator[np.ndarray]:
        assert program.ngram_hash is not None
        rows = program.ngram_hash.rows[program.ngram_hash.spec.layers.index(layer)]
        mapped = map_table(tensors, layer, (rows, table.layout.width), random=False)
        return read_rows(mapped, rows, f"tables.{layer}", folder)

    return Weights(
        step=jax.device_put(jnp.int32(int(tensors.metadata["step"])), abstract.step.sharding),
        params=jax.tree_util.tree_map_with_path(read_dense, abstract.params),
        tables={
            layer: make_table(program, layer, rows_of(layer, table))
            for layer, table in abstract.tables.items()
        },
        expert_bias={
            layer: read(f"expert_bias.{layer}", leaf)
            for layer, leaf in abstract.expert_bias.items()
        },
    )


def _check_names(tensors: Tensors, abstract: Weights, folder: Path) -> None:
    """Checks that an export has no tensors that its configuration does not have."""
    known = {f"expert_bias.{layer}" for layer in abstract.expert_bias}
    known |= {_name(path) for path, _ in jax.tree.leaves_with_path(abstract.params)}
    known |= {f"tables.{layer}.{part}" for layer in abstract.tables for part in _TABLE_PARTS}
    if unknown := sorted(set(tensors.infos) - known):
        raise InputError(
            f"{folder} has a tensor {unknown[0]}, which its config.json does not have; export the "
            "run again."
        )


def _name(path: Any) -> str:
    """The name of a dense parameter in an export."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
