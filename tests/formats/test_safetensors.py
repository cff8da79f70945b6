"""safetensors: views, indexes, writing, and damaged headers."""

import json
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint, write_file
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_jax.errors import InputError
from engram_jax.formats import safetensors
from engram_jax.formats.safetensors import DTYPES, Parts, Tensors


def with_header(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def test_views_of_all_types(tmp_path: Path) -> None:
    """Every byte pattern of the one-byte types, and unaligned larger ones."""
    every = bytes(range(256))
    path = tmp_path / "model.safetensors"
    entries = {
        "odd": ("U8", (3,), b"abc"),
        "fp8": ("F8_E4M3", (8, 32), every),
        "scale": ("F8_E8M0", (256,), every),
        "half": ("BF16", (2, 2), bytes.fromhex("803f00c00000807f")),
        "wide": ("I64", (1,), struct.pack("<q", -5)),
        "scalar": ("F32", (), struct.pack("<f", 0.1)),
        "empty": ("F32", (0, 4), b""),
    }
    write_file(path, entries)
    tensors = Tensors.open(tmp_path)
    assert {name: (info.dtype, info.shape) for name, info in tensors.infos.items()} == {
        name: entry[:2] for name, entry in entries.items()
    }
    content = path.read_bytes()
    for name, info in tensors.infos.items():
        assert content[info.start : info.stop] == entries[name][2]
        assert tensors.view(name).tobytes() == entries[name][2]
        assert not tensors.view(name).flags.writeable
    assert tensors.view("half").astype(float).tolist() == [[1, -2], [0, np.inf]]
    assert tensors.view("scale")[[0, 127, 130]].astype(float).tolist() == [2.0**-127, 1, 8]
    assert tensors.view("fp8").dtype == ml_dtypes.float8_e4m3fn
    assert tensors.view("wide").item() == -5 and tensors.view("scalar").shape == ()


def test_written_files_can_be_read(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    tensors = {
        f"{name} é": np.frombuffer(generator.bytes(24 * dtype.itemsize), dtype).reshape(2, 3, 4)
        for name, dtype in DTYPES.items()
        if name != "BOOL"
    } | {
        "yes": np.array([True, False]),
        "none": np.zeros((0, 3)),
        "one": np.float32(3.5)[None][0:1],
    }
    path = tmp_path / "a.safetensors"
    safetensors.write(path, tensors, {"b": "2", "a": "é"})
    found = Tensors.open(path)
    assert found.metadata == {"a": "é", "b": "2"}
    for name, expected in tensors.items():
        view = found.view(name)
        assert view.dtype == expected.dtype and view.shape == expected.shape
        assert view.tobytes() == expected.tobytes() and view.flags.aligned
    assert min(info.start for info in found.infos.values()) % 64 == 0
    # Parts, and any order of the arguments, give the same bytes.
    parts = {
        name: Parts(tensor.dtype, tensor.shape, iter(tensor)) for name, tensor in tensors.items()
    }
    again = tmp_path / "b.safetensors"
    safetensors.write(again, dict(reversed(parts.items())), {"a": "é", "b": "2"})
    assert again.read_bytes() == path.read_bytes()


def test_an_index_names_the_file_of_every_tensor(tmp_path: Path) -> None:
    files = [{"a": ("U8", (2,), b"ab")}, {"b": ("U8", (1,), b"c"), "c": ("U8", (0,), b"")}]
    folder = write_checkpoint(tmp_path / "checkpoint", files, {})
    tensors = Tensors.open(folder)
    assert b"".join(tensors.view(name).tobytes() for name in "abc") == b"abc"
    index = folder / "model.safetensors.index.json"
    for change, message in (
        ({"a": "../secret.safetensors"}, r"names a file '\.\./secret"),
        ({"a": 3}, r"not an object of texts"),
        ({"z": "model-00001-of-00002.safetensors"}, r"lists z in model-00001.*download"),
        ({"a": "gone.safetensors"}, r"gone\.safetensors \(No such file"),
    ):
        original = json.loads(index.read_text())
        index.write_text(json.dumps({"weight_map": original["weight_map"] | change}))
        with pytest.raises(InputError, match=message):
            Tensors.open(folder)
        index.write_text(json.dumps(original))
    index.write_text("[]")
    with pytest.raises(InputError, match="not a valid safetensors file or index"):
        Tensors.open(folder)


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def good(**change: object) -> bytes:
    return json.dumps({"a": GOOD["a"] | change}).encode()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "header is not an object"),
        (b"[]", "header is not an object"),
        (b'{"a": 3}', "subscriptable"),
        (b'{"a": {}}', "no 'dtype'"),
        (b"\xff\xfe{}", "header is not an object"),
        (b'{"a":' * 100_000, "recursion"),
        (b'{"\xff": 1}', "utf-8"),
        (b'{"a": {}, "a": {}}', "'a' occurs twice"),
        (b'{"__metadata__": {"a": "1", "b": "", "a": "2"}}', "'a' occurs twice"),
        (b'{"__metadata__": {"a": 1}}', "not an object of texts"),
        (good(dtype="F5"), "unknown type 'F5'"),
        (good(dtype="F4"), "is F4 .* in 8 bytes"),
        (good(shape=[1] * 9), "too many dimensions"),
        (good(shape=[0, 2**63]), "shape"),
        (good(dtype=["F32"]), "unknown type"),
        (good(shape=[-2]), r"shape \[-2\]"),
        (good(shape=[True, 2]), "shape"),
        (good(shape=2), "no shape"),
        (good(shape=[3]), "in 8 bytes"),
        (good(shape=[2**62, 2**62]), "in 8 bytes"),
        (good(data_offsets=[0, 8, 9]), "too many values"),
        (good(data_offsets=[4, 12]), "begins at byte"),
        (good(data_offsets=[8, 0]), "in -8 bytes"),
        (json.dumps(GOOD | {"b": GOOD["a"]}).encode(), "tensor 'b' begins at byte"),  # overlap
        (json.dumps({}).encode(), "and the file has"),  # unclaimed data
    ],
)
def test_a_damaged_header_is_one_sentence(tmp_path: Path, header: bytes, message: str) -> None:
    path = with_header(tmp_path / "bad.safetensors", header, bytes(8))
    with pytest.raises(InputError, match=f"bad.safetensors is not a valid.*({message})"):
        Tensors.open(path)


