"""DeepSeek-V4.1's memory from files of its format, and the state dict of the paper's demo."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import Entry, bfloat16, write_checkpoint
from flax import nnx
from golden import golden_hash, load_golden

from engram_jax.compression import VocabularyProjection
from engram_jax.errors import InputError
from engram_jax.formats import deepseek, demo
from engram_jax.formats.mapped_table import MappedTable
from engram_jax.hashing import DEAD

GOLDEN, SIZES = load_golden("f_v41_mini")
PROJECTION = VocabularyProjection(GOLDEN["token_map"])
CONFIG = {"model_type": "mini", "text_config": SIZES}


def entries(layer: int) -> dict[str, Entry]:
    prefix = f"layers.{layer}.engram"
    written: dict[str, Entry] = {f"layers.{layer}.attn.other": ("BF16", (1,), b"\0\0")}
    for name, dtype in (("weight", "F8_E4M3"), ("scale", "F8_E8M0")):
        for part in ("embed", "wkv"):
            raw = GOLDEN[f"{part}.{name}_{layer}"]
            written[f"{prefix}.{part}.{name}"] = (dtype, raw.shape, raw.tobytes())
    for name in ("q_weight", "k_weight"):
        gain = GOLDEN[f"{name}_{layer}"]
        written[f"{prefix}.{name}"] = ("BF16", gain.shape, bfloat16(gain))
    return written


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature in two files."""
    folder = tmp_path_factory.mktemp("deepseek")
    return write_checkpoint(folder / "mini", [entries(1), entries(3)], CONFIG)


@nnx.jit
def apply(layer, hidden, memory, mask):
    return layer(hidden, memory, token_mask=mask)


@pytest.mark.parametrize("masked", [False, True])
def test_rows_gates_and_outputs_of_the_miniature(folder: Path, masked: bool) -> None:
    memory = deepseek.open_memory(folder, PROJECTION)
    mask, suffix = GOLDEN["token_mask"] | (not masked), "masked_" if masked else ""
    ids = np.where(mask, GOLDEN["ids"], DEAD)[None]
    hidden = GOLDEN["hidden"][None]
    for layer in SIZES["engram_layer_ids"]:
        numbers = memory.ngram_hash.hash_tokens(layer, ids)
        np.testing.assert_array_equal(numbers[0], GOLDEN[f"rows_{suffix}{layer}"])
        # The values of rows, in plain arithmetic from the bytes of the fixture.
        rows = memory.read(layer, ids)
        exponent = GOLDEN[f"embed.scale_{layer}"][numbers].astype(float).repeat(32, axis=-1) - 127
        expected = decode_e4m3(GOLDEN[f"embed.weight_{layer}"])[numbers] * 2.0**exponent
        np.testing.assert_array_equal(rows, expected.reshape(rows.shape))
        added, gate = apply(
            *(memory.layer(layer), jnp.asarray(hidden), jnp.asarray(rows), jnp.asarray(mask[None])),
        )
        # Keys close to the middle of two bfloat16 numbers can round differently: see
        # tests/layers/test_engram.py, which compares with exact keys, and explains the bound.
        np.testing.assert_allclose(gate[0], GOLDEN[f"gate_{suffix}{layer}"], rtol=0, atol=1e-3)
        added = np.asarray(added[0], np.float32)
        expected = GOLDEN[f"output_{suffix}{layer}"]
        bound = 2.0**-8 * (2.01 * np.abs(added) + np.abs(expected)) + 1e-6
        assert (np.abs(hidden[0] + added - expected) <= bound).all()
        hidden = expected[None]


def decode_e4m3(raw: np.ndarray) -> np.ndarray:
    """(−1)^s · 2^(e − 7) · 1.m, or 2^−6 · 0.m for e = 0, from the bits."""
    exponent, mantissa = (raw >> 3 & 15).astype(float), (raw & 7).astype(float)
    size = np.where(exponent > 0, 2.0 ** (exponent - 7) * (1 + mantissa / 8), 2.0**-9 * mantissa)
    return np.where(raw >> 7, -size, size)


