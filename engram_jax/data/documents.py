"""Reads the documents of a source: JSON Lines, text, Parquet and ArrayRecord files."""

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple

from engram_jax.data.sources import ending_of, resolve_source, source_files
from engram_jax.errors import InputError
from engram_jax.files import has_name_twice, parse_json

_PART_BYTES = 1 << 20  # of a file, read at a time


class Document(NamedTuple):
    """A text and its title ("" if the source has none)."""

    text: str
    title: str = ""


def read_documents(
    name_or_path: str | Path, on_read: Callable[[int], object] = lambda size: None
) -> Iterator[Document]:
    """Read the documents of a source one by one, in the order of the file.

    - JSON Lines (plain, .gz, .xz, .zst): one object per line, with "text" and optionally "title".
      Blank lines are skipped.
    - Text: one file is one document.
    - Parquet: column "text" and optionally "title".
    - ArrayRecord: each record is a JSON object as above. If the first record of a file is not a
      JSON object, all of its records are UTF-8 text, and none may be such an object.
    - A folder: all such files in it and in its subfolders, sorted by path. Links are followed.

    Args:
        name_or_path: the source.
        on_read: is called with the size of each part of a file when it was read, compressed as it
            is. (Text, Parquet and ArrayRecord files are one part.)

    Raises:
        InputError: unknown source, unreadable or damaged file, invalid JSON, no "text", or text
            that is not UTF-8. The message names the file and the line or record.
    """
    for file in source_files(resolve_source(name_or_path)):
        match ending_of(file):
            case ".txt":
                yield _check(Document(_decode(_read(file), str(file))), str(file))
            case ".parquet":
                yield from _read_parquet(file)
            case ".array_record" | ".arrayrecord":
                yield from _read_array_record(file)
            case _:
                yield from _read_json_lines(file, on_read)
                continue
        on_read(file.stat().st_size)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}.") from error


def _read_json_lines(file: Path, on_read: Callable[[int], object]) -> Iterator[Document]:
    number = 0
    damaged: tuple[type[Exception], ...] = (lzma.LZMAError, EOFError, zlib.error)
    if file.suffix.lower() == ".zst":
        damaged += (_optional("zstandard", file).ZstdError,)
    try:
        for number, line in enumerate(_read_lines(file, on_read), 1):
            if line.strip():
                yield _parse(line, f"{file}, line {number}")
    except damaged as error:
        if "ictionary" in str(error):
            raise InputError(
                f"{file} was compressed with a dictionary, which is not supported; compress it "
                "again without one."
            ) from error
        raise InputError(
            f"{file} is damaged or cut short after line {number} ({error}); download it again."
        ) from error
    except OSError as error:  # includes gzip.BadGzipFile
        raise InputError(f"cannot read {file}: {error.strerror or error}.") from error


class _Counted(io.FileIO):
    """A file that tells the size of each part that is read."""

    def __init__(self, file: Path, on_read: Callable[[int], object]) -> None:
        super().__init__(file)
        self._on_read = on_read

    def readinto(self, buffer: Any) -> int | None:
        size = super().readinto(buffer)
        self._on_read(size or 0)
        return size


def _read_lines(file: Path, on_read: Callable[[int], object]) -> Iterator[bytes]:
    with io.BufferedReader(_Counted(file, on_read), _PART_BYTES) as content:
        match file.suffix.lower():
            case ".gz":
                with gzip.open(content) as lines:
                    yield from lines
            case ".xz":
                # Not lzma.open, because it ignores what it cannot read after the first stream.
                # Zeros may stand between streams.
                yield from _split_lines(_decompress(content, lzma.LZMADecompressor, b"\0"))
            case ".zst":
                # Not zstandard's own stream_reader: it does not detect a file that is cut short.
                zstandard = _optional("zstandard", file)
                decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
                yield from _split_lines(_decompress(content, decompressor.decompressobj))
            case _:
                yield from content


def _decompress(
    content: IO[bytes], begin_stream: Callable[[], Any], padding: bytes = b""
) -> Iterator[bytes]:
    """Yield the content of a file of one or more compressed streams, in parts."""
    stream = None
    while compressed := content.read(_PART_BYTES):
        while compressed := compressed if stream else compressed.lstrip(padding):
            stream = stream or begin_stream()
            yield stream.decompress(compressed)
            compressed = stream.unused_data if stream.eof else b""
            stream = None if stream.eof else stream
    if stream:
        raise EOFError("the last stream does not end")