def test_other_types_may_be_in_a_file(tmp_path: Path) -> None:
    """As matrices of four bits are beside a memory; they are not read."""
    header = GOOD | {"b": {"dtype": "F4", "shape": [2, 4], "data_offsets": [8, 12]}}
    path = with_header(tmp_path / "a.safetensors", json.dumps(header).encode(), bytes(12))
    tensors = Tensors.open(path)
    assert tensors.view("a").tolist() == [0, 0]
    with pytest.raises(InputError, match="is F4, which is not read"):
        tensors.view("b")


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="no regular file"):
        Tensors.open(tmp_path)


def test_lengths_beyond_the_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    for content in (b"", b"1234567", struct.pack("<Q", 2**63) + b"{}"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="its header would have"):
            Tensors.open(path)
    with_header(path, good(), bytes(7))
    with pytest.raises(InputError, match="end at byte"):
        Tensors.open(path)
    with path.open("wb") as file:  # a header of 100 MB is refused unread
        file.write(struct.pack("<Q", 100_000_000))
        file.truncate(100_000_100)
    with pytest.raises(InputError, match="its header would have 100,000,000"):
        Tensors.open(path)
    with pytest.raises(InputError, match="No such file"):
        Tensors.open(tmp_path / "missing.safetensors")


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, 40),
)
def test_any_damage_is_found_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], cut: int
) -> None:
    """Bytes changed and cut off: one sentence, or views inside the file."""
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    write_file(path, {"a": ("BF16", (2, 3), bytes(12)), "b": ("F8_E4M3", (4,), bytes(4))})
    content = bytearray(path.read_bytes())
    for place, byte in changes:
        content[place % len(content)] = byte
    content = content[: len(content) - cut]
    path.write_bytes(content)
    try:
        tensors = Tensors.open(path)
    except InputError as error:
        assert str(path) in str(error)
        return
    for name, info in tensors.infos.items():
        assert 8 <= info.start <= info.stop <= len(content)
        assert tensors.view(name).tobytes() == content[info.start : info.stop]


def test_a_tensor_must_fit(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", {"a": ("U8", (2,), b"ab")})
    tensors = Tensors.open(tmp_path)
    assert tensors.require("a", (2,), "BF16", "U8").stop == tensors.infos["a"].stop
    with pytest.raises(InputError, match=r"a in .* is U8 \[2\], expected BF16 or F32 \[3\]"):
        tensors.require("a", (3,), "BF16", "F32")
    with pytest.raises(InputError, match="no tensor b"):
        tensors.require("b", (2,), "U8")
