"""Tokenizers with a common protocol: SentencePiece models and `tokenizer.json` files."""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from engram_jax.errors import InputError
from engram_jax.files import expand_home, read_regular

DEFAULT_MODEL = Path(__file__).parent / "data" / "tokenizers" / "default.model"


@runtime_checkable
class Tokenizer(Protocol):
    """Converts text to token ids and back.

    `fingerprint` is the first 16 hex digits of the SHA-256 of the model file and of special ids
    that differ from the file's. `file` is the content of the model file, and `suffix` the ending of
    its name. Implementations can be pickled, for use in data workers.
    """

    name: str
    file: bytes
    suffix: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    fingerprint: str

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        """Return the token ids of a text, without bos, eos or any other special token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
        """Return `encode` of each text, computed on several threads."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of a sequence of token ids."""
        ...

    def decode_each(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Return the text of each id, decoded alone."""
        ...

    def piece(self, token_id: int) -> str:
        """Return the raw vocabulary piece of an id."""
        ...

    def is_special(self, token_id: int) -> bool:
        """Return whether an id is a control, unknown or padding piece."""
        ...


def load_tokenizer(
    path: str | Path = "default",
    *,
    pad_id: int | None = None,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> Tokenizer:
    """Load the shipped tokenizer ("default"), a SentencePiece `*.model` or a `tokenizer.json`.

    Args:
        path: "default" or a path that ends in .model or .json.
        pad_id: padding id; None: the file's own.
        bos_id: id at the start of a document; None: the file's own.
        eos_id: id at the end of a document; None: the file's own.

    Raises:
        InputError: there is no such file, it is of another kind, or a special id is missing.
    """
    # Imported here, because they use the checks of this module.
    from engram_jax.tokenizer_json import JsonTokenizer
    from engram_jax.tokenizer_sentencepiece import SentencePieceTokenizer

    file = DEFAULT_MODEL if str(path) == "default" else expand_home(path)
    kinds: dict[str, type[SentencePieceTokenizer | JsonTokenizer]] = {
        ".model": SentencePieceTokenizer,
        ".json": JsonTokenizer,
    }
    if file.suffix not in kinds:
        raise InputError(
            f"tokenizer {str(path)!r} is not 'default', a SentencePiece *.model or a *.json file; "
            "give one of these."
        )
    try:
        model = read_regular(file)
    except OSError as error:
        raise InputError(
            f"cannot read tokenizer {file} ({error.strerror}); check the path or use 'default'."
        ) from error
    name = "default" if file == DEFAULT_MODEL else file.name
    return kinds[file.suffix](model, name, pad_id=pad_id, bos_id=bos_id, eos_id=eos_id)


def fingerprint(model: bytes, special: tuple[int, ...], own: tuple[int, ...]) -> str:
    """Return the fingerprint of a model file and of special ids, if they differ from its own."""
    content = model if special == own else model + repr(special).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def special_ids(
    name: str, vocab_size: int, given: tuple[int | None, ...], own: tuple[int, ...]
) -> tuple[int, int, int]:
    """The pad, bos and eos ids: the given ones, else the model's own (negative: it has none)."""

    def choose(kind: str, given: int | None, own: int) -> int:
        if given is None and own < 0:
            raise InputError(
                f"{name} defines no {kind} token; give its id as {kind}_id (--data.{kind}-id on "
                "the command line)."
            )
        token_id = own if given is None else given
        if not 0 <= token_id < vocab_size:
            raise InputError(
                f"{kind}_id {token_id} is outside the {vocab_size} ids of {name}; choose one of "
                "them."
            )
        return token_id

    pad, bos, eos = map(choose, ("pad", "bos", "eos"), given, own)
    return pad, bos, eos


def keep_special_ids_out(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    encode: Callable[[list[str]], list[Int32[np.ndarray, "_"]]],
) -> list[Int32[np.ndarray, "_"]]:
    """Return the ids of texts, in which the pad, bos and eos ids never occur.

    Otherwise a document that contains the name of such an id, as "</s>", would contain a false
    document boundary. If `encode` finds such a name, it gets the text again, cut after the first
    character of the name.

    Raises:
        InputError: a text has a surrogate; it is not blank, and has no ids at all; or it has such
            an id without the id's name, or with a name of one character.
    """
    encoded = encode([checked_text(text) for text in texts])
    for text, ids in zip(texts, encoded, strict=True):
        if not len(ids) and has_visible(text):
            raise deletes_text(tokenizer.name, text)
    special = sorted({tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id})
    if not encoded or not np.isin(np.concatenate(encoded), special).any():
        return encoded
    for index, ids in enumerate(encoded):
        if np.isin(ids, special).any():
            parts = _cut_names(texts[index], [tokenizer.piece(i) for i in special])
            encoded[index] = np.concatenate(encode(parts))
            for found in np.intersect1d(encoded[index], special).tolist():
                kind = next(
                    k for k in ("eos", "bos", "pad") if getattr(tokenizer, f"{k}_id") == found
                )
                raise InputError(
                    f"{tokenizer.name} uses its {kind}_id {found}, {tokenizer.piece(found)!r}, for "
                    f"ordinary text; choose an id that no text has (--data.{kind}-id)."
                )
    return encoded


def _cut_names(text: str, names: Sequence[str]) -> list[str]:
    """Cuts a text after the first character of each name."""
    inside = "|".join(
        f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names if len(name) > 1
    )
    return re.split(inside, text) if inside else [text]


def check_characters_kept(
    name: str, texts: Sequence[str], normalize: Callable[[str], str], known: set[str]
) -> None:
    """Checks that a tokenizer's normalizer deletes no visible character of some texts.

    Otherwise the text would be lost without a trace. Other changes, such as of case, accents or
    compatibility forms, are the tokenizer's choice.

    Args:
        name: the tokenizer's name.
        texts: the texts.
        normalize: the normalizer.
        known: characters that were checked before; this adds those of the texts.

    Raises:
        InputError: it deletes one.
    """
    new = set().union(*texts) - known
    for character in sorted(filter(has_visible, new)):
        if not normalize(character).strip(" \u2581"):
            raise deletes_text(name, character)
    known |= new


def has_visible(text: str) -> bool:
    """Whether a text has more than spaces, control characters, marks (accents) and U+FFFD."""
    # Some accents are not marks, but compatibility forms of a space with a mark.
    decomposed = text if text.isascii() else unicodedata.normalize("NFKD", text)
    return any(
        unicodedata.category(c)[0] not in "CMZ" and c not in "\u2581\ufffd" for c in decomposed
    )


def deletes_text(name: str, text: str) -> InputError:
    """The error for a tokenizer that deletes text."""
    return InputError(
        f"{name} deletes text, such as {text[:40]!r}, so it would be lost; give a tokenizer whose "
        "normalizer and pre-tokenizer keep all visible characters."
    )


def checked_text(text: str) -> str:
    """Return the text.

    Raises:
        InputError: it has a surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text has half of a surrogate pair, or bytes that are not UTF-8, at character "
            f"{error.start}; remove it."
        ) from error
    return text


def checked_ids(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> list[int]:
    """Return the ids as integers.

    Raises:
        InputError: an id is outside the vocabulary.
    """
    checked = [int(token_id) for token_id in ids]
    for token_id in checked:
        if not 0 <= token_id < tokenizer.vocab_size:
            raise InputError(
                f"token id {token_id} is outside the {tokenizer.vocab_size} ids of "
                f"{tokenizer.name}; decode with the tokenizer that encoded the text."
            )
    return checked