def test_rows_are_served_from_the_mapped_bytes(folder: Path) -> None:
    memory = deepseek.open_memory(folder, PROJECTION)
    table = memory.tables[3]
    assert table.rows == 552 and table.width == 64
    assert table.scales is not None and not table.parts[0].flags.owndata
    values, scales = table.gather(np.array([551, 0, 551]))
    assert values.tobytes() == GOLDEN["embed.weight_3"][[551, 0, 551]].tobytes()
    assert scales is not None
    assert scales.tobytes() == GOLDEN["embed.scale_3"][[551, 0, 551]].tobytes()
    # A change of the file is seen, because nothing was copied.
    (info,) = [deepseek.inspect(folder)["layers.3.engram.embed.weight"]]
    before = table.read(np.array([7]))
    with info.file.open("r+b") as file:
        file.seek(info.start + 7 * 64)
        byte = file.read(1)
        file.seek(info.start + 7 * 64)
        file.write(bytes([byte[0] ^ 0x80]))
    after = table.read(np.array([7]))
    assert after[0, 0] == -before[0, 0] != 0 and (after[0, 1:] == before[0, 1:]).all()
    with info.file.open("r+b") as file:
        file.seek(info.start + 7 * 64)
        file.write(byte)


def test_parts_of_a_table_read_as_one() -> None:
    generator = np.random.default_rng(0)
    whole, scales = generator.normal(size=(12, 40)), generator.normal(size=(12, 2))
    parts = tuple(whole.astype(np.float16).reshape(4, 3, 40))
    table = MappedTable(parts, tuple(scales.astype(np.float32).reshape(4, 3, 2)), 0.5)
    rows = generator.integers(0, 12, (5, 7))
    expected = whole.astype(np.float16).astype(np.float32)[rows]
    expected *= scales.astype(np.float32)[rows].repeat(32, axis=2)[..., :40] * np.float32(0.5)
    np.testing.assert_allclose(table.read(rows), expected, rtol=1e-6)
    assert table.rows == 12 and table.read(rows[:0]).shape == (0, 7, 40)


