"""SentencePiece models as tokenizers."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import sentencepiece
from jaxtyping import Int32

from engram_jax.errors import InputError
from engram_jax.tokenizer import (
    check_characters_kept,
    checked_ids,
    fingerprint,
    keep_special_ids_out,
    special_ids,
)

_NO_IDS = np.empty(0, np.int32)

# SentencePiece writes a space as U+2581 in its pieces, so it treats a U+2581 in a text as a space.
_SPACE = "\u2581"
_SPACE_MARKS = re.compile(f"({_SPACE}+)")
_WORD_START = re.compile(f"(?<=[^ {_SPACE}]) ")
# A long text is encoded in chunks of about this many characters. One call for all of it is slow,
# because SentencePiece's merge queue does not fit in the caches: a 5 MB text took 1.4 s in chunks
# of 1,000 characters, 2.0 to 3.1 s in chunks of 64,000, and 7.0 s in one call.
_CHUNK_CHARACTERS = 2048


class SentencePieceTokenizer:
    """A SentencePiece model.

    If a model has byte pieces, does not normalize, and does not add or remove spaces, then
    `decode(encode(text)) == text` for every text without surrogates. Models of
    `tokenizer_training` are such models. Others behave as in SentencePiece itself: U+2581 becomes a
    space, text is normalized, and missing characters become the unknown piece. But visible
    characters that a model deletes are an error.
    """

    suffix = ".model"

    def __init__(
        self,
        model: bytes,
        name: str,
        *,
        pad_id: int | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
    ) -> None:
        """Build from the content of a model file; ids given here replace the model's own.

        Raises:
            InputError: it is not a SentencePiece model, or it has no pad, bos or eos id and none is
                given.
        """
        try:
            if not model:
                raise RuntimeError
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
            keeps_spaces = processor.normalize("  a  b ").replace(_SPACE, " ") == "  a  b "
        except (RuntimeError, UnicodeDecodeError):  # the latter: damaged pieces, or error messages
            pieces = []
        if not pieces:
            raise InputError(f"{name} is not a SentencePiece model; give a .model file of one.")
        self._processor = processor
        self._kept: set[str] = set()  # characters that the normalizer does not delete
        self.file = model
        self.name = name
        self.vocab_size = processor.vocab_size()
        own = processor.pad_id(), processor.bos_id(), processor.eos_id()
        special = special_ids(name, self.vocab_size, (pad_id, bos_id, eos_id), own)
        self.pad_id, self.bos_id, self.eos_id = special
        self.fingerprint = fingerprint(model, special, own)

        # If no piece has a space after another character, a text can be cut before a space that
        # follows another character. No merge can cross that cut, so the ids do not change.
        inner_space = re.compile(f"[^{_SPACE}]{_SPACE}")
        self._may_cut = keeps_spaces and not any(map(inner_space.search, pieces))
        # U+2581 encoded as byte pieces decodes to itself; as part of another piece, to a space.
        mark = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._space_mark = np.array(mark, np.int32)
        self._spells_marks = keeps_spaces and all(processor.is_byte(i) for i in mark)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the file's content."""
        rebuild = partial(
            SentencePieceTokenizer, pad_id=self.pad_id, bos_id=self.bos_id, eos_id=self.eos_id
        )
        return rebuild, (self.file, self.name)

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        """Return the token ids of a text, without bos, eos or any other control piece.

        Raises:
            InputError: the text has a surrogate, pieces that stand for pad, bos or eos, or visible
                characters that the model deletes.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
        """Return `encode` of each text, computed on several threads."""
        return keep_special_ids_out(self, texts, self._encode_batch)

    def _encode_batch(self, texts: list[str]) -> list[Int32[np.ndarray, "_"]]:
        check_characters_kept(self.name, texts, self._processor.normalize, self._kept)
        parts = [list(self._split(text)) for text in texts]
        plain = [part for of_text in parts for part in of_text if isinstance(part, str)]
        ids = iter(self._processor.encode(plain, out_type=int, num_threads=-1))

        def part_ids(part: str | int) -> np.ndarray:
            if isinstance(part, int):
                return np.tile(self._space_mark, part)
            return np.array(next(ids), np.int32)

        return [np.concatenate([_NO_IDS, *map(part_ids, of_text)]) for of_text in parts]

    def _split(self, text: str) -> Iterator[str | int]:
        """Split a text into chunks to encode, and runs of U+2581, given as their length."""
        if not self._spells_marks or _SPACE not in text:
            yield from self._chunks(text)
            return
        for run in _SPACE_MARKS.split(text):
            if run.startswith(_SPACE):
                yield len(run)
            else:
                yield from self._chunks(run)

    def _chunks(self, text: str) -> Iterator[str]:
        start = 0
        while start < len(text):
            cut = _WORD_START.search(text, start + _CHUNK_CHARACTERS) if self._may_cut else None
            end = cut.start() if cut else len(text)
            yield text[start:end]
            start = end

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of a sequence of token ids; control pieces have no text.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        return self._processor.decode(checked_ids(ids, self))

    def decode_each(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Return the text of each id, decoded alone.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        return self._processor.decode([[token_id] for token_id in checked_ids(ids, self)])

    def piece(self, token_id: int) -> str:
        """Return the raw vocabulary piece of an id, with U+2581 for a space."""
        return self._processor.id_to_piece(checked_ids([token_id], self)[0])

    def is_special(self, token_id: int) -> bool:
        """Return whether an id is a control, unknown or padding piece."""
        return self._processor.is_control(token_id) or self._processor.is_unknown(token_id)
