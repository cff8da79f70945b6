"""Records: content, rounding, and the initial table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array

from engram_jax.memory.initial_rows import mix
from engram_jax.memory.layout import RecordLayout, RowState, StorageConfig, init_table
from engram_jax.sharding import TABLE_RW, MeshConfig, make_mesh

SMALLEST = StorageConfig("bfloat16", "bfloat16", "row")


def draw_rows(layout: RecordLayout, count: int = 7) -> RowState:
    generator = np.random.default_rng(0)
    squares = 1 if layout.storage.second_moment == "row" else layout.width
    value, mean, square = (
        jnp.asarray(generator.normal(size=(count, width)), jnp.float32)
        for width in (layout.width, layout.width, squares)
    )
    return RowState(value, mean, square**2, jnp.arange(count, dtype=jnp.int32))


@pytest.mark.parametrize(
    ("width", "words"),
    [(5, 16), (16, 64), (21, 64), (24, 128), (42, 128), (43, 256), (80, 256), (256, 896)],
)
def test_records_fill_whole_lines_and_come_back_bit_for_bit(width: int, words: int) -> None:
    layout = RecordLayout(width)
    rows = draw_rows(layout)
    records = layout.pack(rows)
    assert records.shape == (7, words) and layout.words == words
    for part, back in zip(rows, layout.unpack(records), strict=True):
        assert part.dtype == back.dtype
        np.testing.assert_array_equal(part, back)


@pytest.mark.parametrize(
    ("width", "storage", "words"),
    [
        (80, SMALLEST, 128),
        (24, SMALLEST, 32),
        (24, StorageConfig(second_moment="row"), 64),
        (5, StorageConfig(value="bfloat16"), 16),
        (43, StorageConfig(moments="bfloat16"), 128),
    ],
)
def test_lower_precision_takes_fewer_words_and_rounds_to_nearest(
    width: int, storage: StorageConfig, words: int
) -> None:
    layout = RecordLayout(width, storage)
    rows = draw_rows(layout)
    records = layout.pack(rows)
    assert records.shape == (7, words)
    kinds = storage.value, storage.moments, storage.moments
    back = layout.unpack(records)
    for part, found, kind in zip(rows[:3], back[:3], kinds, strict=True):
        if part.shape[1] == 1:
            kind = "float32"
        np.testing.assert_array_equal(found, part.astype(kind).astype(jnp.float32))
    np.testing.assert_array_equal(back.clock, rows.clock)
    # Values that bfloat16 can represent are stored unchanged, for any random bits.
    again = layout.pack(back, mix(jnp.arange(7, dtype=jnp.uint32)))
    np.testing.assert_array_equal(again, records)


@settings(max_examples=20)
@given(st.floats(1e-30, 1e30), st.booleans(), st.integers(0, 2**32 - 1))
def test_stochastic_rounding_is_right_on_average(size: float, negative: bool, seed: int) -> None:
    """Every element is one of its two neighbors, and their mean is the number, to 5 σ."""
    layout = RecordLayout(16, StorageConfig(value="bfloat16"))
    number = np.float32(-size if negative else size)
    count = 2000
    rows = draw_rows(layout, count)._replace(value=jnp.full((count, 16), number))
    noise = mix(jnp.arange(count, dtype=jnp.uint32) + jnp.uint32(seed))
    found = np.asarray(layout.unpack(layout.pack(rows, noise)).value, np.float64)
    below = (number.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    above = (below.view(np.uint32) + np.uint32(0x10000)).view(np.float32)
    below, above = float(below), float(above)
    assert set(np.unique(found)) <= {below, above}
    share = (float(number) - below) / (above - below)
    deviation = np.sqrt(max(share * (1 - share), 1e-9) / found.size)
    assert abs(np.mean(found == above) - share) < 5 * deviation + 2**-16
    # Elements of a row are rounded independently of each other, and so are rows.
    if 0.2 < share < 0.8:
        ups = (found == above) - share
        assert abs(np.mean(ups[:, 0] * ups[:, 1])) < 5 * share * (1 - share) / np.sqrt(count)
        assert abs(np.mean(ups[:-1] * ups[1:])) < 5 * share * (1 - share) / np.sqrt(ups.size)


def test_what_is_not_finite_stays_so() -> None:
    layout = RecordLayout(4, StorageConfig(value="bfloat16"))
    odd = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800000, 0x7F800000], np.uint32).view(np.float32)
    rows = draw_rows(layout)._replace(value=jnp.tile(jnp.asarray(odd), (7, 1)))
    for noise in (None, jnp.full(7, 0xFFFFFFFF, jnp.uint32)):
        value = np.asarray(layout.unpack(layout.pack(rows, noise)).value)
        assert np.isnan(value[:, :2]).all()
        assert (value[:, 2] == -np.inf).all() and (value[:, 3] == np.inf).all()


def test_small_steps_are_lost_by_nearest_rounding_alone() -> None:
    """A hundred additions of a tenth of the spacing of bfloat16 numbers."""
    layout = RecordLayout(64, StorageConfig(value="bfloat16"))
    step = 2.0**-8 / 10

    def walk(noise_of: int | None) -> Array:
        records = layout.pack(draw_rows(layout)._replace(value=jnp.ones((7, 64))))
        for number in range(100):
            rows = layout.unpack(records)
            noise = None
            if noise_of is not None:
                noise = mix(jnp.arange(7, dtype=jnp.uint32) + jnp.uint32(7 * number + noise_of))
            records = layout.pack(rows._replace(value=rows.value + step), noise)
        return layout.unpack(records).value

    np.testing.assert_array_equal(walk(None), 1.0)
    assert abs(float(walk(5).mean()) - (1 + 100 * step)) < 0.004


@pytest.mark.parametrize("storage", [StorageConfig(), SMALLEST])
@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_a_table_starts_equal_on_every_mesh_and_in_its_parts(
    scale: float, storage: StorageConfig
) -> None:
    seed, layout = np.uint32(7), RecordLayout(5, storage)
    whole = init_table(seed, 8192, layout, 1, scale)
    value, *state = whole.unpack()
    assert value.shape == (8192, 5) and abs(float(value.std()) - scale) < 0.01
    assert not any(np.any(part) for part in state)
    mesh = make_mesh(MeshConfig(fsdp=4))
    place = jax.NamedSharding(mesh, TABLE_RW)
    make = jax.jit(lambda seed: init_table(seed, 8192, layout, 1, scale), out_shardings=place)
    np.testing.assert_array_equal(make(seed).records, whole.records)
    # No device has the complete table.
    memory = make.lower(seed).compile().memory_analysis()
    assert memory.temp_size_in_bytes < whole.records.nbytes / 4