def test_the_released_sizes(tmp_path: Path) -> None:
    """Headers of V4.1's memory, in files without data: only headers are read."""
    config = {
        "text_config": {
            **{"engram_layer_ids": [1, 14], "engram_num_embeddings": [384006168, 384016682]},
            **{"engram_max_ngram_size": 4, "engram_vocab_size": 16000000, "engram_n_heads": 8},
            **{"engram_head_dim": 256, "engram_pad_token_id": 2, "hc_mult": 4},
            **{"engram_compressed_vocab_size": 99092, "hidden_size": 5120, "rms_norm_eps": 1e-20},
        }
    }
    files: list[dict[str, Entry]] = [
        {
            f"layers.{layer}.engram.embed.weight": ("F8_E4M3", (rows, 256), None),
            f"layers.{layer}.engram.embed.scale": ("F8_E8M0", (rows, 8), None),
            f"layers.{layer}.engram.wkv.weight": ("F8_E4M3", (25600, 6144), None),
            f"layers.{layer}.engram.wkv.scale": ("F8_E8M0", (800, 192), None),
            f"layers.{layer}.engram.q_weight": ("BF16", (4, 5120), None),
            f"layers.{layer}.engram.k_weight": ("BF16", (4, 5120), None),
        }
        for layer, rows in ((1, 384006168), (14, 384016682))
    ]
    folder = write_checkpoint(tmp_path / "released", files, config)
    found = deepseek.inspect(folder)
    assert [found[f"layers.{layer}.engram.embed.weight"].shape for layer in (1, 14)] == [
        (384_006_168, 256),
        (384_016_682, 256),
    ]
    assert sum(info.stop - info.start for name, info in found.items() if ".embed." in name) == (
        (384_006_168 + 384_016_682) * 264
    )
    memory = deepseek.open_memory(folder, VocabularyProjection.identity(99_092))
    np.testing.assert_array_equal(memory.ngram_hash.multipliers, GOLDEN["released_multipliers"])
    assert not memory.tables[14].read(np.array([384_016_681, 0])).any()
    with pytest.raises(InputError, match=r"projects to 99,091 ids, .* trained with 99,092"):
        deepseek.open_memory(folder, VocabularyProjection.identity(99_091))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engram_num_embeddings": [384, 551]}, "its hash has"),
        ({"engram_head_dim": 128}, r"embed.weight in .* is F8_E4M3 \[384, 64\], expected"),
        ({"engram_head_dim": 48}, "multiples of the 32"),
        ({"engram_n_heads": "2"}, "does not describe a memory of DeepSeek.*engram_n_heads is '2'"),
        ({"engram_vocab_size": None}, "does not describe"),
        ({"engram_layer_ids": 3}, "does not describe"),
        ({"engram_n_heads": 2**31 - 1}, "heads in all layers is not supported"),
        ({"engram_max_ngram_size": 2**31 - 1}, "engram_max_ngram_size is 2147483647"),
        ({"engram_vocab_size": 2**30}, r"rows; at most 1,073,741,824 are possible"),
        ({"engram_layer_ids": [1.0, 3]}, r"engram_layer_ids is 1\.0"),
        ({"engram_pad_token_id": None}, "engram_pad_token_id is None"),
        ({"engram_vocab_size": 10**30}, "engram_vocab_size is 1000"),
        ({"rms_norm_eps": "1e-20"}, "rms_norm_eps is '1e-20'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"hc_mult": 0}, "does not describe"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(
    folder: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"text_config": SIZES | change}))
    with pytest.raises(InputError, match=message):
        deepseek.inspect(tmp_path)


def test_a_missing_or_damaged_configuration_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Cannot read .*config\.json"):
        deepseek.inspect(tmp_path)
    for content, message in (("{", "not JSON"), ("[]", "not a JSON object"), ("{}", "describe")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match=message):
            deepseek.inspect(tmp_path)


def test_the_demo_state_dict() -> None:
    golden, sizes = load_golden("a_small")
    layer, branches = sizes["layers"][0], range(sizes["branches"])
    taps = golden["conv_w"]  # kernel, branch, channel
    state = {
        "multi_head_embedding.embedding.weight": golden["table"],
        "multi_head_embedding.offsets": np.zeros(3),
        "value_proj.weight": golden["value_w"].T,
        "value_proj.bias": golden["value_b"],
        "short_conv.conv.weight": taps.reshape(len(taps), 1, -1).transpose(2, 1, 0),
        **{f"key_projs.{m}.weight": golden["key_w"][m].T for m in branches},
        **{f"key_projs.{m}.bias": golden["key_b"][m] for m in branches},
        **{f"norm1.{m}.weight": golden["key_norm"][m] for m in branches},
        **{f"norm2.{m}.weight": golden["query_norm"][m] for m in branches},
        **{f"short_conv.norms.{m}.weight": golden["conv_norm"][m] for m in branches},
    }
    ngram_hash = golden_hash(golden, sizes)
    memory = demo.open_memory(state, ngram_hash, layer)
    rows = memory.read(layer, golden["ids"])
    mask = jnp.ones(golden["ids"].shape, bool)
    hidden = jnp.asarray(golden["hidden"])
    added, gate = apply(memory.layer(layer), hidden, jnp.asarray(rows), mask)
    np.testing.assert_allclose(gate, golden["gate"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(added, golden["output"], rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="no state dict"):
        demo.open_memory({}, ngram_hash, layer)
    table = {"multi_head_embedding.embedding.weight": golden["table"][1:]}
    with pytest.raises(InputError, match="give the hash"):
        demo.open_memory(state | table, ngram_hash, layer)
