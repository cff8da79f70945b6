"""The cache of tokenized corpora: tokenized once, reused until text or tokenizer change."""

import errno
import glob
import json
import os
import shutil
import sys
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex
from typing import IO

import numpy as np

from engram_jax.data.corpus import Corpus, Manifest, column_checksum
from engram_jax.data.sources import resolve_source, scan, source_name, source_names
from engram_jax.data.survey import (
    Chunk,
    Pass,
    Survey,
    SurveyRecord,
    changed_while_read,
    short_digest,
)
from engram_jax.errors import DISK_FULL, InputError
from engram_jax.files import expand_home, hold_lock
from engram_jax.tokenizer import Tokenizer

# Version of the cache folder's content, part of its name. Increase it when the content changes.
FORMAT = 1

# Bytes of a source's name in the name of its cache folder. File systems allow 255 for a name.
_NAME_BYTES = 150

# A build that has written nothing for this long is considered killed: with a lock, and without one.
# (On some network file systems, a lock is only for the processes of one machine.)
_ABANDONED_SECONDS, _ABANDONED_SECONDS_WITHOUT_LOCK = 60.0, 3600.0


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
    cache = expand_home(cache)
    with _disk_errors(cache):
        folder = _Entry(path, tokenizer, cache).find_or_build()
    corpus = Corpus(folder, held_out, name)
    corpus.check_boundaries(tokenizer.bos_id, tokenizer.eos_id)
    return corpus


def build_corpora(
    sources: Sequence[str], tokenizer: Tokenizer, cache: Path, held_out: float
) -> list[Corpus]:
    """The corpora of several sources, for training and evaluation: see `build_corpus`.

    Raises:
        InputError: as in `build_corpus`; or a source has no held-out documents, or has the same
            name as another.
    """
    names = source_names([resolve_source(source) for source in sources])
    corpora = [
        build_corpus(source, tokenizer, cache, held_out, name)
        for source, name in zip(sources, names, strict=True)
    ]
    for corpus in corpora:
        if not len(corpus.held_out):
            raise InputError(
                f"None of the {corpus.manifest.documents} documents of {corpus.name} is held out "
                "for evaluation; raise data.held_out, or split the text into more documents (a "
                ".txt file is one document; in JSON Lines, each line is one)."
            )
    return corpora


