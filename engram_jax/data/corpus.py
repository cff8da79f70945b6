"""Corpora as memory-mapped token ids: tokenized once, reused while text and tokenizer stay."""

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from secrets import token_hex
from typing import IO, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer, UInt64
from tqdm import tqdm

from engram_jax.data.sources import (
    Document,
    read_documents,
    resolve_source,
    source_files,
    source_name,
)
from engram_jax.errors import InputError
from engram_jax.files import hold_lock
from engram_jax.tokenizer import Tokenizer

# Written into the name of every cache folder: raise it when what is stored changes.
FORMAT = 1

# Documents are handed to the tokenizer in chunks of about this many bytes: enough to feed its
# threads, little enough that ids and texts of a chunk stay far below 100 MB.
_CHUNK_BYTES = 1 << 20

# A file may change twice within one tick of the file system's clock, so one that changed this
# shortly before it was surveyed is surveyed again the next time.
_CLOCK_TICK_NS = 2_000_000_000

# A build that writes nothing for this long was killed.
_ABANDONED_SECONDS = 3600.0


class Survey(NamedTuple):
    """What one reading of a source finds: enough to name its cache folder and to size it."""

    fingerprint: str
    documents: int
    text_bytes: int
    empty: int


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` of a cache folder holds; it is written last."""

    format: int
    name: str
    tokenizer: str
    vocab_size: int
    pad_id: int
    dtype: str
    documents: int
    tokens: int
    text_bytes: int


class Corpus:
    """Token ids of one source, each document as bos … eos, split by a hash of its text.

    Attributes:
        name: the source's name.
        folder: where the ids lie.
        manifest: sizes and the tokenizer's fingerprint.
    """

    def __init__(self, folder: Path, held_out: float) -> None:
        """Open a cache folder, with the share `held_out` (in [0, 1]) of documents held out."""
        self.folder = folder
        self._held_out_share = held_out
        try:
            self.manifest = Manifest(**json.loads((folder / "manifest.json").read_text()))
            size = (folder / "ids.bin").stat().st_size
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{folder} is no complete corpus ({error}); delete it.") from error
        self.name = self.manifest.name
        if size != self.manifest.tokens * np.dtype(self.manifest.dtype).itemsize:
            raise InputError(
                f"{folder / 'ids.bin'} does not hold {self.manifest.tokens} tokens; delete "
                f"{folder}, and it is built again."
            )

    def __reduce__(self) -> tuple[type["Corpus"], tuple[Path, float]]:
        """Pickle as a path, so that worker processes map the same file."""
        return Corpus, (self.folder, self._held_out_share)

    def __repr__(self) -> str:
        """Show name, documents and tokens."""
        sizes = f"{self.manifest.documents} documents, {self.manifest.tokens} tokens"
        return f"Corpus({self.name!r}, {sizes})"

    @cached_property
    def ids(self) -> Integer[np.ndarray, "tokens"]:
        """All token ids, memory-mapped."""
        path, dtype = self.folder / "ids.bin", self.manifest.dtype
        # A plain array over the map: NumPy's memmap subclass slows small reads down threefold.
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
        """Hash of each document's text."""
        return np.asarray(np.load(self.folder / "hashes.npy", mmap_mode="r"))

    @cached_property
    def train(self) -> "CorpusView":
        """The documents to train on."""
        return CorpusView(self, "train", np.flatnonzero(~self._is_held_out()))

    @cached_property
    def held_out(self) -> "CorpusView":
        """The documents that training never sees."""
        return CorpusView(self, "held_out", np.flatnonzero(self._is_held_out()))

    def _is_held_out(self) -> Bool[np.ndarray, "documents"]:
        # 53 bits of the hash, so that both sides of the comparison are exact in a float64.
        return (self.hashes >> np.uint64(11)) < self._held_out_share * 2.0**53


class CorpusView:
    """Some documents of a corpus, in its order.

    Attributes:
        corpus: where they come from.
        indices: their numbers there, int64 [documents].
    """

    def __init__(
        self,
        corpus: Corpus,
        side: Literal["train", "held_out"],
        indices: Int64[np.ndarray, "documents"],
    ) -> None:
        """View the documents `indices`, which are those of `corpus.train` or `corpus.held_out`."""
        self.corpus = corpus
        self.indices = indices
        self._side = side

    def __reduce__(self) -> tuple[object, tuple[Corpus, str]]:
        """Pickle as the corpus and the side's name."""
        return getattr, (self.corpus, self._side)

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.indices)

    def __repr__(self) -> str:
        """Show the corpus, the side and the size."""
        return f"CorpusView({self.corpus.name!r}, {self._side!r}, {len(self)} documents)"

    @cached_property
    def starts(self) -> Int64[np.ndarray, "documents"]:
        """Where each document starts in `corpus.ids`."""
        return self.corpus.offsets[self.indices]

    @cached_property
    def lengths(self) -> Int64[np.ndarray, "documents"]:
        """Tokens of each document, bos and eos included."""
        return self.corpus.offsets[self.indices + 1] - self.starts

    @cached_property
    def byte_lengths(self) -> Int64[np.ndarray, "documents"]:
        """Bytes of each document's text in UTF-8."""
        return self.corpus.byte_lengths[self.indices]

    @property
    def token_count(self) -> int:
        """Tokens of all documents together."""
        return int(self.lengths.sum())

    def tokens(self, document: int | np.integer) -> Int32[np.ndarray, "length"]:
        """Return the token ids of one document, bos and eos included."""
        start, length = int(self.starts[document]), int(self.lengths[document])
        return self.corpus.ids[start : start + length].astype(np.int32)


def build_corpus(
    source: str | Path, tokenizer: Tokenizer, cache: str | Path, held_out: float = 0.05
) -> Corpus:
    """Return the tokenized corpus of a source, from the cache if its text and tokenizer are there.

    The folder in `cache` is named by the source and by a fingerprint of its texts and the
    tokenizer; it appears by one rename when it is complete. A document is held out if the hash of
    its text falls below the share `held_out`, so equal texts fall on one side, and neither order
    nor other documents matter; changing the share does not tokenize again. Empty documents are
    passed over, with a note on stderr.

    Raises:
        InputError: a source that cannot be read (see `read_documents`) or is empty, a tokenizer
            that gives ids outside its vocabulary, a cache that cannot be written or is full.
    """
    if not 0 <= held_out <= 1:
        raise InputError(f"held_out is a share of the documents from 0 to 1, not {held_out}.")
    path = resolve_source(source)
    cache = Path(cache)
    name = source_name(path)
    with _disk_errors(cache):
        survey = _survey(path, cache)
        identity = (FORMAT, survey.fingerprint, tokenizer.fingerprint, tokenizer.vocab_size)
        specials = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        folder = cache / f"{name}-{_digest(repr((*identity, *specials)).encode()).hex()}"
        manifest = folder / "manifest.json"
        if not manifest.is_file():  # a complete one may lie where nobody may write
            # The lock only saves work: each build writes a folder of its own.
            cache.mkdir(parents=True, exist_ok=True)
            with hold_lock(folder.with_name(f"{folder.name}.lock")):
                if not manifest.is_file():
                    _build(path, name, tokenizer, survey, folder)
    return Corpus(folder, held_out)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


def _texts(path: Path) -> Iterator[Document]:
    return (document for document in read_documents(path) if document.text.strip())


def _survey(path: Path, cache: Path) -> Survey:
    files = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for file in source_files(path)
    ]
    record = cache / "surveys" / f"{_digest(repr(files).encode()).hex()}.json"
    if record.is_file():
        return Survey(**json.loads(record.read_text()))
    begun = time.time_ns()
    survey = _read_once(path)
    if begun - max(changed for *_, changed in files) > _CLOCK_TICK_NS:
        record.parent.mkdir(parents=True, exist_ok=True)
        partial = record.with_suffix(f".{token_hex(4)}")
        partial.write_text(json.dumps(survey._asdict()))
        partial.replace(record)
    return survey


def _read_once(path: Path) -> Survey:
    fingerprint = hashlib.blake2b(digest_size=16)
    documents = text_bytes = empty = 0
    with tqdm(desc=f"read {source_name(path)}", unit=" documents", delay=1) as progress:
        for document in read_documents(path):
            progress.update()
            if not document.text.strip():
                empty += 1
                continue
            text = document.text.encode()
            fingerprint.update(hashlib.blake2b(text).digest())
            documents += 1
            text_bytes += len(text)
    if not documents:
        raise InputError(f"corpus {path} holds no text; give it at least one document.")
    return Survey(fingerprint.hexdigest(), documents, text_bytes, empty)


def _build(path: Path, name: str, tokenizer: Tokenizer, survey: Survey, folder: Path) -> None:
    _remove_abandoned(folder)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    # English gives 3.5 to 4.5 bytes of text a token; three int64 columns a document.
    needed = survey.text_bytes // 4 * dtype.itemsize + 24 * survey.documents
    if (free := shutil.disk_usage(folder.parent).free) < needed:
        raise InputError(_full_disk(folder.parent, needed, free))
    if survey.empty:
        print(f"{name}: {survey.empty} empty documents are left out.", file=sys.stderr)
    partial = folder.with_name(f"{folder.name}.{token_hex(4)}.partial")
    partial.mkdir()
    try:
        with (partial / "ids.bin").open("wb") as ids:
            lengths, hashes, byte_lengths = _tokenize(path, name, tokenizer, survey, ids, dtype)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        np.save(partial / "offsets.npy", offsets.astype(np.int64))
        np.save(partial / "hashes.npy", np.array(hashes, np.uint64))
        np.save(partial / "byte_lengths.npy", np.array(byte_lengths, np.int64))
        manifest = Manifest(
            format=FORMAT,
            name=name,
            tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            pad_id=tokenizer.pad_id,
            dtype=dtype.name,
            documents=len(lengths),
            tokens=int(offsets[-1]),
            text_bytes=survey.text_bytes,
        )
        (partial / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        _publish(partial, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(folder.parent).free
            raise InputError(_full_disk(folder.parent, needed, free)) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, folder: Path) -> None:
    """Make a finished build visible; where another process was first, its folder stays."""
    for file in partial.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    try:
        partial.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _tokenize(
    path: Path,
    name: str,
    tokenizer: Tokenizer,
    survey: Survey,
    ids: IO[bytes],
    dtype: np.dtype,
) -> tuple[array, array, array]:
    """Write the ids of all documents; return their lengths, hashes and byte lengths."""
    lengths, hashes, byte_lengths = array("q"), array("Q"), array("q")
    fingerprint = hashlib.blake2b(digest_size=16)
    bos, eos = np.array([tokenizer.bos_id], dtype), np.array([tokenizer.eos_id], dtype)
    size = survey.text_bytes
    with tqdm(desc=f"tokenize {name}", total=size, unit="B", unit_scale=True, delay=1) as progress:
        for texts in _chunks(path):
            for text, of_text in zip(texts, tokenizer.encode_batch(texts), strict=True):
                if of_text.size and not 0 <= of_text.min() <= of_text.max() < tokenizer.vocab_size:
                    raise InputError(
                        f"tokenizer {tokenizer.name} gives ids up to {of_text.max()}, beyond its "
                        f"vocabulary of {tokenizer.vocab_size}; its model file is inconsistent."
                    )
                ids.write(np.concatenate([bos, of_text.astype(dtype), eos]).tobytes())
                encoded = text.encode()
                digest = hashlib.blake2b(encoded).digest()
                fingerprint.update(digest)
                lengths.append(of_text.size + 2)
                hashes.append(int.from_bytes(digest[:8], "little"))
                byte_lengths.append(len(encoded))
                progress.update(len(encoded))
    if fingerprint.hexdigest() != survey.fingerprint:
        raise InputError(f"{path} changed while it was being read; start again.")
    return lengths, hashes, byte_lengths


def _chunks(path: Path) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for document in _texts(path):
        texts.append(document.text)
        size += len(document.text)
        if size >= _CHUNK_BYTES:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _remove_abandoned(folder: Path) -> None:
    for partial in folder.parent.glob(f"{folder.name}.*.partial"):
        written = max((file.stat().st_mtime for file in partial.glob("*")), default=0.0)
        if time.time() - max(written, partial.stat().st_mtime) > _ABANDONED_SECONDS:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _disk_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write the token cache {cache}: {error.strerror or error}; give a folder that "
            "can be written."
        ) from error


def _full_disk(folder: Path, needed: int, free: int) -> str:
    return (
        f"the disk of {folder} is full: the token cache needs about {needed:,} bytes there and "
        f"{free:,} are free; make room or give another cache folder."
    )
