"""The memory ("PLE") of Qwen3.8-Flash-Next (2026-08).

Tensors of a memory layer, found by the ends of their names (`.weight` may follow):

    ngram_embedding.shard_0 …  BF16 or F8_E4M3  [rows/shards, F]  consecutive rows of the table
    weight_scale               F32, BF16        []                with F8_E4M3: a factor for all
    layer_multipliers          I64              [N]
    ngram_heads_vocab_sizes    I64              [H]
    ngram_heads_offsets        I64              [H]
    key_proj                                    [M·D, E]
    value_proj                                  [D, E]
    norm_key, norm_query, norm_conv             [M·D]             gain − 1
    conv1d                                      [M·D, 1, 4]       the last tap is the current token
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from engram_jax.compression import VocabularyProjection
from engram_jax.errors import InputError
from engram_jax.formats.json_config import (
    MOST_ORDERS,
    natural,
    naturals,
    positive,
    positive_number,
    read_json,
)
from engram_jax.formats.mapped_table import MappedTable
from engram_jax.formats.released import LayerWeights, ReleasedMemory
from engram_jax.formats.safetensors import Tensors
from engram_jax.hashing import HashSpec, NgramHash
from engram_jax.layers.engram import EngramConfig

_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class QwenConfig:
    """The part of a checkpoint's configuration that its memory depends on.

    Attributes:
        spec: the hash; its layer ids are zero-based, those of the configuration one-based.
        vocabulary: token ids V.
        memory_width: memory width E.
        width: model width D.
        branches: residual branches M.
        shards: parts of the table.
        multiple: the table's rows are padded to a multiple of this.
        kernel: taps of the convolution.
        norm_epsilon: epsilon of all norms.
    """

    spec: HashSpec
    vocabulary: int
    memory_width: int
    width: int
    branches: int
    shards: int
    multiple: int
    kernel: int
    norm_epsilon: float


def read_config(folder: Path) -> QwenConfig:
    """Reads `config.json` of a checkpoint.

    Raises:
        InputError: it is missing, or has no memory of this kind.
    """
    content = read_json(folder / "config.json")
    text = content.get("text_config", content)
    try:
        order = natural(text, "ngram_size", least=2, most=MOST_ORDERS)
        return QwenConfig(
            spec=HashSpec(
                layers=tuple(number - 1 for number in naturals(text, "ple_layer_ids")),
                max_order=order,
                heads=positive(text, "heads_per_ngram"),
                rows_per_head=(positive(text, "ngram_vocab_size_base"),) * (order - 1),
                pad_id=natural(text, "eos_token_id"),
                seed=natural(text, "seed"),
                variant="qwen",
            ),
            vocabulary=positive(text, "vocab_size"),
            memory_width=positive(text, "ple_embed_dim"),
            width=positive(text, "hidden_size"),
            branches=positive(text, "hc_count"),
            shards=positive(text, "split_ngram_parts"),
            multiple=positive(text, "make_ngram_vocab_size_divisible_by"),
            kernel=positive(text, "ple_conv_kernel_size"),
            norm_epsilon=positive_number(text, "rms_norm_eps"),
        )
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'config.json'} does not describe a memory of Qwen3.8 ({error!r})."
        ) from error


def open_memory(folder: Path) -> ReleasedMemory:
    """Opens the memory of a checkpoint. Tables stay in the files; layers are loaded on demand.

    Raises:
        InputError: a tensor is missing or has another shape, or the hash differs from the constants
            that the checkpoint stores.
    """
    config, tensors = read_config(folder), Tensors.open(folder)
    identity = VocabularyProjection.identity(config.vocabulary)
    ngram_hash = NgramHash.build(config.spec, identity)
    for index, layer in enumerate(config.spec.layers):
        for ending, built in (
            ("layer_multipliers", ngram_hash.multipliers[index]),
            ("ngram_heads_vocab_sizes", ngram_hash.primes[index].reshape(-1)),
            ("ngram_heads_offsets", ngram_hash.offsets[index].reshape(-1)),
        ):
            stored = tensors.view(_require(tensors, layer, ending, built.shape, "I64"))
            if not np.array_equal(stored, built):
                raise InputError(
                    f"{ending} of layer {layer} in {folder} is {stored.tolist()}, but its "
                    f"configuration gives {built.tolist()}."
                )
    return ReleasedMemory(
        ngram_hash=ngram_hash,
        tables={
            layer: _open_table(config, tensors, layer, rows)
            for layer, rows in zip(config.spec.layers, ngram_hash.rows, strict=True)
        },
        form=EngramConfig(
            bias=False,
            norm_epsilon=config.norm_epsilon,
            zero_centered_gain=True,
            kernel=config.kernel,
            dilation=config.spec.max_order,
            convolution_epsilon=config.norm_epsilon,
            cross_documents=True,
        ),
        width=config.width,
        branches=config.branches,
        dtype="bfloat16",
        load_weights=partial(_load_weights, config, tensors),
    )


def _open_table(config: QwenConfig, tensors: Tensors, layer: int, rows: int) -> MappedTable:
    padded = -(-rows // config.multiple) * config.multiple
    columns = config.spec.heads * (config.spec.max_order - 1)
    if config.memory_width % columns:
        raise InputError(
            f"ple_embed_dim {config.memory_width} is no multiple of the {columns} rows of a token; "
            "download config.json again."
        )
    if padded % config.shards:
        raise InputError(
            f"split_ngram_parts {config.shards} does not divide a table of {padded:,} rows; "
            "download config.json again."
        )
    shape = (padded // config.shards, config.memory_width // columns)
    first = _require(tensors, layer, _shard(0), shape, *_FLOATS, "F8_E4M3")
    dtype, factor = tensors.infos[first].dtype, 1.0
    before, after = first.rsplit(_shard(0), 1)
    names = [before + _shard(number) + after for number in range(config.shards)]
    for name in names:
        tensors.require(name, shape, dtype)
    if dtype == "F8_E4M3":
        name = _find(tensors, layer, "weight_scale")
        info, scale = tensors.infos[name], tensors.view(name).reshape(-1)
        if info.dtype not in ("F32", "BF16") or scale.size != 1 or not 0 < scale[0] < np.inf:
            raise InputError(
                f"{name} is {info.dtype} {list(info.shape)} ({scale[:3].tolist()}), expected "
                "one number above 0 in F32 or BF16; it does not fit its table."
            )
        factor = float(scale[0])
    return MappedTable(tuple(tensors.view(name, random=True) for name in names), factor=factor)


def _shard(number: int) -> str:
    return f"ngram_embedding.shard_{number}"


def _load_weights(config: QwenConfig, tensors: Tensors, layer: int) -> LayerWeights:
    width, branches, memory_width = config.width, config.branches, config.memory_width
    channels = branches * width

    def load(ending: str, *shape: int) -> np.ndarray:
        return tensors.view(_require(tensors, layer, ending, shape, *_FLOATS)).astype(np.float32)

    taps = load("conv1d", channels, 1, config.kernel)
    keys = load("key_proj", channels, memory_width)
    return {
        "key": keys.reshape(branches, width, memory_width).swapaxes(1, 2),
        "value": load("value_proj", width, memory_width).T,
        "convolution": taps[:, 0].T.reshape(config.kernel, branches, width),
        **{
            ours: load(theirs, channels).reshape(branches, width)
            for ours, theirs in (
                ("key_norm", "norm_key"),
                ("query_norm", "norm_query"),
                ("convolution_norm", "norm_conv"),
            )
        },
    }


def _require(
    tensors: Tensors, layer: int, ending: str, shape: tuple[int, ...], *dtypes: str
) -> str:
    """The name of a layer's tensor, which must have this shape and one of these types."""
    name = _find(tensors, layer, ending)
    tensors.require(name, shape, *dtypes)
    return name


def _find(tensors: Tensors, layer: int, ending: str) -> str:
    """The name of the only tensor of a layer's memory whose name ends with `.ending`."""
    found = [name for name in tensors.infos if _is_of(name, layer, ending)]
    if len(found) != 1:
        raise InputError(
            f"The checkpoint has {len(found)} tensors …layers.{layer}…ple…{ending}, expected 1; "
            "it is of another format."
        )
    return found[0]


def _is_of(name: str, layer: int, ending: str) -> bool:
    """Whether a name is …layers.LAYER.….ple.….ENDING, or ends so with .weight."""
    _, found, rest = f".{name.removesuffix('.weight')}".partition(f".layers.{layer}.")
    return bool(found) and ".ple." in f".{rest}" and f".{rest}".endswith(f".{ending}")
