"""The layer that owns its table, compared with the paper's demo."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import golden_form, golden_hash, load_golden, set_golden_weights

from engram_jax import EngramWithTable


@pytest.mark.parametrize("name", ["a_small", "b_small"])
def test_golden_forward_from_raw_tokens(name: str) -> None:
    golden, sizes = load_golden(name)
    ngram_hash = golden_hash(golden, sizes)
    layer, table = sizes["layers"][0], golden["table"]
    module = EngramWithTable(
        *(sizes["hidden"], table.shape[1], ngram_hash, layer, golden_form(sizes)),
        branches=sizes["branches"],
        rngs=nnx.Rngs(0),
    )
    module.table[...] = module.table.at[: len(table)].set(table)
    set_golden_weights(module.engram, golden)

    rows = jnp.asarray(ngram_hash.hash_tokens(layer, golden["ids"]))
    output, gate = module(jnp.asarray(golden["hidden"]), rows)
    np.testing.assert_allclose(gate, golden["gate"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(output, golden["output"], atol=1e-5, rtol=0)
