"""One pass over a source: yields its texts in chunks, and computes its `Survey`.

The survey's fingerprint is a part of the cache folder's name. The survey is kept in the cache, so
that an unchanged source is not read again.
"""

import hashlib
import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

from tqdm import tqdm

from engram_jax.data.documents import read_documents
from engram_jax.data.sources import source_files, source_name
from engram_jax.errors import InputError
from engram_jax.files import parse_json

# The tokenizer gets documents in chunks of about this many bytes: enough work for its threads, but
# far below 100 MB for the ids and texts of a chunk.
_CHUNK_BYTES = 1 << 20

# A file can change twice within one tick of the file system's clock. So if a file changed less than
# this before its survey, the survey is not reused.
_CLOCK_TICK_NS = 2_000_000_000


class Survey(NamedTuple):
    """Facts about a source from reading it once, which give its cache folder's name and size."""

    fingerprint: str
    documents: int
    text_bytes: int
    empty: int


class Chunk(NamedTuple):
    """Some consecutive documents that are not empty.

    Attributes:
        texts: their texts.
        hashes: `document_hash` of each text.
        byte_lengths: bytes of each text in UTF-8.
    """

    texts: list[str]
    hashes: list[int]
    byte_lengths: list[int]


class Pass:
    """Reads a source once. After the last chunk, `survey` has its facts.

    Args:
        path: a resolved source.
        task: what is done with the texts, for the progress bar.
    """

    def __init__(self, path: Path, task: str) -> None:
        """Keep the arguments; `chunks` opens the files."""
        self._path, self._task = path, task
        self._fingerprint = hashlib.blake2b(digest_size=16)
        self._documents = self._text_bytes = self._empty = 0

    def chunks(self) -> Iterator[Chunk]:
        """Yield the documents, with a progress bar in bytes of the source's files.

        Raises:
            InputError: the source cannot be read (see `read_documents`), or holds no text.
        """
        size = sum(file.stat().st_size for file in source_files(self._path))
        name = f"{self._task} {source_name(self._path)}"
        chunk = Chunk([], [], [])
        begun = 0
        with tqdm(desc=name, total=size, unit="B", unit_scale=True, delay=1) as progress:
            for document in read_documents(self._path, progress.update):
                if not document.text.strip():
                    self._empty += 1
                    continue
                text = document.text.encode()
                digest = hashlib.blake2b(text).digest()
                self._fingerprint.update(digest)
                self._documents += 1
                self._text_bytes += len(text)
                chunk.texts.append(document.text)
                chunk.hashes.append(_first_64_bits(digest))
                chunk.byte_lengths.append(len(text))
                if self._text_bytes - begun >= _CHUNK_BYTES:
                    yield chunk
                    chunk, begun = Chunk([], [], []), self._text_bytes
            if chunk.texts:
                yield chunk
        if not self._documents:
            raise InputError(f"corpus {self._path} holds no text; it needs at least one document.")

    @property
    def survey(self) -> Survey:
        """The facts of the documents read so far."""
        fingerprint = self._fingerprint.hexdigest()
        return Survey(fingerprint, self._documents, self._text_bytes, self._empty)


def document_hash(text: bytes) -> int:
    """The 64-bit hash of a document's text in UTF-8, by which it is held out."""
    return _first_64_bits(hashlib.blake2b(text).digest())


def _first_64_bits(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little")


class SurveyRecord:
    """The survey of a source's files as they are now, in a file of the cache.

    The file's name depends on paths, sizes and times of the source's files.

    Attributes:
        file_bytes: sum of the files' sizes.
    """

    def __init__(self, path: Path, cache: Path) -> None:
        """Look at the files; this reads none of them."""
        self._path = path
        self._begun = time.time_ns()
        # A program can set mtime, for example when it unpacks an archive. It cannot set ctime, the
        # time of the last change.
        stats = [(str(file.resolve()), file.stat()) for file in source_files(path)]
        files = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats]
        self._contents = [facts[:3] for facts in files]
        self._last_change = max(s.st_ctime_ns for _, s in stats)
        self._file = cache / "surveys" / f"{short_digest(repr(files))}.json"
        self.file_bytes = sum(s.st_size for _, s in stats)

    def load(self) -> Survey | None:
        """Return the recorded survey; None: there is none, or it is damaged."""
        try:
            content = parse_json(self._file.read_text())
            survey = Survey(**content["survey"])
            return survey if content["crc32"] == _checksum(survey) else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def save(self, survey: Survey) -> None:
        """Record the survey of a pass that began after this object was made.

        Raises:
            InputError: a file has changed meanwhile.
        """
        # Not the times of the last change, which also change with permissions and links.
        if SurveyRecord(self._path, self._file.parent.parent)._contents != self._contents:
            raise changed_while_read(self._path)
        if self._begun - self._last_change > _CLOCK_TICK_NS:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial = self._file.with_suffix(f".{token_hex(4)}")
            partial.write_text(json.dumps({"survey": survey._asdict(), "crc32": _checksum(survey)}))
            partial.replace(self._file)


def changed_while_read(path: Path) -> InputError:
    """The error for a source whose content changed during a pass."""
    return InputError(f"{path} changed while it was read; run again.")


def short_digest(content: str) -> str:
    """Return 16 hex digits of a hash of a text."""
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _checksum(survey: Survey) -> int:
    return zlib.crc32(repr(survey).encode())