def _split_lines(parts: Iterator[bytes]) -> Iterator[bytes]:
    line: list[bytes] = []
    for part in parts:
        *ends, rest = part.split(b"\n")
        for end in ends:
            yield b"".join([*line, end])
            line = []
        line.append(rest)
    yield b"".join(line)


def _read_parquet(file: Path) -> Iterator[Document]:
    parquet = _optional("pyarrow.parquet", file)
    arrow = _optional("pyarrow", file)
    row = 0
    try:
        with parquet.ParquetFile(file) as table:
            schema = table.schema_arrow
            columns = schema.names
            if "text" not in columns:
                raise InputError(
                    f'{file} has no column "text" (it has {", ".join(columns)}); rename the '
                    "column that holds the documents."
                )
            if columns.count("text") > 1:
                raise InputError(f'{file} has several columns "text"; rename all but one.')
            # Arrow has dates and times that Python does not have.
            times = [field.name for field in schema if arrow.types.is_temporal(field.type)]
            if "text" in times:
                raise InputError(f'{file} has dates in its column "text"; give it texts.')
            wanted = [name for name in ("text", "title") if name in columns and name not in times]
            for batch in table.iter_batches(columns=wanted, batch_size=1024):
                for record in batch.to_pylist():
                    row += 1
                    yield _document(record, f"{file}, row {row}")
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"cannot read {file} after row {row}: {error}.") from error


def _read_array_record(file: Path) -> Iterator[Document]:
    module = _optional("array_record.python.array_record_module", file)
    reader = module.ArrayRecordReader(str(file))
    # (A reader that failed to open also fails to close.)
    if not reader.ok():
        raise InputError(f"{file} is damaged or not an ArrayRecord file; write it again.")
    is_json = False
    for index in range(reader.num_records()):
        where = f"{file}, record {index}"
        try:
            (record,) = reader.read([index])
        except RuntimeError as error:
            raise InputError(f"{where}: damaged ({error}); write the file again.") from error
        if index == 0:
            is_json = _json_object(record) is not None
        if is_json:
            yield _parse(record, where)
        elif "text" in (_json_object(record) or {}):
            raise InputError(
                f'{where} is a JSON object with "text", but the first record of the file is plain '
                "text; write all records as JSON objects, or all as text."
            )
        else:
            yield _check(Document(_decode(record, where)), where)
    reader.close()


def _json_object(record: bytes) -> dict[str, Any] | None:
    try:
        text = record.removeprefix(b"\xef\xbb\xbf").lstrip()
        content = parse_json(text) if text.startswith(b"{") else None
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _parse(line: bytes, where: str) -> Document:
    text = _decode(line, where)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = getattr(error, "msg", str(error))
        at = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{where}: invalid JSON ({what}{at}); correct or remove it.") from error
    if isinstance(record, dict) and has_name_twice(text, "text"):
        raise InputError(f'{where}: it has "text" several times; rename all but one.')
    return _document(record, where)


def _document(record: Any, where: str) -> Document:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{where}: no string "text"; each document must be {{"text": "…"}}.')
    return _check(Document(text, str(record.get("title") or "")), where)


def _check(document: Document, where: str) -> Document:
    # JSON can contain half of a surrogate pair, which UTF-8 and tokenizers do not support.
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: the text has half of a surrogate pair; remove it.") from error
    return document


def _decode(content: bytes, where: str) -> str:
    if 4 * content.count(0) > len(content) > 1:
        raise InputError(
            f"{where}: it has many zero bytes, so it may be UTF-16; convert it to UTF-8."
        )
    try:
        return content.decode("utf-8-sig")  # some editors write a byte order mark first
    except UnicodeDecodeError as error:
        for ending, first in _FIRST_BYTES.items():
            if content.startswith(first):
                raise InputError(
                    f"{where}: its content is that of a file *{ending}; decompress or rename it."
                ) from error
        raise InputError(f"{where}: not UTF-8 ({error}); convert it.") from error


_FIRST_BYTES = {
    ".jsonl.gz": b"\x1f\x8b",
    ".jsonl.xz": b"\xfd7zXZ",
    ".jsonl.zst": b"\x28\xb5\x2f\xfd",
    ".parquet": b"PAR1",
}


def _optional(module: str, file: Path) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0].replace("_", "-")
        raise InputError(f"{file} needs the package {package}: pip install {package}.") from error
