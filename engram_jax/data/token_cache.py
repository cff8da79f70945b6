"""The cache of tokenized corpora: tokenized once, reused until text or tokenizer change."""

import errno
import glob
import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex
from typing import IO, NamedTuple

import numpy as np
from tqdm import tqdm

from engram_jax.data.corpus import Corpus, Manifest, column_checksum
from engram_jax.data.sources import (
    Document,
    read_documents,
    resolve_source,
    scan,
    source_files,
    source_name,
)
from engram_jax.errors import DISK_FULL, InputError
from engram_jax.files import hold_lock, parse_json
from engram_jax.tokenizer import Tokenizer

# Version of the cache folder's content, part of its name. Increase it when the content changes.
FORMAT = 1

# The tokenizer gets documents in chunks of about this many bytes: enough work for its threads, but
# far below 100 MB for the ids and texts of a chunk.
_CHUNK_BYTES = 1 << 20

# A file can change twice within one tick of the file system's clock. So if a file changed less than
# this before its survey, the survey is not reused.
_CLOCK_TICK_NS = 2_000_000_000

# Bytes of a source's name in the name of its cache folder. File systems allow 255 for a name.
_NAME_BYTES = 150

# A build that has written nothing for this long is considered killed: with a lock, and without one.
# (On some network file systems, a lock is only for the processes of one machine.)
_ABANDONED_SECONDS, _ABANDONED_SECONDS_WITHOUT_LOCK = 60.0, 3600.0


class Survey(NamedTuple):
    """Facts about a source from reading it once, which give its cache folder's name and size."""

    fingerprint: str
    documents: int
    text_bytes: int
    empty: int


def build_corpus(
    source: str | Path,
    tokenizer: Tokenizer,
    cache: str | Path,
    held_out: float = 0.05,
    name: str | None = None,
) -> Corpus:
    """Return the tokenized corpus of a source; tokenize it if it is not in the cache.

    The name of the folder in `cache` contains the source's name and a fingerprint of its texts and
    the tokenizer. The folder gets this name when it is complete. A document is held out if the hash
    of its text, as a fraction of 1, is below `held_out`. So equal texts are on the same side, and
    the choice does not depend on the order or on other documents. A change of `held_out` does not
    tokenize again. Empty documents are skipped, with a message on stderr. The corpus is called
    `name`, by default like the file.

    Raises:
        InputError: the source cannot be read (see `read_documents`) or is empty, the tokenizer
            returns ids outside its vocabulary, or the cache cannot be written or its disk is full.
    """
    if not 0 <= held_out <= 1:
        raise InputError(f"held_out is {held_out}; it must be from 0 to 1.")
    path = resolve_source(source)
    cache = Path(cache).expanduser()
    file_name = source_name(path)
    with _disk_errors(cache):
        survey = _survey(path, cache)
        identity = (FORMAT, survey.fingerprint, tokenizer.fingerprint, tokenizer.vocab_size)
        specials = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        short = file_name.encode()[:_NAME_BYTES].decode(errors="ignore")
        folder = cache / f"{short}-{_digest(repr((*identity, *specials)).encode()).hex()}"
        manifest = folder / "manifest.json"
        if not manifest.is_file():  # a complete corpus may be in a read-only folder
            # Each build writes its own folder. So without a lock, work is only done twice.
            cache.mkdir(parents=True, exist_ok=True)
            with hold_lock(folder.with_name(f"{folder.name}.lock")) as is_locked:
                if not manifest.is_file():
                    _remove_abandoned(folder, is_locked=is_locked)
                    _build(path, file_name, tokenizer, survey, folder)
    corpus = Corpus(folder, held_out, name)
    corpus.check_boundaries(tokenizer.bos_id, tokenizer.eos_id)
    return corpus


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


def _texts(path: Path) -> Iterator[Document]:
    return (document for document in read_documents(path) if document.text.strip())


def _survey(path: Path, cache: Path) -> Survey:
    # Programs can set mtime, as archives do. No program sets ctime, the time of the last change.
    stats = [(str(file.resolve()), file.stat()) for file in source_files(path)]
    files = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats]
    record = cache / "surveys" / f"{_digest(repr(files).encode()).hex()}.json"
    try:
        content = parse_json(record.read_text())
        survey = Survey(**content["survey"])
        if content["crc32"] == _survey_checksum(survey):
            return survey
    except (OSError, ValueError, TypeError, KeyError):  # there is none, or it is damaged
        pass
    begun = time.time_ns()
    survey = _read_once(path)
    if begun - max(s.st_ctime_ns for _, s in stats) > _CLOCK_TICK_NS:
        record.parent.mkdir(parents=True, exist_ok=True)
        partial = record.with_suffix(f".{token_hex(4)}")
        content = {"survey": survey._asdict(), "crc32": _survey_checksum(survey)}
        partial.write_text(json.dumps(content))
        partial.replace(record)
    return survey


