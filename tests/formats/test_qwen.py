"""Qwen3.8's memory from files of its format."""

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import Entry, bfloat16, write_checkpoint, write_file
from flax import nnx
from golden import load_golden

from engram_jax.errors import InputError
from engram_jax.formats import qwen
from engram_jax.formats.released import ReleasedMemory

GOLDEN, SIZES = load_golden("g_qwen_mini")
WEIGHTS = ("key_proj", "value_proj", "norm_key", "norm_query", "norm_conv", "conv1d")


def entries(index: int) -> dict[str, Entry]:
    prefix = f"model.language_model.layers.{SIZES['ple_layer_ids'][index] - 1}.ple."
    primes = GOLDEN[f"ngram_heads_vocab_sizes_{index}"]
    stored: dict[str, np.ndarray] = {
        "layer_multipliers": GOLDEN[f"layer_multipliers_{index}"],
        "ngram_heads_vocab_sizes": primes,
        "ngram_heads_offsets": np.cumsum(primes) - primes,
    }
    written: dict[str, Entry] = {
        prefix + f"ple_embedding.{name}": ("I64", array.shape, array.tobytes())
        for name, array in stored.items()
    }
    for name in WEIGHTS:
        array = GOLDEN[f"{name}_{index}"]
        ending = ".weight" if name in ("key_proj", "value_proj", "conv1d") else ""
        written[prefix + name + ending] = ("F32", array.shape, array.tobytes())
    for shard, rows in enumerate(np.split(GOLDEN[f"table_{index}"], SIZES["split_ngram_parts"])):
        name = prefix + f"ple_embedding.ngram_embedding.shard_{shard}.weight"
        written[name] = ("F32", rows.shape, rows.tobytes())
    return written


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature in two files."""
    folder = tmp_path_factory.mktemp("qwen")
    return write_checkpoint(folder / "mini", [entries(0), entries(1)], SIZES)


@nnx.jit
def apply(layer, hidden, memory):
    return layer(hidden, memory)


def test_rows_gates_and_outputs_of_the_miniature(folder: Path) -> None:
    memory = qwen.open_memory(folder)
    assert memory.dtype == "bfloat16"  # of the released model; the golden values are in float64
    memory = ReleasedMemory(**vars(memory) | {"dtype": "float32"})
    for index, layer in enumerate((1, 3)):
        rows = memory.read(layer, GOLDEN["ids"])
        numbers = GOLDEN[f"rows_{index}"]
        expected = GOLDEN[f"table_{index}"][numbers].reshape(rows.shape)
        np.testing.assert_array_equal(rows, expected)
        hidden = jnp.asarray(GOLDEN[f"hidden_{index}"])
        added, gate = apply(memory.layer(layer), hidden, jnp.asarray(rows))
        np.testing.assert_allclose(gate, GOLDEN[f"gate_{index}"], rtol=0, atol=1e-5)
        # The roots of small scores amplify rounding; in float64, the largest difference is 1.2e-7.
        np.testing.assert_allclose(added, GOLDEN[f"added_{index}"], rtol=1e-5, atol=1e-5)


def changed(folder: Path, tmp_path: Path, entries: dict[str, Entry]) -> Path:
    """A copy whose first file has other entries."""
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (first,) = tmp_path.glob("model-00001*")
    first.unlink()
    write_file(first, entries)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    kept = {key: name for key, name in index["weight_map"].items() if name != first.name}
    index["weight_map"] = kept | dict.fromkeys(entries, first.name)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def shards(stored: dict[str, Entry]) -> list[str]:
    return [name for name in stored if "shard_" in name]


def test_tables_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    stored = entries(0)
    table = GOLDEN["table_0"].astype(ml_dtypes.bfloat16).astype(np.float32)
    for name, rows in zip(shards(stored), np.split(table, 4), strict=True):
        stored[name] = ("BF16", rows.shape, bfloat16(rows))
    memory = qwen.open_memory(changed(folder, tmp_path, stored))
    np.testing.assert_array_equal(memory.tables[1].read(np.arange(256)), table)


def test_tables_in_fp8_with_one_scale(folder: Path, tmp_path: Path) -> None:
    stored = entries(0)
    table = (GOLDEN["table_0"] * 100).astype(ml_dtypes.float8_e4m3fn)
    for name, rows in zip(shards(stored), np.split(table, 4), strict=True):
        stored[name] = ("F8_E4M3", rows.shape, rows.tobytes())
    place = shards(stored)[0].partition("shard_")[0] + "weight_scale"
    scale = np.float32(0.01)
    with pytest.raises(InputError, match=r"0 tensors .*weight_scale"):
        (tmp_path / "without").mkdir()
        qwen.open_memory(changed(folder, tmp_path / "without", stored))
    stored[place] = ("F32", (1,), scale.tobytes())
    (tmp_path / "with").mkdir()
    memory = qwen.open_memory(changed(folder, tmp_path / "with", stored))
    expected = table.astype(np.float32) * scale
    np.testing.assert_array_equal(memory.tables[1].read(np.arange(256)), expected)


@pytest.mark.parametrize(
    ("ending", "value", "message"),
    [
        ("layer_multipliers", [1, 2, 3], r"layer_multipliers of layer 1 .* is \[1, 2, 3\]"),
        ("ngram_heads_vocab_sizes", [53, 59, 61, 71], "ngram_heads_vocab_sizes of layer 1"),
        ("ngram_heads_offsets", [0, 0, 0, 0], "ngram_heads_offsets of layer 1"),
        ("ngram_heads_offsets", [0, 0], r"is I64 \[2\], expected I64 \[4\]"),
    ],
)
def test_stored_constants_must_be_those_of_the_hash(
    folder: Path, tmp_path: Path, ending: str, value: list[int], message: str
) -> None:
    stored = entries(0)
    (name,) = [name for name in stored if name.endswith(ending)]
    stored[name] = ("I64", (len(value),), np.array(value, np.int64).tobytes())
    with pytest.raises(InputError, match=message):
        qwen.open_memory(changed(folder, tmp_path, stored))


def test_a_wrong_configuration_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = tmp_path / "config.json"
    for change, message in (
        ({"ple_layer_ids": [2, 3]}, r"0 tensors …layers\.2…ple…layer_multipliers"),
        ({"split_ngram_parts": 2}, r"expected BF16 or F16 or F32 or F8_E4M3 \[128, 8\]"),
        ({"seed": "x"}, "does not describe a memory of Qwen"),
        ({"seed": 1234.0}, r"seed is 1234\.0"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\]"),
        ({"vocab_size": 10**30}, "vocab_size is 1000"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"ple_embed_dim": 33}, "ple_embed_dim 33 is no multiple of the 4 rows"),
        ({"hc_count": 2.0}, "hc_count is 2.0"),
        ({"split_ngram_parts": 5}, "split_ngram_parts 5 does not divide a table of 256 rows"),
        ({"heads_per_ngram": 2**31 - 1}, "heads in all layers is not supported"),
        ({"ngram_size": 2**31 - 1}, "ngram_size is 2147483647"),
    ):
        config.unlink()
        config.write_text(json.dumps(SIZES | change))
        with pytest.raises(InputError, match=message):
            qwen.open_memory(tmp_path)
