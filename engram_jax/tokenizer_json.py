"""`tokenizer.json` files as tokenizers."""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
from jaxtyping import Int32

from engram_jax.errors import InputError
from engram_jax.tokenizer import (
    check_characters_kept,
    checked_ids,
    deletes_text,
    fingerprint,
    has_visible,
    keep_special_ids_out,
    special_ids,
)

# Well-known names of special tokens. If a file has several, the first in this order is used.
_PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<PAD>", "<｜▁pad▁｜>", "<|padding|>")
_BOS_NAMES = (
    *("<s>", "<bos>", "<|bos|>", "[BOS]", "<BOS>", "<｜begin▁of▁sentence｜>"),
    *("<|begin_of_text|>", "<|startoftext|>"),
)
_EOS_NAMES = (
    *("</s>", "<eos>", "<|eos|>", "[EOS]", "<EOS>", "<｜end▁of▁sentence｜>"),
    *("<|end_of_text|>", "<|endoftext|>"),
)


class JsonTokenizer:
    """A `tokenizer.json` file, read with the package `tokenizers` (extra `hf`).

    The name of a special token in a text is encoded as ordinary text, so a document cannot contain
    a false document boundary. Truncation, padding and dropout of the file are disabled. Whether
    encoding is lossless depends on the file; a byte-level BPE without a normalizer is. Visible
    characters that the file's normalizer or pre-tokenizer deletes are an error.
    """

    suffix = ".json"

    def __init__(
        self,
        model: bytes,
        name: str,
        *,
        pad_id: int | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
    ) -> None:
        """Build from the content of a file; ids not given here are found by well-known names.

        Raises:
            InputError: `tokenizers` is not installed; the content is not a tokenizer, or has ids of
                more than 31 bits; or it has no token with a well-known name for pad, bos or eos and
                no id is given.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise InputError(
                f"{name} needs the package tokenizers; run pip install -c constraints.txt -e "
                "'.[hf]'."
            ) from error
        problem = f"{name} is not a tokenizer.json file of the package tokenizers"
        with _refusals(problem, "give the tokenizer.json of a model"):
            backend = tokenizers.Tokenizer.from_buffer(model)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        if isinstance(backend.model, tokenizers.models.BPE):
            backend.model.dropout = None  # equal texts always get equal ids
        self._drops, self._deletes = _may_drop(backend), _may_delete(backend)
        self._kept: set[str] = set()  # characters that the normalizer does not delete
        self._backend = backend
        self.file = model
        self.name = name
        # Some ids may be unused. An unused id has an empty piece and decodes to nothing.
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size > 2**31 - 1:
            raise InputError(f"{name} has token ids above 2³¹; give a tokenizer with smaller ids.")
        self._special = frozenset(
            i for i, token in backend.get_added_tokens_decoder().items() if token.special
        )

        def find(names: tuple[str, ...]) -> int:
            found = (backend.token_to_id(name) for name in names)
            return next((token_id for token_id in found if token_id is not None), -1)

        own = find(_PAD_NAMES), find(_BOS_NAMES), find(_EOS_NAMES)
        special = special_ids(name, self.vocab_size, (pad_id, bos_id, eos_id), own)
        self.pad_id, self.bos_id, self.eos_id = special
        self.fingerprint = fingerprint(model, special, own)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the file's content."""
        rebuild = partial(JsonTokenizer, pad_id=self.pad_id, bos_id=self.bos_id, eos_id=self.eos_id)
        return rebuild, (self.file, self.name)

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        """Return the token ids of a text, without bos, eos or any other special token.

        Raises:
            InputError: the text has a surrogate, pieces that stand for pad, bos or eos, characters
                for which the file has no piece, or visible characters that it deletes.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
        """Return `encode` of each text, computed on several threads."""
        return keep_special_ids_out(self, texts, self._encode_batch)

    def _encode_batch(self, texts: list[str]) -> list[Int32[np.ndarray, "_"]]:
        # The fast call does not compute offsets, which tell what was dropped.
        encode = self._backend.encode_batch if self._drops else self._backend.encode_batch_fast
        remedy = "give a tokenizer with a piece for unknown characters, or with byte pieces"
        with _refusals(f"{self.name} cannot encode a text", remedy):
            encodings = encode(texts, add_special_tokens=False)
            self._check_nothing_deleted(texts)
        if self._drops:
            for text, encoding in zip(texts, encodings, strict=True):
                self._check_nothing_dropped(text, encoding)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def _check_nothing_deleted(self, texts: Sequence[str]) -> None:
        if (normalizer := self._backend.normalizer) is not None:
            check_characters_kept(self.name, texts, normalizer.normalize_str, self._kept)
        for text in texts if self._deletes else []:
            for deleted in filter(has_visible, _deleted(self._backend, text)):
                raise deletes_text(self.name, deleted)

    def _check_nothing_dropped(self, text: str, encoding: Any) -> None:
        is_encoded = np.zeros(len(text), bool)
        for start, end in encoding.offsets:
            is_encoded[start:end] = True
        if _is_byte_level(self._backend):  # a character's other bytes may be there
            decoded = set(self._backend.decode(encoding.ids, skip_special_tokens=False))
            is_encoded = np.array([character in decoded for character in text], bool)
        dropped = (text[index] for index in np.flatnonzero(~is_encoded))
        # A normalizer may drop spaces and control characters.
        if (lost := next(filter(_is_visible, dropped), None)) is not None:
            # After a dropped character, some offsets are wrong.
            encode = partial(self._backend.encode, add_special_tokens=False)
            lost = next((c for c in text if _is_visible(c) and not encode(c).ids), lost)
            raise InputError(
                f"{self.name} drops characters without a piece, such as {lost!r}; give a tokenizer "
                "with a piece for unknown characters, or with byte pieces."
            )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of a sequence of token ids; special tokens become their names.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        return self._backend.decode(checked_ids(ids, self), skip_special_tokens=False)

    def decode_each(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Return the text of each id, decoded alone; special tokens become their names.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        alone = [[token_id] for token_id in checked_ids(ids, self)]
        return self._backend.decode_batch(alone, skip_special_tokens=False)

    def piece(self, token_id: int) -> str:
        """Return the raw vocabulary piece of an id ("" for an unused id)."""
        return self._backend.id_to_token(checked_ids([token_id], self)[0]) or ""

    def is_special(self, token_id: int) -> bool:
        """Return whether the file marks an id as special."""
        return token_id in self._special


def _may_drop(backend: Any) -> bool:
    """Whether a tokenizer leaves out characters for which it has no piece.

    A BPE does, unless it has an unknown piece, or a piece for each byte that UTF-8 can contain.
    """
    model = backend.model
    if type(model).__name__ != "BPE" or model.unk_token is not None:
        return False
    if model.byte_fallback:
        names = [f"<0x{byte:02X}>" for byte in _BYTES_OF_UTF8]
    elif _is_byte_level(backend):
        names = [_byte_names()[byte] for byte in _BYTES_OF_UTF8]
    else:
        return True
    return any(backend.token_to_id(name) is None for name in names)


@contextmanager
def _refusals(problem: str, remedy: str) -> Iterator[None]:
    """Raises InputError for an error of `tokenizers`, which raises Exception itself, or panics."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{problem} ({' '.join(str(error).split())}); {remedy}.") from error


