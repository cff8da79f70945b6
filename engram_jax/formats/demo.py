"""The state dict of the `Engram` module of the demo that the paper published."""

from collections.abc import Mapping

import numpy as np

from engram_jax.errors import InputError
from engram_jax.formats.mapped_table import MappedTable
from engram_jax.formats.released import ReleasedMemory
from engram_jax.hashing import NgramHash
from engram_jax.layers.engram import EngramConfig


def open_memory(
    state: Mapping[str, np.ndarray], ngram_hash: NgramHash, layer: int
) -> ReleasedMemory:
    """The memory of one layer from the state dict of the `Engram` module of the paper's demo.

    Args:
        state: arrays by the module's names, such as `key_projs.0.weight`: a loaded `.npz`, or
            `{name: tensors.view(name) for name in tensors.infos}`.
        ngram_hash: the demo's hash, with the layer ids and sizes of its configuration.
        layer: the module's layer id.

    Raises:
        InputError: an array is missing, or the table has another number of rows.
    """
    branches = sum(name.startswith("key_projs.") and name.endswith("weight") for name in state)
    try:
        table = state["multi_head_embedding.embedding.weight"]
        value = state["value_proj.weight"]
        taps = state["short_conv.conv.weight"]

        def stack(name: str, kind: str = "weight") -> np.ndarray:
            return np.stack([state[f"{name}.{branch}.{kind}"] for branch in range(branches)])

        weights = {
            "value": value.T,
            "value_bias": state["value_proj.bias"],
            "key": stack("key_projs").swapaxes(1, 2),
            "key_bias": stack("key_projs", "bias"),
            "key_norm": stack("norm1"),
            "query_norm": stack("norm2"),
            "convolution_norm": stack("short_conv.norms"),
            "convolution": taps[:, 0].T.reshape(-1, branches, len(value)),
        }
    except (KeyError, ValueError) as error:
        raise InputError(f"This is no state dict of the demo's Engram module ({error}).") from error
    rows = ngram_hash.rows[ngram_hash.spec.layers.index(layer)]
    if len(table) != rows:
        raise InputError(
            f"The table of the demo's layer {layer} has {len(table):,} rows, but the hash has "
            f"{rows:,}; give the hash of its configuration."
        )
    return ReleasedMemory(
        ngram_hash=ngram_hash,
        tables={layer: MappedTable((table,))},
        form=EngramConfig(
            cross_documents=True,
            kernel=taps.shape[2],
            dilation=ngram_hash.spec.max_order,
        ),
        width=len(value),
        branches=branches,
        dtype="float32",
        load_weights=lambda _: weights,
    )