class _Entry:
    """The corpus of one source and tokenizer in a cache.

    A source is read once, unless reading first may save a tokenization: because a corpus of a
    source with this name is in the cache, or because the disk may be too small. Processes that need
    the same corpus wait for the lock before they read.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, cache: Path) -> None:
        self._path, self._tokenizer, self._cache = path, tokenizer, cache
        self._name = source_name(path)
        self._short_name = self._name.encode()[:_NAME_BYTES].decode(errors="ignore")
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
        self._survey: Survey | None = None  # until the source was read, or was found in the record
        place = short_digest(repr((str(path.resolve()), tokenizer.fingerprint)))
        self._build_name = f"{self._short_name}-{place}"

    def find_or_build(self) -> Path:
        """Return the folder of the complete corpus."""
        folder = self._find()  # without a lock, because the cache may be a read-only folder
        if folder is None:
            self._cache.mkdir(parents=True, exist_ok=True)
            # Each build writes its own folder. So without a lock, work is only done twice.
            with hold_lock(self._cache / f"{self._build_name}.lock") as is_locked:
                folder = self._find()
                if folder is None:
                    self._remove_abandoned(is_locked=is_locked)
                    folder = self._build()
        return folder

    def _find(self) -> Path | None:
        """The folder, if it is complete. Reads the source if this may be so."""
        if self._survey is None:
            self._record = SurveyRecord(self._path, self._cache)
            self._survey = self._record.load()
        pattern = f"{glob.escape(self._short_name)}-{'[0-9a-f]' * 16}/manifest.json"
        if self._survey is None and any(self._cache.glob(pattern)):
            self._read_first()
        if self._survey is None:
            return None
        folder = self._folder(self._survey)
        return folder if (folder / "manifest.json").is_file() else None

    def _folder(self, survey: Survey) -> Path:
        tokenizer = self._tokenizer
        identity = (FORMAT, survey.fingerprint, tokenizer.fingerprint, tokenizer.vocab_size)
        specials = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        return self._cache / f"{self._short_name}-{short_digest(repr((*identity, *specials)))}"

    def _read_first(self) -> None:
        _tell_unread(self._path)
        reading = Pass(self._path, "read")
        for _ in reading.chunks():
            pass
        self._survey = reading.survey
        self._record.save(reading.survey)

    def _build(self) -> Path:
        """Tokenize into a new folder, and rename it when it is complete."""
        self._require_space()
        if self._survey is None:
            _tell_unread(self._path)
        partial = self._cache / f"{self._build_name}.{token_hex(4)}.partial"
        partial.mkdir()
        try:
            survey = self._write(partial)
            if self._survey not in (None, survey):
                raise changed_while_read(self._path)
            self._record.save(survey)
            folder = self._folder(survey)
            _publish(partial, folder)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise InputError(
                    f"cannot write the token cache {self._cache} ({error.strerror}); free some "
                    "space or choose another cache folder."
                ) from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        if survey.empty:
            print(f"{self._name}: skipped {survey.empty} empty documents.", file=sys.stderr)
        return folder

    def _require_space(self) -> None:
        free = shutil.disk_usage(self._cache).free
        # A byte of a compressed file is about four bytes of text, and these are about a token. Only
        # if the disk may be too small, the exact size is worth reading the source.
        if self._survey is None and free < self._record.file_bytes * self._dtype.itemsize:
            self._read_first()
        if self._survey is None:
            return
        # Estimated: a token per 4 bytes of text (English has 3.5 to 4.5). A document has three
        # numbers of 8 bytes.
        ids = self._survey.text_bytes // 4 * self._dtype.itemsize
        if free < (needed := ids + 24 * self._survey.documents):
            raise InputError(
                f"the disk of {self._cache} is full: the token cache needs about {needed:,} bytes, "
                f"and {free:,} are free; free some space or choose another cache folder."
            )

    def _write(self, folder: Path) -> Survey:
        """Write the content of a cache folder; return the survey of what was read."""
        tokenizer = self._tokenizer
        reading = Pass(self._path, "tokenize")
        with (folder / "ids.bin").open("wb") as ids:
            lengths, hashes, byte_lengths = _tokenize(reading, tokenizer, ids, self._dtype)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        np.save(folder / "offsets.npy", offsets)
        np.save(folder / "hashes.npy", np.frombuffer(hashes, np.uint64))
        np.save(folder / "byte_lengths.npy", np.frombuffer(byte_lengths, np.int64))
        survey = reading.survey
        manifest = Manifest(
            format=FORMAT,
            name=self._name,
            tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            pad_id=tokenizer.pad_id,
            dtype=self._dtype.name,
            documents=survey.documents,
            tokens=int(offsets[-1]),
            text_bytes=survey.text_bytes,
            crc32=column_checksum(folder),
        )
        (folder / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        return survey

    def _remove_abandoned(self, *, is_locked: bool) -> None:
        """Removes what killed builds left."""
        patience = _ABANDONED_SECONDS if is_locked else _ABANDONED_SECONDS_WITHOUT_LOCK
        for partial in self._cache.glob(f"{glob.escape(self._build_name)}.*.partial"):
            written = max((file.stat().st_mtime for file in partial.glob("*")), default=0.0)
            if _time_of_disk(self._cache) - max(written, partial.stat().st_mtime) > patience:
                shutil.rmtree(partial, ignore_errors=True)


def _time_of_disk(folder: Path) -> float:
    """The time of a file written now, in seconds, by the clock that gives files their times.

    A file server has a clock of its own, which can differ from the hosts'.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"now")
        file.flush()
        return os.fstat(file.fileno()).st_mtime


def _tell_unread(path: Path) -> None:
    """Prints which files of a folder are not read."""
    files, others = scan(path) if path.is_dir() else ([], {})
    if others:
        shown = [f"{file.relative_to(path)} ({why})" for file, why in others.items()]
        print(
            f"{source_name(path)}: {len(files)} files are read, and {len(others)} are not: "
            f"{', '.join(shown[:3])}{' …' if shown[3:] else ''}",
            file=sys.stderr,
        )


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


def _tokenize(
    reading: Pass, tokenizer: Tokenizer, ids: IO[bytes], dtype: np.dtype
) -> tuple[array, array, array]:
    """Write the token ids of all documents; return the lengths, hashes and byte lengths."""
    lengths, hashes, byte_lengths = array("q"), array("Q"), array("q")
    bos, eos = (np.array([i], np.int32) for i in (tokenizer.bos_id, tokenizer.eos_id))
    for chunk in _read_ahead(reading.chunks()):
        encoded = tokenizer.encode_batch(chunk.texts)
        flat = np.concatenate([part for of_text in encoded for part in (bos, of_text, eos)])
        if not 0 <= flat.min() <= flat.max() < tokenizer.vocab_size:
            raise InputError(
                f"tokenizer {tokenizer.name} returns ids up to {flat.max()}, outside its "
                f"vocabulary of {tokenizer.vocab_size}; its model file is inconsistent."
            )
        ids.write(flat.astype(dtype).data)
        lengths.extend(of_text.size + 2 for of_text in encoded)
        hashes.extend(chunk.hashes)
        byte_lengths.extend(chunk.byte_lengths)
    return lengths, hashes, byte_lengths


def _read_ahead(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Yield the chunks. A thread reads the next one, because tokenizers release the GIL."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = reader.submit(next, chunks, None)
            yield chunk


@contextmanager
def _disk_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write the token cache {cache}: {error.strerror or error}; choose a writable "
            "folder."
        ) from error
