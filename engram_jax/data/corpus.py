"""Corpora as memory-mapped token ids, split by a hash of each document's text."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer, UInt64

from engram_jax.errors import InputError
from engram_jax.files import parse_json


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json` in a cache folder; the file is written last.

    `crc32` is the checksum of all files with one number per document; earlier versions have none.
    """

    format: int
    name: str
    tokenizer: str
    vocab_size: int
    pad_id: int
    dtype: str
    documents: int
    tokens: int
    text_bytes: int
    crc32: int | None = None


COLUMNS = ("offsets", "byte_lengths", "hashes")  # of the documents, in files NAME.npy


def column_checksum(folder: Path) -> int:
    """The checksum of a cache folder's files with one number per document."""
    checksum = 0
    for name in COLUMNS:
        # Mapped, because processes share such memory.
        checksum = zlib.crc32(np.memmap(folder / f"{name}.npy", np.uint8, "r"), checksum)
    return checksum


# Columns are read in blocks of this many documents, so that temporary arrays stay small.
_BLOCK = 1 << 20


def blocks(count: int) -> Iterator[slice]:
    """The slices of the blocks of `count` documents."""
    return (slice(begin, min(begin + _BLOCK, count)) for begin in range(0, count, _BLOCK))


def number_type(count: int) -> type[np.uint32] | type[np.int64]:
    """The smaller of two types that hold the numbers of `count` documents."""
    return np.uint32 if count <= 1 << 32 else np.int64


