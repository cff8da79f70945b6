"""The golden vectors of `fixtures/`, as hashes and layers of this project."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from engram_jax.compression import VocabularyProjection
from engram_jax.hashing import HashSpec, NgramHash
from engram_jax.layers.engram import Engram, EngramConfig

FIXTURES = Path(__file__).parent / "fixtures"
WEIGHTS = {
    "key": "key_w",
    "value": "value_w",
    "key_bias": "key_b",
    "value_bias": "value_b",
    "convolution": "conv_w",
}
GAINS = {"key_norm": "key_norm", "query_norm": "query_norm", "convolution_norm": "conv_norm"}


def load_golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a file, and the sizes in its `config`."""
    with np.load(FIXTURES / f"{name}.npz") as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays["config"]))


def golden_hash(golden: dict[str, np.ndarray], sizes: dict[str, Any]) -> NgramHash:
    """The hash of a file a to e. File e has no lookup, because its ids are already projected."""
    if "lookup" in golden:
        projection, pad_id = VocabularyProjection(golden["lookup"]), sizes["pad_id"]
    else:
        projection = VocabularyProjection.identity(sizes["compressed_vocab"])
        pad_id = sizes["pad_id_compressed"]
    spec = HashSpec(
        layers=tuple(sizes["layers"]),
        max_order=sizes["max_ngram"],
        heads=sizes["heads_per_order"],
        rows_per_head=tuple(sizes["slots_per_order"]),
        pad_id=pad_id,
        seed=sizes["seed"],
    )
    return NgramHash.build(spec, projection)


def released_hash(golden: dict[str, np.ndarray], sizes: dict[str, Any]) -> NgramHash:
    """The hash of file f, whose sizes have the names of the released code."""
    spec = HashSpec(
        layers=tuple(sizes["engram_layer_ids"]),
        max_order=sizes["engram_max_ngram_size"],
        heads=sizes["engram_n_heads"],
        rows_per_head=(sizes["engram_vocab_size"],) * (sizes["engram_max_ngram_size"] - 1),
        pad_id=sizes["engram_pad_token_id"],
    )
    return NgramHash.build(spec, VocabularyProjection(golden["token_map"].astype(np.int32)))


def qwen_hash(golden: dict[str, np.ndarray], sizes: dict[str, Any]) -> NgramHash:
    """The hash of file g, whose sizes have the names of the released code."""
    spec = HashSpec(
        layers=tuple(number - 1 for number in sizes["ple_layer_ids"]),
        max_order=sizes["ngram_size"],
        heads=sizes["heads_per_ngram"],
        rows_per_head=(sizes["ngram_vocab_size_base"],) * (sizes["ngram_size"] - 1),
        pad_id=sizes["eos_token_id"],
        seed=sizes["seed"],
        variant="qwen",
    )
    return NgramHash.build(spec, VocabularyProjection.identity(sizes["vocab_size"]))


def golden_form(sizes: dict[str, Any]) -> EngramConfig:
    """The options of the layer of file a or b."""
    return EngramConfig(kernel=sizes["conv_kernel"], dilation=sizes["conv_dilation"])


def set_golden_weights(layer: Engram, golden: dict[str, np.ndarray]) -> None:
    """Gives a layer of `golden_form` the weights of its file."""
    for ours, theirs in WEIGHTS.items():
        getattr(layer, ours)[...] = jnp.asarray(golden[theirs])
    for ours, theirs in GAINS.items():
        getattr(layer, ours).gain[...] = jnp.asarray(golden[theirs])
