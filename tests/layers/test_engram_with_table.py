"""The layer that owns its table, against the paper's demo."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax import EngramConfig, EngramWithTable, HashSpec, NgramHash, VocabularyProjection

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.mark.parametrize("name", ["a_small", "b_small"])
def test_golden_forward_from_raw_tokens(name: str) -> None:
    golden = np.load(FIXTURES / f"{name}.npz")
    config = json.loads(str(golden["config"]))
    spec = HashSpec(
        layers=tuple(config["layers"]),
        max_order=config["max_ngram"],
        heads=config["heads_per_order"],
        rows_per_head=tuple(config["slots_per_order"]),
        pad_id=config["pad_id"],
        seed=config["seed"],
    )
    ngram_hash = NgramHash.build(spec, VocabularyProjection(golden["lookup"]))
    layer = spec.layers[0]
    form = EngramConfig(
        branches=config["branches"],
        kernel=config["conv_kernel"],
        dilation=config["conv_dilation"],
    )
    module = EngramWithTable(
        config["hidden"], golden["table"].shape[1], ngram_hash, layer, form, rngs=nnx.Rngs(0)
    )
    module.table[...] = module.table.at[: len(golden["table"])].set(golden["table"])
    weights = {
        "key": "key_w",
        "value": "value_w",
        "key_bias": "key_b",
        "value_bias": "value_b",
        "convolution": "conv_w",
    }
    for ours, theirs in weights.items():
        getattr(module.engram, ours)[...] = jnp.asarray(golden[theirs])
    norms = {"key_norm": "key_norm", "query_norm": "query_norm", "convolution_norm": "conv_norm"}
    for ours, theirs in norms.items():
        getattr(module.engram, ours).gain[...] = jnp.asarray(golden[theirs])

    rows = jnp.asarray(ngram_hash.hash_tokens(layer, golden["ids"]))
    output, gate = module(jnp.asarray(golden["hidden"]), rows)
    np.testing.assert_allclose(gate, golden["gate"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(output, golden["output"], atol=1e-5, rtol=0)
