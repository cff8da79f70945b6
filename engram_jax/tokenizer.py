"""Tokenizers behind one small protocol: SentencePiece models and `tokenizer.json` files.

`python -m engram_jax.tokenizer train OUT.model --sources …` trains a SentencePiece model. The model
that ships (`default`) is what this command writes:

    python -m engram_jax.tokenizer train default.model --vocab-size 8192
        --sources vital_en austen factbook web_bible wordnet --shares 1 1 0.25 0.3 0.15

Prose (`vital_en`, `austen`) is 65 % of the bytes it saw. Bytes per token over each whole corpus:
vital_en 3.960, austen 4.193, factbook 3.790, web_bible 3.901, wordnet 3.505.
"""

import hashlib
import io
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import sentencepiece
from jaxtyping import Int32

from engram_jax.errors import InputError, one_sentence
from engram_jax.files import written_whole

DEFAULT_MODEL = Path(__file__).parent / "data" / "tokenizers" / "default.model"

_NO_IDS = np.empty(0, np.int32)

# SentencePiece writes a space as U+2581 in its pieces, and so reads a U+2581 in a text as a space.
_SPACE = "\u2581"
_SPACE_MARKS = re.compile(f"({_SPACE}+)")
_WORD_START = re.compile(f"(?<=[^ {_SPACE}]) ")
# One call over a long text is slow (its merge queue leaves the caches): on a 5 MB text, pieces of
# 1,000 characters took 1.4 s, of 64,000 2.0 to 3.1 s, the text at once 7.0 s.
_CHUNK_CHARACTERS = 2048

# Ordered by precedence: a file may hold more than one of them.
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
    """Text to token ids and back.

    `fingerprint` is the first 16 hex digits of the SHA-256 of the model file and of the special
    ids that replace its own. Implementations pickle, so that data workers can hold one.
    """

    name: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    fingerprint: str

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        """Return the token ids of a text: no bos, no eos, and never a special token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
        """Return `encode` of each text, computed on several threads."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of a sequence of token ids."""
        ...

    def piece(self, token_id: int) -> str:
        """Return the raw vocabulary piece of an id."""
        ...

    def is_special(self, token_id: int) -> bool:
        """Tell whether an id is a control, unknown or padding piece rather than text."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model.

    For a model that neither normalizes nor adds or removes spaces and has byte pieces, such as
    those of `train_tokenizer`, `decode(encode(text)) == text` for every text without surrogates.
    Other models give what SentencePiece itself gives: a space for U+2581, text after their own
    normalization, and the unknown piece for characters they lack.
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
            InputError: not a SentencePiece model, or no pad, bos or eos id in it and none given.
        """
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model) if model else None
        except RuntimeError:
            processor = None
        if processor is None or processor.vocab_size() == 0:
            raise InputError(f"{name} is not a SentencePiece model; give a file it has written.")
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
        # Where no piece continues from a character into a space, a text may be cut before a space
        # that follows one: no merge could have crossed the cut, so the ids stay the same.
        inner_space = re.compile(f"[^{_SPACE}]{_SPACE}")
        self._may_cut = keeps_spaces and not any(map(inner_space.search, pieces))
        # The bytes of U+2581 spelled in byte pieces decode to the character, not to a space.
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
        """Return the token ids of a text: no bos, no eos, and never a control piece.

        Raises:
            InputError: the text holds a surrogate.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
        """Return `encode` of each text, computed on several threads."""
        parts = [list(self._split(_checked_text(text))) for text in texts]
        plain = [part for of_text in parts for part in of_text if isinstance(part, str)]
        ids = iter(self._processor.encode(plain, out_type=int, num_threads=-1))

        def part_ids(part: str | int) -> np.ndarray:
            if isinstance(part, int):
                return np.tile(self._space_mark, part)
            return np.array(next(ids), np.int32)

        return [np.concatenate([_NO_IDS, *map(part_ids, of_text)]) for of_text in parts]

    def _split(self, text: str) -> Iterator[str | int]:
        """Cut a text into what one call encodes and, as a count, runs of U+2581 to spell out."""
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
        """Return the text of a sequence of token ids; control pieces read as nothing.

        Raises:
            InputError: an id outside the vocabulary.
        """
        return self._processor.decode(_checked_ids(ids, self))

    def piece(self, token_id: int) -> str:
        """Return the raw vocabulary piece of an id, with U+2581 for a space."""
        return self._processor.id_to_piece(_checked_ids([token_id], self)[0])

    def is_special(self, token_id: int) -> bool:
        """Tell whether an id is a control, unknown or padding piece rather than text."""
        return self._processor.is_control(token_id) or self._processor.is_unknown(token_id)


class JsonTokenizer:
    """A `tokenizer.json` file, read by the package `tokenizers` (extra `hf`).

    Text that spells a special token is encoded as text, so that no document can forge a boundary.
    As lossless as the file: a byte-level BPE without a normalizer is.
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
        """Build from the content of a file; ids not given are found by well-known names.

        Raises:
            InputError: `tokenizers` is not installed, the content is no tokenizer, or it has no
                token of a well-known name for pad, bos or eos and no id was given.
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
                f"{name} is not a tokenizer of the package tokenizers ({error}); "
                "give the tokenizer.json of a model."
            ) from error
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._model = model
        self.name = name
        # The ids may have holes; a hole has an empty piece and decodes to nothing.
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
        """Return the token ids of a text: no bos, no eos, and never a special token.

        Raises:
            InputError: the text holds a surrogate.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
        """Return `encode` of each text, computed on several threads."""
        checked = [_checked_text(text) for text in texts]
        encodings = self._backend.encode_batch_fast(checked, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of a sequence of token ids, special tokens by their names.

        Raises:
            InputError: an id outside the vocabulary.
        """
        return self._backend.decode(_checked_ids(ids, self), skip_special_tokens=False)

    def piece(self, token_id: int) -> str:
        """Return the raw vocabulary piece of an id ("" for an id that the file leaves out)."""
        return self._backend.id_to_token(_checked_ids([token_id], self)[0]) or ""

    def is_special(self, token_id: int) -> bool:
        """Tell whether the file marks an id as special."""
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
        pad_id: padding id, for a file that names none; the same for the two others.
        bos_id: id that begins a document.
        eos_id: id that ends a document.

    Raises:
        InputError: no such file, another kind of file, or a special id is missing.
    """
    file = DEFAULT_MODEL if str(path) == "default" else Path(path).expanduser()
    kinds: dict[str, type[SentencePieceTokenizer | JsonTokenizer]] = {
        ".model": SentencePieceTokenizer,
        ".json": JsonTokenizer,
    }
    if file.suffix not in kinds:
        raise InputError(
            f"tokenizer {str(path)!r} is neither 'default', a SentencePiece *.model nor a *.json "
            "file; name one of these."
        )
    try:
        model = file.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read tokenizer {file} ({error.strerror}); check the path or use 'default'."
        ) from error
    name = "default" if file == DEFAULT_MODEL else file.name
    return kinds[file.suffix](model, name, pad_id=pad_id, bos_id=bos_id, eos_id=eos_id)


