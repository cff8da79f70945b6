import gzip
import json
import lzma
import os
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from engram_jax.data import documents, sources
from engram_jax.data.documents import Document, read_documents
from engram_jax.data.sources import resolve_source, shipped_corpora, source_names
from engram_jax.errors import InputError

DOCUMENTS = [
    Document("One line.", "first"),
    Document("Two\nlines,\u2028and a separator that str.splitlines would cut at.", ""),
    Document("Größe 語 🙂\r\n\n  spaces  ", "third"),
]
LINES = "\n".join(json.dumps(document._asdict()) for document in DOCUMENTS).encode()


def write_array_record(path: Path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:2")
    for record in records:
        writer.write(record)
    writer.close()


def write_documents(path: Path) -> None:
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES))
    elif path.name.endswith(".xz"):
        path.write_bytes(lzma.compress(LINES))
    elif path.name.endswith(".zst"):
        middle = len(LINES) // 2  # two frames, as parallel compressors write
        frames = [zstandard.compress(part) for part in (LINES[:middle], LINES[middle:])]
        path.write_bytes(b"".join(frames))
    elif path.suffix == ".parquet":
        rows = [document._asdict() | {"other": 1} for document in DOCUMENTS]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".array_record", ".arrayrecord"):
        write_array_record(path, LINES.split(b"\n"))
    else:
        path.write_bytes(b"\n" + LINES + b"\n\n")


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet", "a.array_record"],
)
def test_every_format_gives_back_what_was_written(tmp_path, name):
    write_documents(tmp_path / name)
    sizes: list[int] = []
    assert list(read_documents(tmp_path / name, sizes.append)) == DOCUMENTS
    assert sum(sizes) == (tmp_path / name).stat().st_size


def test_a_text_file_is_one_document_and_a_folder_holds_one_a_file(tmp_path):
    for number, document in enumerate(DOCUMENTS):
        folder = tmp_path / str(number % 2)
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.txt").write_bytes(document.text.encode())
    (tmp_path / "notes.md").write_text("not read")
    assert [document.text for document in read_documents(tmp_path / "0" / "2.txt")] == [
        DOCUMENTS[2].text
    ]
    in_order_of_paths = [DOCUMENTS[0].text, DOCUMENTS[2].text, DOCUMENTS[1].text]
    assert [document.text for document in read_documents(tmp_path)] == in_order_of_paths


def test_array_records_may_be_plain_text(tmp_path):
    records = ["Größe", '{"a": "kept"}', '{"text": "kept}', '"text"', "{" + '"a":[' * 10_000]
    write_array_record(tmp_path / "a.arrayrecord", [record.encode() for record in records])
    assert [document.text for document in read_documents(tmp_path / "a.arrayrecord")] == records


def test_array_records_may_begin_with_a_byte_order_mark(tmp_path):
    write_array_record(tmp_path / "a.arrayrecord", [b'\xef\xbb\xbf {"text": "a"}'] * 2)
    assert list(read_documents(tmp_path / "a.arrayrecord")) == [Document("a")] * 2


@pytest.mark.parametrize("text", [b"Text", b"", b'"text"', b'{"text": "cut', b"[" * 10_000])
@pytest.mark.parametrize("is_first", [False, True])
def test_array_records_of_two_types_are_refused(tmp_path, text, is_first):
    record = b'{"text": "an object"}'
    records = [text, record, record] if is_first else [record, record, text]
    write_array_record(tmp_path / "a.arrayrecord", records)
    with pytest.raises(InputError, match=r"a\.arrayrecord, record \d\b.*(JSON|text)"):
        list(read_documents(tmp_path / "a.arrayrecord"))


# The counts are from the description of the corpora.
@pytest.mark.parametrize(
    ("name", "documents", "text_bytes"),
    [
        ("vital_en", 10_014, 4_884_265),
        ("factbook", 2_410, 6_014_942),
        ("web_bible", 124, 5_046_880),
        ("austen", 270, 4_023_723),
        pytest.param("wordnet", 110_211, 11_134_986, marks=pytest.mark.slow),
    ],
)
def test_shipped_corpora_are_complete(name, documents, text_bytes):
    sizes = [len(document.text.encode()) for document in read_documents(name)]
    assert (len(sizes), sum(sizes)) == (documents, text_bytes)


def test_attribution_names_every_shipped_corpus():
    attribution = (Path(__file__).parents[2] / "ATTRIBUTION").read_text()
    assert len(shipped_corpora()) == 5
    assert all(name in attribution for name in shipped_corpora())
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in attribution


def test_an_unknown_source_is_told_the_names_and_endings_that_work(tmp_path):
    for wrong in ("vital-en", str(tmp_path / "missing.jsonl")):
        with pytest.raises(InputError, match=r"vital_en.*\.jsonl\.zst"):
            resolve_source(wrong)
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(InputError, match=r"a\.csv.*\.parquet"):
        resolve_source(tmp_path / "a.csv")
    with pytest.raises(InputError, match="holds no file"):
        resolve_source(tmp_path)