def _survey_checksum(survey: Survey) -> int:
    return zlib.crc32(repr(survey).encode())


def _read_once(path: Path) -> Survey:
    fingerprint = hashlib.blake2b(digest_size=16)
    documents = text_bytes = empty = 0
    if path.is_dir():
        files, others = scan(path)
        if others:
            shown = [f"{file.relative_to(path)} ({why})" for file, why in others.items()]
            print(
                f"{source_name(path)}: {len(files)} files are read, and {len(others)} are not: "
                f"{', '.join(shown[:3])}{' …' if shown[3:] else ''}",
                file=sys.stderr,
            )
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
        raise InputError(f"corpus {path} holds no text; it needs at least one document.")
    return Survey(fingerprint.hexdigest(), documents, text_bytes, empty)


def _build(path: Path, name: str, tokenizer: Tokenizer, survey: Survey, folder: Path) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    # English has 3.5 to 4.5 bytes of text per token. A document has three int64 columns.
    needed = survey.text_bytes // 4 * dtype.itemsize + 24 * survey.documents
    if (free := shutil.disk_usage(folder.parent).free) < needed:
        raise InputError(_full_disk(folder.parent, needed, free))
    if survey.empty:
        print(f"{name}: skipped {survey.empty} empty documents.", file=sys.stderr)
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
            crc32=column_checksum(partial),
        )
        (partial / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        _publish(partial, folder)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise InputError(
                f"cannot write the token cache {folder.parent} ({error.strerror}); free some space "
                "or choose another cache folder."
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, folder: Path) -> None:
    """Rename a complete build to its final name; keep an existing folder of another process."""
    for file in partial.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    try:
        partial.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def document_hash(text: bytes) -> int:
    """The 64-bit hash of a document's text in UTF-8, by which it is held out."""
    return int.from_bytes(hashlib.blake2b(text).digest()[:8], "little")


def _tokenize(
    path: Path,
    name: str,
    tokenizer: Tokenizer,
    survey: Survey,
    ids: IO[bytes],
    dtype: np.dtype,
) -> tuple[array, array, array]:
    """Write the token ids of all documents; return the lengths, hashes and byte lengths."""
    lengths, hashes, byte_lengths = array("q"), array("Q"), array("q")
    fingerprint = hashlib.blake2b(digest_size=16)
    bos, eos = np.array([tokenizer.bos_id], dtype), np.array([tokenizer.eos_id], dtype)
    size = survey.text_bytes
    with tqdm(desc=f"tokenize {name}", total=size, unit="B", unit_scale=True, delay=1) as progress:
        for texts in _chunks(path):
            for text, of_text in zip(texts, tokenizer.encode_batch(texts), strict=True):
                if of_text.size and not 0 <= of_text.min() <= of_text.max() < tokenizer.vocab_size:
                    raise InputError(
                        f"tokenizer {tokenizer.name} returns ids up to {of_text.max()}, outside "
                        f"its vocabulary of {tokenizer.vocab_size}; its model file is inconsistent."
                    )
                ids.write(np.concatenate([bos, of_text.astype(dtype), eos]).tobytes())
                encoded = text.encode()
                fingerprint.update(hashlib.blake2b(encoded).digest())
                lengths.append(of_text.size + 2)
                hashes.append(document_hash(encoded))
                byte_lengths.append(len(encoded))
                progress.update(len(encoded))
    if fingerprint.hexdigest() != survey.fingerprint:
        raise InputError(f"{path} changed while it was read; run again.")
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


def _remove_abandoned(folder: Path, *, is_locked: bool) -> None:
    """Removes what killed builds left."""
    patience = _ABANDONED_SECONDS if is_locked else _ABANDONED_SECONDS_WITHOUT_LOCK
    for partial in folder.parent.glob(f"{glob.escape(folder.name)}.*.partial"):
        written = max((file.stat().st_mtime for file in partial.glob("*")), default=0.0)
        if time.time() - max(written, partial.stat().st_mtime) > patience:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _disk_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write the token cache {cache}: {error.strerror or error}; choose a writable "
            "folder."
        ) from error


def _full_disk(folder: Path, needed: int, free: int) -> str:
    return (
        f"the disk of {folder} is full: the token cache needs about {needed:,} bytes, and "
        f"{free:,} are free; free some space or choose another cache folder."
    )