def train_tokenizer(texts: Sequence[str], vocab_size: int = 8192) -> bytes:
    """Train a SentencePiece BPE model on texts and return the content of its file.

    Ids: 0 pad, 1 bos, 2 eos, 3 unknown, 4–259 the bytes. Nothing is normalized, and characters
    without a piece fall back to bytes, so that the model is lossless. Numbers are not split into
    digits: on the shipped corpora that saves 2 % of the tokens of `vital_en` and 22 % of those of
    `factbook`, whose dates and amounts are names rather than sums. The same texts in the same order
    give the same bytes.

    Raises:
        InputError: no text, or a size that the texts cannot fill or that cannot hold their letters.
    """
    _check_vocab_size(vocab_size)
    if not any(texts):
        raise InputError("the sources hold no text to train a tokenizer on; give others.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # U+2585 is reserved: SentencePiece would pass over the whole document that holds it.
            sentence_iterator=(_checked_text(text).replace("\u2585", "\n") for text in texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=False,
            max_sentence_length=2**30,  # bytes; its default drops documents above 4,192
            minloglevel=2,
        )
    except RuntimeError as error:
        if limit := re.search(r"to a value <= (\d+)", str(error)):
            raise InputError(
                f"these sources give at most {limit[1]} pieces, not {vocab_size}; lower "
                "--vocab-size or give more text."
            ) from error
        if limit := re.search(r"required_chars. \d+ vs (\d+)", str(error)):
            raise InputError(
                f"a vocabulary of {vocab_size} cannot hold the bytes and letters of these sources; "
                f"raise --vocab-size to {limit[1]} or more."
            ) from error
        raise
    return model.getvalue()


def train(
    out: Path,
    /,
    sources: tuple[str, ...],
    shares: tuple[float, ...] = (),
    vocab_size: int = 8192,
) -> None:
    """Train a SentencePiece BPE model with byte fallback, and print its bytes per token.

    Args:
        out: file to write, named *.model; it must not exist yet.
        sources: what to train on: names of shipped corpora (such as vital_en) or paths.
        shares: part of each source to use, in the order of the sources: 0.25 takes every fourth
            document. Without it, all of every source.
        vocab_size: number of pieces, the 4 special and 256 byte pieces included.
    """
    from tqdm import tqdm

    from engram_jax.data.sources import read_documents  # `data` is built on this module

    if out.suffix != ".model":
        raise InputError(f"output {out} must end in .model; rename it.")
    if out.exists():
        raise InputError(f"{out} exists; remove it or name another file.")
    if not out.parent.is_dir():
        raise InputError(f"folder {out.parent} does not exist; make it first.")
    shares = shares or (1.0,) * len(sources)
    if len(shares) != len(sources) or not all(0 < share <= 1 for share in shares):
        raise InputError(
            f"--shares {' '.join(map(str, shares))} must be one number in (0, 1] for each of the "
            f"{len(sources)} sources; correct it."
        )

    _check_vocab_size(vocab_size)  # here too, before the sources are read
    corpora = []
    for source in sources:
        documents = tqdm(read_documents(source), f"reading {source}", unit=" documents")
        corpora.append([document.text for document in documents])
        if not any(corpora[-1]):
            raise InputError(f"source {source} holds no text; leave it out or give another.")
    used = [list(_spread(texts, share)) for texts, share in zip(corpora, shares, strict=True)]
    used_bytes = [sum(len(text.encode()) for text in texts) for texts in used]
    print(f"learning {vocab_size} pieces from {sum(used_bytes):,} bytes …", file=sys.stderr)
    model = train_tokenizer([text for texts in used for text in texts], vocab_size)
    _write(out, model)

    tokenizer = SentencePieceTokenizer(model, out.name)
    for source, texts, count in zip(sources, corpora, used_bytes, strict=True):
        size = sum(len(text.encode()) for text in texts)
        tokens = sum(map(len, tokenizer.encode_batch(texts)))
        print(
            f"{source}: {size / tokens:.3f} bytes per token "
            f"({len(texts):,} documents; {count:,} of {size:,} bytes trained on)"
        )
    print(f"wrote {out} ({tokenizer.fingerprint})")


def _check_vocab_size(vocab_size: int) -> None:
    if vocab_size <= 260:
        raise InputError(
            f"a vocabulary of {vocab_size} has no room beside its 4 special and 256 byte pieces; "
            "raise --vocab-size (the shipped model has 8192)."
        )


def _spread(texts: Sequence[str], share: float) -> Iterator[str]:
    """Take a share of the documents at even distances."""
    return (t for i, t in enumerate(texts) if int((i + 1) * share) > int(i * share))


def _write(out: Path, content: bytes) -> None:
    try:
        with written_whole(out) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write {out} ({error.strerror}); choose another place.") from error


def _fingerprint(model: bytes, special: tuple[int, ...], own: tuple[int, ...]) -> str:
    content = model if special == own else model + repr(special).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _special_ids(
    name: str, vocab_size: int, given: tuple[int | None, ...], own: tuple[int, ...]
) -> tuple[int, int, int]:
    """The pad, bos and eos ids: those given, else the model's own (negative where it has none)."""

    def choose(kind: str, given: int | None, own: int) -> int:
        if given is None and own < 0:
            raise InputError(
                f"{name} names no {kind} token; give the id to use as {kind}_id "
                f"(--data.{kind}-id on the command line)."
            )
        token_id = own if given is None else given
        if not 0 <= token_id < vocab_size:
            raise InputError(
                f"{kind}_id {token_id} is outside the {vocab_size} ids of {name}; give one of them."
            )
        return token_id

    pad, bos, eos = map(choose, ("pad", "bos", "eos"), given, own)
    return pad, bos, eos


def _checked_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text holds half of a surrogate pair at character {error.start}; remove it."
        ) from error
    return text


def _checked_ids(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> list[int]:
    checked = [int(token_id) for token_id in ids]
    for token_id in checked:
        if not 0 <= token_id < tokenizer.vocab_size:
            raise InputError(
                f"token id {token_id} is outside the {tokenizer.vocab_size} ids of "
                f"{tokenizer.name}; decode with the tokenizer that encoded it."
            )
    return checked


def main(args: Sequence[str] | None = None) -> None:
    """Run `python -m engram_jax.tokenizer`; bad input ends it with one sentence and status 2."""
    import tyro

    with one_sentence():
        tyro.extras.subcommand_cli_from_dict(
            {"train": train},
            prog="python -m engram_jax.tokenizer",
            description="Train a tokenizer.",
            args=args,
        )


if __name__ == "__main__":
    main()