class Corpus:
    """Token ids of one source, each document as bos … eos, split by a hash of its text.

    Attributes:
        name: the source's name.
        folder: the cache folder.
        manifest: sizes and the tokenizer's fingerprint.
    """

    def __init__(self, folder: Path, held_out: float, name: str | None = None) -> None:
        """Open a cache folder.

        Args:
            folder: the cache folder.
            held_out: the share of documents that is held out, from 0 to 1.
            name: another name than the file's.
        """
        self.folder = folder
        self._held_out_share = held_out
        try:
            self.manifest = Manifest(**parse_json((folder / "manifest.json").read_text()))
            size = (folder / "ids.bin").stat().st_size
            itemsize = np.dtype(self.manifest.dtype).itemsize
            self._check_columns()
        except (OSError, ValueError, TypeError, EOFError, SyntaxError, TokenError) as error:
            raise InputError(
                f"{folder} is not a complete corpus ({error}); delete it, and run again."
            ) from error
        self.name = name or self.manifest.name
        if size != self.manifest.tokens * itemsize:
            raise InputError(
                f"{folder / 'ids.bin'} does not have {self.manifest.tokens} tokens; delete "
                f"{folder}, and run again."
            )

    def _check_columns(self) -> None:
        """Raises ValueError if a column of the documents is not what was written.

        Caches of earlier versions have no checksum. NumPy parses a damaged header with `tokenize`.
        """
        if self.manifest.crc32 not in (None, column_checksum(self.folder)):
            raise ValueError("another checksum of its documents")
        documents = self.manifest.documents
        for name, dtype, length in (
            ("offsets", np.int64, documents + 1),
            ("byte_lengths", np.int64, documents),
            ("hashes", np.uint64, documents),
        ):
            column = np.load(self.folder / f"{name}.npy", mmap_mode="r")
            if (column.dtype, column.shape) != (dtype, (length,)):
                raise ValueError(f"{name}.npy has {column.dtype}{list(column.shape)}")

    def check_boundaries(self, bos_id: int, eos_id: int) -> None:
        """Check that documents begin with bos and end with eos, for at most 4,096 of them.

        Raises:
            InputError: one does not, so `ids.bin` was overwritten.
        """
        documents = self.manifest.documents
        sample = np.unique(np.linspace(0, documents - 1, min(documents, 4096)).astype(np.int64))
        first, last = self.ids[self.offsets[sample]], self.ids[self.offsets[sample + 1] - 1]
        if not (np.all(first == bos_id) and np.all(last == eos_id)):
            raise InputError(
                f"The documents in {self.folder / 'ids.bin'} do not begin with bos and end with "
                f"eos, so the file was overwritten; delete {self.folder}, and run again."
            )

    def __reduce__(self) -> tuple[type["Corpus"], tuple[Path, float, str]]:
        """Pickle as a path, so that worker processes map the same file."""
        return Corpus, (self.folder, self._held_out_share, self.name)

    def __repr__(self) -> str:
        """Show name, documents and tokens."""
        sizes = f"{self.manifest.documents} documents, {self.manifest.tokens} tokens"
        return f"Corpus({self.name!r}, {sizes})"

    @cached_property
    def ids(self) -> Integer[np.ndarray, "tokens"]:
        """All token ids, memory-mapped."""
        path, dtype = self.folder / "ids.bin", self.manifest.dtype
        # As a plain array, because small reads of NumPy's memmap subclass are three times slower.
        return np.asarray(np.memmap(path, dtype, "r", shape=(self.manifest.tokens,)))

    @cached_property
    def offsets(self) -> Int64[np.ndarray, "documents_and_one"]:
        """Where each document starts in `ids`, and the end of the last."""
        return np.asarray(np.load(self.folder / "offsets.npy", mmap_mode="r"))

    @cached_property
    def byte_lengths(self) -> Int64[np.ndarray, "documents"]:
        """Bytes of each document's text in UTF-8."""
        return np.asarray(np.load(self.folder / "byte_lengths.npy", mmap_mode="r"))

    @cached_property
    def hashes(self) -> UInt64[np.ndarray, "documents"]:
        """`document_hash` of each text, by which documents are held out."""
        return np.asarray(np.load(self.folder / "hashes.npy", mmap_mode="r"))

    def lengths_of(self, numbers: Integer[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """Tokens of these documents, bos and eos included."""
        return self.offsets[1:][numbers] - self.offsets[numbers]

    @cached_property
    def train(self) -> "CorpusView":
        """The documents to train on."""
        return CorpusView(self, "train")

    @cached_property
    def held_out(self) -> "CorpusView":
        """The documents that are never used for training."""
        return CorpusView(self, "held_out")

    def held_out_among(self, numbers: Integer[np.ndarray, "n"] | slice) -> Bool[np.ndarray, "n"]:
        """Which of these documents are held out."""
        return is_held_out(self.hashes[numbers], self._held_out_share)


def is_held_out(
    hashes: UInt64[np.ndarray, "documents"], share: float
) -> Bool[np.ndarray, "documents"]:
    """Whether documents with these hashes are held out, if this share of all is."""
    # With 53 bits of the hash, both sides of the comparison are exact in float64.
    return (hashes >> np.uint64(11)) < share * 2.0**53


class CorpusView:
    """The documents of one side of a corpus, in the same order or in that of their hashes.

    Attributes:
        corpus: the corpus.
    """

    def __init__(
        self, corpus: Corpus, side: Literal["train", "held_out"], *, is_by_hash: bool = False
    ) -> None:
        """View the documents of `corpus.train` or `corpus.held_out`."""
        self.corpus = corpus
        self._side = side
        self._is_by_hash = is_by_hash

    def __reduce__(self) -> tuple[object, tuple[Corpus, str, bool]]:
        """Pickle as the corpus, the side's name and the order."""
        return _view, (self.corpus, self._side, self._is_by_hash)

    def __len__(self) -> int:
        """Return the number of documents."""
        return self._sizes[0]

    def __repr__(self) -> str:
        """Show the corpus, the side and the size."""
        return f"CorpusView({self.corpus.name!r}, {self._side!r}, {len(self)} documents)"

    @cached_property
    def lengths(self) -> Int64[np.ndarray, "documents"]:
        """Tokens of each document, bos and eos included."""
        return self.corpus.lengths_of(self.indices)

    @cached_property
    def byte_lengths(self) -> Int64[np.ndarray, "documents"]:
        """Bytes of each document's text in UTF-8."""
        return self.corpus.byte_lengths[self.indices]

    @property
    def token_count(self) -> int:
        """Total number of tokens."""
        return self._sizes[1]

    @cached_property
    def _sizes(self) -> tuple[int, int]:
        """Number of documents, and of tokens; without arrays of all documents."""
        documents = tokens = 0
        for block in blocks(self.corpus.manifest.documents):
            begins = self.corpus.offsets[block.start : block.stop + 1]
            chosen = self.contains(block)
            documents += int(chosen.sum())
            tokens += int(np.diff(begins)[chosen].sum())
        return documents, tokens

    @cached_property
    def indices(self) -> Integer[np.ndarray, "documents"]:
        """Numbers of the documents in the corpus."""
        count = self.corpus.manifest.documents
        chosen = [b.start + np.flatnonzero(self.contains(b)) for b in blocks(count)]
        indices = np.concatenate(chosen, dtype=number_type(count), casting="unsafe")
        if self._is_by_hash:
            indices = indices[np.argsort(self.corpus.hashes[indices], kind="stable")]
        return indices

    def contains(self, numbers: Integer[np.ndarray, "n"] | slice) -> Bool[np.ndarray, "n"]:
        """Which of the corpus's documents with these numbers are here."""
        return self.corpus.held_out_among(numbers) == (self._side == "held_out")

    def by_hash(self) -> "CorpusView":
        """Return the same documents in the order of their texts' hashes.

        The first ones are a random sample, which depends only on the texts.
        """
        return CorpusView(self.corpus, self._side, is_by_hash=True)

    def tokens(self, document: int | np.integer) -> Int32[np.ndarray, "length"]:
        """Return the token ids of one document, bos and eos included."""
        number = int(self.indices[document])
        start, end = self.corpus.offsets[number : number + 2]
        return self.corpus.ids[start:end].astype(np.int32)


def _view(corpus: Corpus, side: str, is_by_hash: bool) -> CorpusView:
    """A view that was pickled."""
    view: CorpusView = getattr(corpus, side)
    return view.by_hash() if is_by_hash else view
