"""The memory of DeepSeek-V4.1-Flash (2026-09).

Tensors of layer L (zero-based):

    layers.L.engram.embed.weight    F8_E4M3  [rows, F]           the table
    layers.L.engram.embed.scale     F8_E8M0  [rows, F/32]        a power of two per 32 numbers
    layers.L.engram.wkv.weight      F8_E4M3  [(M+1)·D, E]        keys of the M branches, then value
    layers.L.engram.wkv.scale       F8_E8M0  [(M+1)·D/32, E/32]  a power of two per 32 × 32 numbers
    layers.L.engram.q_weight        BF16     [M, D]              gain of the query norm
    layers.L.engram.k_weight        BF16     [M, D]              gain of the key norm
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from engram_jax.compression import VocabularyProjection, project_vocabulary
from engram_jax.errors import InputError
from engram_jax.formats.json_config import (
    MOST_ORDERS,
    natural,
    naturals,
    positive,
    positive_number,
    read_json,
)
from engram_jax.formats.mapped_table import SCALED, MappedTable
from engram_jax.formats.released import LayerWeights, ReleasedMemory
from engram_jax.formats.safetensors import TensorInfo, Tensors
from engram_jax.hashing import HashSpec, NgramHash
from engram_jax.layers.engram import EngramConfig
from engram_jax.tokenizer import load_tokenizer


@dataclass(frozen=True)
class DeepSeekConfig:
    """The part of a checkpoint's configuration that its memory depends on.

    Attributes:
        spec: the hash.
        row_width: row width F.
        width: model width D.
        branches: residual branches M.
        norm_epsilon: epsilon of the key and query norms.
        projected_ids: size of the vocabulary after projection.
        rows: rows of every layer's table.
    """

    spec: HashSpec
    row_width: int
    width: int
    branches: int
    norm_epsilon: float
    projected_ids: int
    rows: tuple[int, ...]


def read_config(folder: Path) -> DeepSeekConfig:
    """Reads `config.json` of a checkpoint.

    Raises:
        InputError: it is missing, or has no memory of this kind.
    """
    content = read_json(folder / "config.json")
    text = content.get("text_config", content)
    try:
        order = natural(text, "engram_max_ngram_size", least=2, most=MOST_ORDERS)
        return DeepSeekConfig(
            spec=HashSpec(
                layers=naturals(text, "engram_layer_ids"),
                max_order=order,
                heads=positive(text, "engram_n_heads"),
                rows_per_head=(positive(text, "engram_vocab_size"),) * (order - 1),
                pad_id=natural(text, "engram_pad_token_id"),
            ),
            row_width=positive(text, "engram_head_dim"),
            width=positive(text, "hidden_size"),
            branches=positive(text, "hc_mult"),
            norm_epsilon=positive_number(text, "rms_norm_eps"),
            projected_ids=positive(text, "engram_compressed_vocab_size"),
            rows=naturals(text, "engram_num_embeddings"),
        )
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'config.json'} does not describe a memory of DeepSeek-V4.1 ({error!r})."
        ) from error


def inspect(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint's memory, by name. It reads configuration and headers only.

    Raises:
        InputError: a tensor is missing, or types, shapes or numbers of rows do not match.
    """
    config = read_config(folder)
    return _check_tensors(config, Tensors.open(folder), folder)


def open_memory(folder: Path, projection: VocabularyProjection | None = None) -> ReleasedMemory:
    """Opens the memory of a checkpoint. Tables stay in the file; layers are loaded on demand.

    Args:
        folder: folder with `config.json`, the index and the files that it names.
        projection: the vocabulary projection; by default, that of the folder's `tokenizer.json`.

    Raises:
        InputError: as in `inspect`; or the projection does not have the configured size.
    """
    config, tensors = read_config(folder), Tensors.open(folder)
    _check_tensors(config, tensors, folder)
    if projection is None:
        projection = project_vocabulary(load_tokenizer(folder / "tokenizer.json"))
    if projection.size != config.projected_ids:  # all multipliers depend on it
        raise InputError(
            f"The tokenizer projects to {projection.size:,} ids, but the memory in {folder} was "
            f"trained with {config.projected_ids:,}; give the tokenizer of this checkpoint."
        )
    tables = {
        layer: MappedTable(
            (tensors.view(f"{_prefix(layer)}embed.weight", random=True),),
            (tensors.view(f"{_prefix(layer)}embed.scale", random=True),),
        )
        for layer in config.spec.layers
    }
    return ReleasedMemory(
        ngram_hash=NgramHash.build(config.spec, projection),
        tables=tables,
        form=EngramConfig(
            bias=False,
            convolution=False,
            norm_epsilon=config.norm_epsilon,
            signed_root="copysign",
        ),
        width=config.width,
        branches=config.branches,
        dtype="bfloat16",
        load_weights=partial(_load_weights, config, tensors),
    )


def _prefix(layer: int) -> str:
    return f"layers.{layer}.engram."


def _check_tensors(config: DeepSeekConfig, tensors: Tensors, folder: Path) -> dict[str, TensorInfo]:
    # The numbers of rows are sums of primes, which do not depend on the projection.
    identity = VocabularyProjection.identity(max(config.projected_ids, config.spec.pad_id + 1))
    rows = tuple(NgramHash.build(config.spec, identity).rows)
    if rows != config.rows:
        raise InputError(
            f"{folder / 'config.json'} has tables of {config.rows} rows, but its hash has {rows}."
        )
    width, memory_width = (
        config.row_width,
        config.row_width * config.spec.heads * (config.spec.max_order - 1),
    )
    outputs = (config.branches + 1) * config.width
    if width % SCALED or config.width % SCALED:
        raise InputError(
            f"{folder / 'config.json'} has widths {width} and {config.width}, which are no "
            f"multiples of the {SCALED} numbers that share a scale."
        )
    checked: dict[str, TensorInfo] = {}
    for layer, of_layer in zip(config.spec.layers, rows, strict=True):
        for name, dtype, shape in (
            ("embed.weight", "F8_E4M3", (of_layer, width)),
            ("embed.scale", "F8_E8M0", (of_layer, width // SCALED)),
            ("wkv.weight", "F8_E4M3", (outputs, memory_width)),
            ("wkv.scale", "F8_E8M0", (outputs // SCALED, memory_width // SCALED)),
            ("q_weight", "BF16", (config.branches, config.width)),
            ("k_weight", "BF16", (config.branches, config.width)),
        ):
            full = _prefix(layer) + name
            checked[full] = tensors.require(full, shape, dtype)
    return checked


def _load_weights(config: DeepSeekConfig, tensors: Tensors, layer: int) -> LayerWeights:
    """The weights of a layer. Its fp8 matrix is exact in bfloat16."""
    prefix, width, branches = _prefix(layer), config.width, config.branches
    fused = tensors.view(f"{prefix}wkv.weight").astype(np.float32)
    scale = tensors.view(f"{prefix}wkv.scale").astype(np.float32)
    fused *= scale.repeat(SCALED, axis=0).repeat(SCALED, axis=1)
    matrices = fused.astype(ml_dtypes.bfloat16).reshape(branches + 1, width, -1).swapaxes(1, 2)
    return {
        "key": matrices[:branches],
        "value": matrices[branches],
        "key_norm": tensors.view(f"{prefix}k_weight").astype(np.float32),
        "query_norm": tensors.view(f"{prefix}q_weight").astype(np.float32),
    }