def test_a_folder_is_read_with_its_links_and_capitals(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for place in (folder, elsewhere / "deep"):
        place.mkdir(parents=True)
    write_documents(elsewhere / "deep" / "a.jsonl")
    write_documents(folder / "B.JSONL")
    (folder / "notes.md").write_text("notes")
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)  # a loop
    files, others = sources.scan(folder)
    assert [file.name for file in files] == ["B.JSONL", "a.jsonl"]
    assert [file.name for file in others] == ["notes.md"]
    os.mkfifo(folder / "pipe.jsonl")
    os.link(folder / "B.JSONL", folder / "C.jsonl")
    (folder / "D.jsonl").symlink_to("B.JSONL")
    (folder / "linked" / "deep" / "b.txt").symlink_to(elsewhere / "deep" / "a.jsonl")
    assert sources.scan(folder)[0] == files
    assert [(file.name, why) for file, why in sources.scan(folder)[1].items()] == [
        ("C.jsonl", "the same file as B.JSONL"),
        ("D.jsonl", "the same file as B.JSONL"),
        ("b.txt", "the same file as linked/deep/a.jsonl"),
        ("notes.md", "the ending of its name"),
        ("pipe.jsonl", "no regular file"),
    ]
    assert list(read_documents(folder)) == DOCUMENTS * 2
    assert sources.source_name(folder / "B.JSONL") == "B"
    (folder / "named.jsonl").symlink_to(elsewhere / "deep" / "a.jsonl")
    assert sources.source_name(folder / "named.jsonl") == "named"
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"gone\.txt is a link to a file that does not exist"):
        list(read_documents(folder))


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Simulated, because root may read everything."""
    write_documents(tmp_path / "a.jsonl")

    def walk(top, onerror, **_):
        onerror(PermissionError(13, "Permission denied", str(tmp_path / "closed")))
        yield

    monkeypatch.setattr(sources.os, "walk", walk)
    with pytest.raises(InputError, match=r"closed: Permission denied"):
        resolve_source(tmp_path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    """The log of metrics could not hold it."""
    write_documents(tmp_path / "caf\udce9.jsonl")
    with pytest.raises(InputError, match="not UTF-8"):
        resolve_source(tmp_path / "caf\udce9.jsonl")


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_no_source(name: str, tmp_path, monkeypatch):
    """As a path it would be the current folder."""
    write_documents(tmp_path / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="empty name"):
        resolve_source(name)


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        (b'{"text": "cut', "invalid JSON"),
        (b'{"text": ' + b"[" * 100_000, "invalid JSON"),
        (b'{"body": "x"}', 'no string "text"'),
        (b'{"text": null}', 'no string "text"'),
        (b'["text"]', 'no string "text"'),
        (b'{"text": "one", "text": "two"}', '"text" several times'),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path, second_line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + second_line + b"\n")
    with pytest.raises(InputError, match=f"a.jsonl, line 2: .*{message}"):
        list(read_documents(tmp_path / "a.jsonl"))


def test_the_name_text_inside_of_a_document_is_no_second_text(tmp_path):
    record = {"text": 'the key "text"', "other": {"text": 1}, "title": "text"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    assert list(read_documents(tmp_path / "a.jsonl")) == [Document('the key "text"', "text")]


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.xz", "jsonl.zst", "parquet", "array_record"])
def test_a_file_that_was_cut_short_is_no_complete_file(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    write_documents(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a\."):
        list(read_documents(path))


def test_later_streams_of_an_xz_file_are_read_or_refused(tmp_path):
    """With the zeros that may stand between streams, and not with damage."""
    lines = [json.dumps({"text": f"text {number} " * 50}).encode() for number in range(40)]
    one, other = (lzma.compress(b"\n".join(part) + b"\n") for part in (lines[:20], lines[20:]))
    path = tmp_path / "a.jsonl.xz"
    for padding in (b"", bytes(4), bytes(8)):
        path.write_bytes(one + padding + other + padding)
        assert len(list(read_documents(path))) == 40
    damaged = bytearray(other)
    damaged[len(other) // 2] ^= 0xFF
    for wrong in (one + damaged, one + b"garbage", one + other[:-9]):
        path.write_bytes(wrong)
        with pytest.raises(InputError, match="damaged or cut short"):
            list(read_documents(path))


def test_a_zstandard_file_of_a_large_window_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    stream = compressor.compressobj()
    content = stream.compress(b'{"text": "a"}\n') + stream.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    assert list(read_documents(tmp_path / "a.jsonl.zst")) == [Document("a")]


def test_a_long_line_takes_time_in_proportion():
    """A line in many parts is joined once."""
    parts = [b"x" * 10] * 5 + [b"y\nz", b"", b"\n\n"]
    lines = list(documents._split_lines(iter(parts)))
    assert lines == [b"x" * 50 + b"y", b"z", b"", b""]
    start = time.process_time()
    (line,) = documents._split_lines(iter([b"x" * 1000] * 100_000))
    assert len(line) == 10**8 and time.process_time() - start < 2


def test_a_zstandard_file_cut_at_a_line_is_no_complete_file(tmp_path):
    compressor = zstandard.ZstdCompressor().compressobj()
    part = compressor.compress(LINES + b"\n") + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (tmp_path / "a.jsonl.zst").write_bytes(part)
    with pytest.raises(InputError, match="damaged or cut short after line 3"):
        list(read_documents(tmp_path / "a.jsonl.zst"))


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.xz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("wrong", [".jsonl", ".txt"])
def test_a_compressed_file_without_its_ending_is_told_it(tmp_path, ending, wrong):
    path = tmp_path / f"a.{ending}"
    write_documents(path)
    path.rename(tmp_path / f"a{wrong}")
    with pytest.raises(InputError, match=rf"a\{wrong}.* of a file \*\.{ending}; decompress or"):
        list(read_documents(tmp_path / f"a{wrong}"))


def test_a_zstandard_file_with_a_dictionary_is_refused(tmp_path):
    random = np.random.default_rng(0)
    samples = [random.bytes(8).hex().encode() * 4 for _ in range(200)]
    compressor = zstandard.ZstdCompressor(dict_data=zstandard.train_dictionary(1000, samples))
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(LINES))
    with pytest.raises(InputError, match=r"a\.jsonl\.zst was compressed with a dictionary"):
        list(read_documents(tmp_path / "a.jsonl.zst"))


def test_a_parquet_file_without_texts_is_told_its_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r'no column "text" \(it has body\)'):
        list(read_documents(tmp_path / "a.parquet"))


def test_a_title_that_is_no_text_is_left_out(tmp_path):
    """Dates and times of Arrow that Python does not have were tracebacks."""
    for kind in (pyarrow.date32(), pyarrow.timestamp("ns"), pyarrow.timestamp("us")):
        number = 2**31 - 1 if kind == pyarrow.date32() else 2**62
        title = pyarrow.array([number], pyarrow.int32() if number < 2**32 else pyarrow.int64())
        table = pyarrow.table({"text": ["x"], "title": title.cast(kind)})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        assert list(read_documents(tmp_path / "a.parquet")) == [Document("x", "")]
    times = pyarrow.array([1], pyarrow.int64()).cast(pyarrow.timestamp("ns"))
    pyarrow.parquet.write_table(pyarrow.table({"text": times}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet has dates in its column"):
        list(read_documents(tmp_path / "a.parquet"))
    titles = pyarrow.array(["t", "t"]).dictionary_encode()
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["x", "y"], "title": titles}), tmp_path / "a.parquet"
    )
    assert [title for _, title in read_documents(tmp_path / "a.parquet")] == ["t", "t"]


def test_utf16_without_a_mark_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("A text in UTF-16.".encode("utf-16-le"))
    with pytest.raises(InputError, match=r"a\.txt: it has many zero bytes, so it may be UTF-16"):
        list(read_documents(tmp_path / "a.txt"))


def test_a_parquet_file_with_two_columns_of_texts_is_refused(tmp_path):
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    table = pyarrow.Table.from_arrays(columns, names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match='several columns "text"'):
        list(read_documents(tmp_path / "a.parquet"))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    write_documents(tmp_path / "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        list(read_documents(tmp_path / "a.parquet"))


def test_sources_of_one_name_are_called_by_the_folders_that_distinguish_them(tmp_path):
    paths = ["/a/en/train.jsonl", "/b/en/train.txt", "/a/de/train.jsonl", "/a/test.jsonl.xz"]
    names = ["a/en/train", "b/en/train", "de/train", "test"]
    assert source_names([Path(path) for path in paths]) == names
    assert source_names([Path("x/en"), Path("y/en")]) == ["x/en", "y/en"]
    for same in (["a/en.txt"] * 2, ["/a/en.txt", "/a/en.jsonl"]):
        with pytest.raises(InputError, match="Two sources are called 'en'"):
            source_names([Path(path) for path in same])
    (tmp_path / "folder").mkdir()
    write_documents(tmp_path / "folder" / "a.jsonl")
    (tmp_path / "linked.jsonl").symlink_to("folder/a.jsonl")
    for pair in (["folder", "folder/a.jsonl"], ["linked.jsonl", "folder"]):
        with pytest.raises(InputError, match=r"is also in the source .*; remove one of them"):
            source_names([tmp_path / name for name in pair])
    with pytest.raises(InputError, match="'all sources'; rename"):
        source_names([Path("all sources.txt")])
