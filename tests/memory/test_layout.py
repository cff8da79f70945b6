"""Records: what they hold, and how a table of them starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.memory.layout import Rows, init_table, pack, record_words, unpack
from engram_jax.sharding import TABLE_RF, MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("width", "words"),
    [(5, 16), (16, 64), (21, 64), (24, 128), (42, 128), (43, 256), (80, 256), (256, 896)],
)
def test_records_fill_whole_lines_and_come_back_bit_for_bit(width: int, words: int) -> None:
    generator = np.random.default_rng(0)
    floats = [jnp.asarray(generator.normal(size=(7, width)), jnp.float32) for _ in range(3)]
    rows = Rows(*floats, jnp.arange(7, dtype=jnp.int32))
    records = pack(rows)
    assert records.shape == (7, words) and record_words(width) == words
    for part, back in zip(rows, unpack(records, width), strict=True):
        assert part.dtype == back.dtype
        np.testing.assert_array_equal(part, back)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_a_table_starts_equal_on_every_mesh_and_in_its_parts(scale: float) -> None:
    key = jax.random.key(0)
    whole = init_table(key, 8192, 5, scale)
    value, *state = whole.unpack()
    assert value.shape == (8192, 5) and abs(float(value.std()) - scale) < 0.01
    assert not any(np.any(part) for part in state)
    mesh = make_mesh(MeshConfig(fsdp=4))
    place = jax.NamedSharding(mesh, TABLE_RF)
    make = jax.jit(lambda key: init_table(key, 8192, 5, scale), out_shardings=place)
    np.testing.assert_array_equal(make(key).records, whole.records)
    # No device ever holds the whole.
    memory = make.lower(key).compile().memory_analysis()
    assert memory.temp_size_in_bytes < whole.records.nbytes / 4
