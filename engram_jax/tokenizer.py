"""Tokenizers with a common protocol: SentencePiece models and `tokenizer.json` files."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import sentencepiece
from jaxtyping import Int32

from engram_jax.errors import InputError

DEFAULT_MODEL = Path(__file__).parent / "data" / "tokenizers" / "default.model"

_NO_IDS = np.empty(0, np.int32)

# SentencePiece writes a space as U+2581 in its pieces, so it treats a U+2581 in a text as a space.
_SPACE = "\u2581"
_SPACE_MARKS = re.compile(f"({_SPACE}+)")
_WORD_START = re.compile(f"(?<=[^ {_SPACE}]) ")
# A long text is encoded in chunks of about this many characters. One call for all of it is slow,
# because SentencePiece's merge queue does not fit in the caches: a 5 MB text took 1.4 s in chunks
# of 1,000 characters, 2.0 to 3.1 s in chunks of 64,000, and 7.0 s in one call.
_CHUNK_CHARACTERS = 2048

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


@runtime_checkable
class Tokenizer(Protocol):
    """Converts text to token ids and back.

    `fingerprint` is the first 16 hex digits of the SHA-256 of the model file and of special ids
    that differ from the file's. Implementations can be pickled, for use in data workers.
    """

    name: str
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


class SentencePieceTokenizer:
    """A SentencePiece model.

    If a model has byte pieces, does not normalize, and does not add or remove spaces, then
    `decode(encode(text)) == text` for every text without surrogates. Models of
    `tokenizer_training` are such models. Others behave as in SentencePiece itself: U+2581 becomes a
    space, text is normalized, and missing characters become the unknown piece.
    """

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
            processor = sentencepiece.SentencePieceProcessor(model_proto=model) if model else None
        except RuntimeError:
            processor = None
        if processor is None or processor.vocab_size() == 0:
            raise InputError(f"{name} is not a SentencePiece model; give a .model file of one.")
        self._processor = processor
        self._model = model
        self.name = name
        self.vocab_size = processor.vocab_size()
        own = processor.pad_id(), processor.bos_id(), processor.eos_id()
        special = _special_ids(name, self.vocab_size, (pad_id, bos_id, eos_id), own)
        self.pad_id, self.bos_id, self.eos_id = special
        self.fingerprint = _fingerprint(model, special, own)

        pieces = [processor.id_to_piece(i) for i in range(self.vocab_size)]
        keeps_spaces = processor.normalize("  a  b ").replace(_SPACE, " ") == "  a  b "
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
        return rebuild, (self._model, self.name)

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        """Return the token ids of a text, without bos, eos or any other control piece.

        Raises:
            InputError: the text has a surrogate.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
        """Return `encode` of each text, computed on several threads."""
        parts = [list(self._split(checked_text(text))) for text in texts]
        plain = [part for of_text in parts for part in of_text if isinstance(part, str)]
        ids = iter(self._processor.encode(plain, out_type=int, num_threads=-1))

        def part_ids(part: str | int) -> np.ndarray:
            if isinstance(part, int):
                return np.tile(self._space_mark, part)
            return np.array(next(ids), np.int32)

        return [np.concatenate([_NO_IDS, *map(part_ids, of_text)]) for of_text in parts]

    def _split(self, text: str) -> Iterator[str | int]:
        """Split a text into chunks to encode, and runs of U+2581, given as their length."""
        if not self._spells_marks:
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
        return self._processor.decode(_checked_ids(ids, self))

    def decode_each(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Return the text of each id, decoded alone.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        return self._processor.decode([[token_id] for token_id in _checked_ids(ids, self)])

    def piece(self, token_id: int) -> str:
        """Return the raw vocabulary piece of an id, with U+2581 for a space."""
        return self._processor.id_to_piece(_checked_ids([token_id], self)[0])

    def is_special(self, token_id: int) -> bool:
        """Return whether an id is a control, unknown or padding piece."""
        return self._processor.is_control(token_id) or self._processor.is_unknown(token_id)


class JsonTokenizer:
    """A `tokenizer.json` file, read with the package `tokenizers` (extra `hf`).

    The name of a special token in a text is encoded as ordinary text, so a document cannot contain
    a false document boundary. Whether encoding is lossless depends on the file; a byte-level BPE
    without a normalizer is.
    """

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
            InputError: `tokenizers` is not installed; the content is not a tokenizer; or it has no
                token with a well-known name for pad, bos or eos and no id is given.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise InputError(
                f"{name} needs the package tokenizers; run pip install engram-jax[hf]."
            ) from error
        try:
            backend = tokenizers.Tokenizer.from_buffer(model)
        except Exception as error:  # `tokenizers` raises this very class
            raise InputError(
                f"{name} is not a tokenizer.json file of the package tokenizers ({error}); give "
                "the tokenizer.json of a model."
            ) from error
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._model = model
        self.name = name
        # Some ids may be unused. An unused id has an empty piece and decodes to nothing.
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._special = frozenset(
            i for i, token in backend.get_added_tokens_decoder().items() if token.special
        )

        def find(names: tuple[str, ...]) -> int:
            found = (backend.token_to_id(name) for name in names)
            return next((token_id for token_id in found if token_id is not None), -1)

        own = find(_PAD_NAMES), find(_BOS_NAMES), find(_EOS_NAMES)
        special = _special_ids(name, self.vocab_size, (pad_id, bos_id, eos_id), own)
        self.pad_id, self.bos_id, self.eos_id = special
        self.fingerprint = _fingerprint(model, special, own)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the file's content."""
        rebuild = partial(JsonTokenizer, pad_id=self.pad_id, bos_id=self.bos_id, eos_id=self.eos_id)
        return rebuild, (self._model, self.name)

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        """Return the token ids of a text, without bos, eos or any other special token.

        Raises:
            InputError: the text has a surrogate.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
        """Return `encode` of each text, computed on several threads."""
        checked = [checked_text(text) for text in texts]
        encodings = self._backend.encode_batch_fast(checked, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of a sequence of token ids; special tokens become their names.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        return self._backend.decode(_checked_ids(ids, self), skip_special_tokens=False)

    def decode_each(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Return the text of each id, decoded alone; special tokens become their names.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        alone = [[token_id] for token_id in _checked_ids(ids, self)]
        return self._backend.decode_batch(alone, skip_special_tokens=False)

    def piece(self, token_id: int) -> str:
        """Return the raw vocabulary piece of an id ("" for an unused id)."""
        return self._backend.id_to_token(_checked_ids([token_id], self)[0]) or ""

    def is_special(self, token_id: int) -> bool:
        """Return whether the file marks an id as special."""
        return token_id in self._special


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
    file = DEFAULT_MODEL if str(path) == "default" else Path(path).expanduser()
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
        model = file.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read tokenizer {file} ({error.strerror}); check the path or use 'default'."
        ) from error
    name = "default" if file == DEFAULT_MODEL else file.name
    return kinds[file.suffix](model, name, pad_id=pad_id, bos_id=bos_id, eos_id=eos_id)


def _fingerprint(model: bytes, special: tuple[int, ...], own: tuple[int, ...]) -> str:
    content = model if special == own else model + repr(special).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _special_ids(
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


def checked_text(text: str) -> str:
    """Return the text.

    Raises:
        InputError: it has a surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text has half of a surrogate pair at character {error.start}; remove it."
        ) from error
    return text


def _checked_ids(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> list[int]:
    checked = [int(token_id) for token_id in ids]
    for token_id in checked:
        if not 0 <= token_id < tokenizer.vocab_size:
            raise InputError(
                f"token id {token_id} is outside the {tokenizer.vocab_size} ids of "
                f"{tokenizer.name}; decode with the tokenizer that encoded the text."
            )
    return checked