def _may_delete(backend: Any) -> bool:
    """Whether a tokenizer can delete text of more than single characters."""
    splits = repr(backend.pre_tokenizer)
    deletes = "Removed" in splits or "CharDelimiterSplit" in splits
    return deletes or any(_blanked(step) is not None for step in _steps(backend.normalizer))


def _blanked(step: Any) -> Any:
    """What a normalizer replaces with nothing visible, such as a space: a string, a Regex, or None.

    A pattern that matches only spaces counts as None.
    """
    from tokenizers import Regex

    if type(step).__name__ != "Replace":
        return None
    content = json.loads(step.__getstate__())
    pattern = content["pattern"]
    if has_visible(content["content"]):
        return None
    if "String" in pattern:
        return pattern["String"] if has_visible(pattern["String"]) else None
    return None if _OF_SPACES.fullmatch(pattern["Regex"]) else Regex(pattern["Regex"])


_OF_SPACES = re.compile(r"(\\s| |\u2581)([+*]|\{\d+,?\d*\})?")


def _deleted(backend: Any, text: str) -> Iterator[str]:
    """The parts of a text that the normalizer deletes by a pattern, or the pre-tokenizer."""
    from tokenizers.pre_tokenizers import Split

    for step in _steps(backend.normalizer):
        if (pattern := _blanked(step)) is not None:
            matches = Split(pattern, "removed", invert=True)
            yield from (match for match, _ in matches.pre_tokenize_str(text))
        text = step.normalize_str(text)
    if backend.pre_tokenizer is not None:
        is_deleted = np.ones(len(text), bool)
        for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text):
            is_deleted[start:end] = False
        yield "".join(text[place] for place in np.flatnonzero(is_deleted))


def _steps(normalizer: Any) -> list[Any]:
    """The normalizers of a sequence, one after another."""
    if normalizer is None:
        return []
    if type(normalizer).__name__ != "Sequence":
        return [normalizer]
    return [step for part in normalizer for step in _steps(part)]


def _is_byte_level(backend: Any) -> bool:
    return "ByteLevel" in repr(backend.pre_tokenizer) or "ByteLevel" in repr(backend.normalizer)


_BYTES_OF_UTF8 = [*range(0xC0), *range(0xC2, 0xF5)]


@cache
def _byte_names() -> dict[int, str]:
    """The character that byte-level BPE writes for each byte (GPT-2's `encoder.py`)."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printed)
    return {byte: chr(byte) for byte in printed} | {
        byte: chr(256 + number) for number, byte in enumerate(others)
    }


def _is_visible(character: str) -> bool:
    return unicodedata.category(character)[0] not in "CZ"
