import errno
import json
import os
import pickle
import shutil
import threading
import time
from collections import namedtuple

import numpy as np
import pytest
from small_corpora import ByteTokenizer, random_texts, write_jsonl

from engram_jax import files
from engram_jax.data import documents, survey
from engram_jax.data.corpus import COLUMNS
from engram_jax.data.token_cache import build_corpus
from engram_jax.errors import InputError

TEXTS = random_texts(300, 30)


def texts_of(view):
    return [ByteTokenizer().decode(view.tokens(document)) for document in range(len(view))]


def refuse_to_lock(*_):
    raise OSError(errno.ENOTSUP, "no locks here")


@pytest.fixture
def no_clock_tick(monkeypatch):
    """A source counts as unchanged right after it was written."""
    monkeypatch.setattr(survey, "_CLOCK_TICK_NS", -(10**18))


def test_a_corpus_holds_every_text_between_bos_and_eos(corpus_of):
    texts = ["plain", "Größe 🙂", "x" * 1000]
    corpus = corpus_of(texts)
    assert texts_of(corpus.train) == texts
    for document, text in enumerate(texts):
        tokens = corpus.train.tokens(document)
        assert tokens[0] == ByteTokenizer.bos_id and tokens[-1] == ByteTokenizer.eos_id
        assert len(tokens) == corpus.train.lengths[document] == len(text.encode()) + 2
        assert corpus.train.byte_lengths[document] == len(text.encode())
    assert corpus.train.token_count == corpus.manifest.tokens == corpus.ids.size
    assert corpus.manifest.text_bytes == corpus.train.byte_lengths.sum()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), (1 << 16 | 1, np.int32)])
def test_ids_take_two_bytes_where_they_fit(tmp_path, vocab_size, dtype):
    class Wide(ByteTokenizer):
        def encode(self, text):
            return np.full(3, vocab_size - 1, np.int32)

    tokenizer = Wide()
    tokenizer.vocab_size = vocab_size
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    corpus = build_corpus(path, tokenizer, tmp_path, 0.0)
    assert corpus.ids.dtype == dtype
    assert corpus.train.tokens(0).tolist() == [1, *[vocab_size - 1] * 3, 2]


@pytest.fixture
def reads(monkeypatch):
    """The sources that were read, once for each pass."""
    begun = []

    def read(path, *progress):
        begun.append(path)
        return documents.read_documents(path, *progress)

    monkeypatch.setattr(survey, "read_documents", read)
    return begun


@pytest.mark.usefixtures("no_clock_tick")
def test_a_source_is_read_once_unless_that_may_save_a_tokenization(tmp_path, tokenizer, reads):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)

    def passes(path, tokenizer, held_out=0.05):
        del reads[:]
        build_corpus(path, tokenizer, tmp_path / "cache", held_out)
        return len(reads)

    assert passes(path, tokenizer) == 1
    assert passes(path, tokenizer, held_out=0.5) == 0
    assert passes(path, ByteTokenizer("another")) == 1
    os.utime(path)  # another time, or another place, and the same content
    assert passes(path, tokenizer) == 1
    (tmp_path / "copy").mkdir()
    assert passes(shutil.copy(path, tmp_path / "copy"), tokenizer) == 1
    assert tokenizer.encoded == len(TEXTS)
    assert passes(write_jsonl(path, TEXTS[1:]), tokenizer) == 2  # the cache has its name
    assert passes(write_jsonl(tmp_path / "a-b.jsonl", TEXTS), tokenizer) == 1


def test_a_source_that_changes_during_its_only_pass_is_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)

    class Slow(ByteTokenizer):
        def encode_batch(self, texts):
            write_jsonl(path, [*TEXTS, "more"])
            return super().encode_batch(texts)

    with pytest.raises(InputError, match="changed while it was read"):
        build_corpus(path, Slow(), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("a-*/"))
    assert texts_of(build_corpus(path, tokenizer, tmp_path / "cache", 0.0).train)[-1] == "more"


@pytest.mark.usefixtures("no_clock_tick")
def test_a_source_that_changes_after_its_survey_is_refused(tmp_path, tokenizer, monkeypatch):
    """Also if its size and time stay."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    build_corpus(path, tokenizer, tmp_path / "cache")
    times = path.stat()

    def change(_):
        write_jsonl(path, [TEXTS[0][::-1], *TEXTS[1:]])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        return namedtuple("usage", "free")(1 << 40)

    monkeypatch.setattr(shutil, "disk_usage", change)
    with pytest.raises(InputError, match="changed while it was read"):
        build_corpus(path, ByteTokenizer("another"), tmp_path / "cache")


@pytest.mark.usefixtures("no_clock_tick")
def test_a_changed_text_of_equal_size_and_time_is_read_again(tmp_path, tokenizer):
    """Like `touch -r`, and files of an archive."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first, times = build_corpus(path, tokenizer, tmp_path / "cache"), path.stat()
    write_jsonl(path, [TEXTS[0][::-1], *TEXTS[1:]])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    assert build_corpus(path, tokenizer, tmp_path / "cache").folder != first.folder


@pytest.mark.usefixtures("no_clock_tick")
@pytest.mark.parametrize("content", ["", "null", "{", '{"documents": 1}', "garbled"])
def test_a_damaged_survey_is_made_again(tmp_path, tokenizer, content):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = build_corpus(path, tokenizer, tmp_path / "cache")
    (record,) = (tmp_path / "cache" / "surveys").iterdir()
    if content == "garbled":  # valid JSON, with another number
        content = record.read_text().replace('"text_bytes": ', '"text_bytes": 9')
    record.write_text(content)
    assert build_corpus(path, tokenizer, tmp_path / "cache").folder == first.folder
    assert json.loads(record.read_text())["survey"]["documents"] == len(TEXTS)


def test_ids_that_were_overwritten_are_refused(tmp_path, tokenizer):
    """Their size is that of the manifest."""
    path = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    ids = build_corpus(path, tokenizer, tmp_path / "cache").folder / "ids.bin"
    whole = ids.read_bytes()
    for other in (bytes(len(whole)), whole[2:] + whole[:2], whole[: len(whole) // 2] * 2):
        ids.write_bytes(other)
        with pytest.raises(InputError, match=r"ids\.bin.*overwritten"):
            build_corpus(path, tokenizer, tmp_path / "cache")


@pytest.mark.parametrize("name", COLUMNS)
def test_a_flipped_bit_of_a_column_is_found(tmp_path, tokenizer, name):
    path = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    file = build_corpus(path, tokenizer, tmp_path / "cache").folder / f"{name}.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(content)
    with pytest.raises(InputError, match="another checksum"):
        build_corpus(path, tokenizer, tmp_path / "cache")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dtype": "uint17"}, "uint17"), ({"crc32": None, "tokens": "x"}, "complete|multiply")],
)
def test_a_manifest_that_was_edited_is_one_sentence(tmp_path, tokenizer, change, message):
    path = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    manifest = build_corpus(path, tokenizer, tmp_path / "cache").folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(InputError, match=message):
        build_corpus(path, tokenizer, tmp_path / "cache")


def test_a_source_with_a_name_of_230_bytes(tmp_path, tokenizer):
    name = "ü" * 115
    corpus = build_corpus(
        write_jsonl(tmp_path / f"{name}.jsonl", TEXTS), tokenizer, tmp_path / "cache", 0.0
    )
    assert corpus.name == name and texts_of(corpus.train) == TEXTS


@pytest.mark.parametrize("name", ["offsets", "byte_lengths", "hashes"])
@pytest.mark.parametrize("damage", ["missing", "empty", "short", "typed", "header"])
def test_a_damaged_column_of_the_cache_is_named(tmp_path, tokenizer, name, damage):
    """Also in a cache of an earlier version, which has no checksum."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    folder = build_corpus(path, tokenizer, tmp_path / "cache").folder
    file, manifest = folder / f"{name}.npy", json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"crc32": None}))
    column, content = np.load(file), file.read_bytes()
    file.unlink()
    if damage == "empty":
        file.touch()
    elif damage == "header":
        file.write_bytes(content.replace(b"}", b"{", 1))
    elif damage != "missing":
        np.save(file, column[:-1] if damage == "short" else column.astype(np.float32))
    with pytest.raises(InputError, match=r"delete it, and run again"):
        build_corpus(path, tokenizer, tmp_path / "cache")


def test_another_text_or_tokenizer_is_another_corpus(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = build_corpus(path, tokenizer, tmp_path / "cache")
    # Equal length, and an equal time on a file system with a coarse clock.
    write_jsonl(path, [TEXTS[0][::-1] + "!", *TEXTS[1:]])
    changed = build_corpus(path, tokenizer, tmp_path / "cache")
    retokenized = build_corpus(path, ByteTokenizer("another"), tmp_path / "cache")
    assert len({first.folder, changed.folder, retokenized.folder}) == 3
    assert texts_of(changed.train) != texts_of(first.train)


def test_held_out_documents_depend_on_their_text_alone(corpus_of):
    whole = corpus_of(TEXTS, held_out=0.3)
    held_out = set(texts_of(whole.held_out))
    assert set(texts_of(whole.train)).isdisjoint(held_out)
    assert set(texts_of(whole.train)) | held_out == set(TEXTS)
    assert 0.2 * len(TEXTS) < len(held_out) < 0.4 * len(TEXTS)
    shuffled_with_others = [*random_texts(50, 30, seed=1), *TEXTS[::-2], *TEXTS[:10]]
    other = corpus_of(shuffled_with_others, held_out=0.3, name="other")
    for text in texts_of(other.held_out):
        assert text not in TEXTS or text in held_out
    for text in texts_of(other.train):
        assert text not in held_out
    smaller = corpus_of(TEXTS, held_out=0.1)
    assert set(texts_of(smaller.held_out)) < held_out


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (1.0, len(TEXTS))])
def test_nothing_or_everything_may_be_held_out(corpus_of, share, count):
    corpus = corpus_of(TEXTS, held_out=share)
    assert len(corpus.held_out) == count and len(corpus.train) == len(TEXTS) - count


def test_a_corpus_is_pickled_as_its_path(corpus_of):
    corpus = corpus_of(TEXTS, held_out=0.3)
    pickled = pickle.dumps((corpus, corpus.held_out))
    assert len(pickled) < 1000
    again, view = pickle.loads(pickled)
    assert np.array_equal(again.ids, corpus.ids)
    assert texts_of(view) == texts_of(corpus.held_out)
    sample = corpus.held_out.by_hash()
    assert texts_of(pickle.loads(pickle.dumps(sample))) == texts_of(sample) != texts_of(view)


def kill_a_build(path, cache, monkeypatch):
    """The folder that a build leaves after a SIGKILL, without cleaning up."""

    class Killed(ByteTokenizer):
        def encode_batch(self, texts):
            if self.encoded:
                raise KeyboardInterrupt
            return super().encode_batch(texts)

    monkeypatch.setattr(survey, "_CHUNK_BYTES", 100)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        build_corpus(path, Killed(), cache)
    (partial,) = cache.glob("*.partial")
    return partial


def test_another_hosts_build_stays_whatever_the_clock_here_says(tmp_path, tokenizer, monkeypatch):
    """On a shared file system without locks, the build of another host may be going on."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    partial = kill_a_build(path, tmp_path / "cache", monkeypatch)
    monkeypatch.setattr(files.fcntl, "flock", refuse_to_lock)
    tomorrow = time.time() + 86_400
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: tomorrow)
        built = build_corpus(path, tokenizer, tmp_path / "cache", 0.0)
    assert texts_of(built.train) == TEXTS and partial.exists()


@pytest.mark.parametrize("locking", [True, False])
def test_a_killed_build_leaves_nothing_that_is_used(tmp_path, tokenizer, monkeypatch, locking):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    partial = kill_a_build(path, tmp_path / "cache", monkeypatch)
    for file in [*partial.iterdir(), partial]:
        os.utime(file, (time.time() - (100 if locking else 4000),) * 2)
    if not locking:
        monkeypatch.setattr(files.fcntl, "flock", refuse_to_lock)
    assert texts_of(build_corpus(path, tokenizer, tmp_path / "cache", 0.0).train) == TEXTS
    assert not partial.exists()


@pytest.mark.usefixtures("no_clock_tick")
@pytest.mark.parametrize("locking", [True, False])
def test_two_builds_at_once_give_one_corpus(tmp_path, monkeypatch, locking, reads):
    if not locking:
        monkeypatch.setattr(files.fcntl, "flock", refuse_to_lock)
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    barrier = threading.Barrier(2)
    tokenizers = [ByteTokenizer(), ByteTokenizer()]
    results = []

    def build(tokenizer):
        barrier.wait()
        results.append(texts_of(build_corpus(path, tokenizer, tmp_path / "cache", 0.0).train))

    threads = [threading.Thread(target=build, args=(tokenizer,)) for tokenizer in tokenizers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [TEXTS, TEXTS]
    if locking:
        assert sorted(tokenizer.encoded for tokenizer in tokenizers) == [0, len(TEXTS)]
        assert len(reads) == 1  # the other waits, and reads nothing
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_document_of_two_megabytes(tmp_path, tokenizer):
    text = "".join(chr(ord("a") + i % 26) for i in range(2_000_000))
    (tmp_path / "a.txt").write_text(text)
    corpus = build_corpus(tmp_path / "a.txt", tokenizer, tmp_path / "cache", 0.0)
    assert texts_of(corpus.train) == [text]


def test_files_of_a_folder_that_are_not_read_are_told(tmp_path, tokenizer, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", ["one", "two"])
    for name in ("b.json", "c.md", "d.csv", "e"):
        (folder / name).write_text("x")
    build_corpus(folder, tokenizer, tmp_path / "cache", 0.0)
    assert "folder: 1 files are read, and 4 are not" in (told := capsys.readouterr().err)
    assert "b.json (the ending of its name), c.md (the ending of its name), d.csv" in told


def test_empty_documents_are_left_out_and_told(tmp_path, tokenizer, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "", " \n", "two"])
    corpus = build_corpus(path, tokenizer, tmp_path / "cache", 0.0)
    assert texts_of(corpus.train) == ["one", "two"]
    assert "a: skipped 2 empty documents" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", '{"text": ""}\n{"text": "  "}\n'])
def test_an_empty_corpus_is_refused(tmp_path, tokenizer, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"a\.jsonl holds no text"):
        build_corpus(tmp_path / "a.jsonl", tokenizer, tmp_path / "cache")


def test_a_broken_line_leaves_nothing_behind(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(survey, "_CHUNK_BYTES", 100)
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    path.write_text(path.read_text() + '{"text": ')
    with pytest.raises(InputError, match=f"line {len(TEXTS) + 1}: invalid JSON"):
        build_corpus(path, tokenizer, tmp_path / "cache")
    assert tokenizer.encoded and not list((tmp_path / "cache").glob("a-*/"))


def test_an_id_outside_the_vocabulary_is_refused(tmp_path, tokenizer):
    tokenizer.vocab_size = 100
    path = write_jsonl(tmp_path / "a.jsonl", ["~"])
    with pytest.raises(InputError, match="outside its vocabulary of 100"):
        build_corpus(path, tokenizer, tmp_path / "cache")


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_between_nothing_and_all(tmp_path, tokenizer, share):
    with pytest.raises(InputError, match="held_out"):
        build_corpus("austen", tokenizer, tmp_path, share)


def test_a_disk_without_room_is_refused_before_tokenizing(tmp_path, tokenizer, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free=1000))
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 100_000])
    with pytest.raises(InputError, match=r"cache is full: .* about 50,024 bytes.*1,000 are free"):
        build_corpus(path, tokenizer, tmp_path / "cache")
    assert tokenizer.encoded == 0


def test_a_disk_that_may_be_too_small_is_compared_with_the_exact_size(
    tmp_path, tokenizer, monkeypatch, reads
):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free=50_024))
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 100_000])
    build_corpus(path, tokenizer, tmp_path / "cache")
    assert len(reads) == 2


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, tokenizer, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left"):
        patch.setattr(np, "save", full)
        build_corpus(path, tokenizer, tmp_path / "cache")
    assert not [entry for entry in (tmp_path / "cache").glob("a-*") if entry.is_dir()]
    assert texts_of(build_corpus(path, tokenizer, tmp_path / "cache", 0.0).train) == TEXTS


def test_a_cache_that_cannot_be_written_is_named(tmp_path, tokenizer):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"cannot write the token cache .*cache"):
        build_corpus("austen", tokenizer, tmp_path / "cache")


def test_a_damaged_cache_is_named(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    folder = build_corpus(path, tokenizer, tmp_path / "cache").folder
    with (folder / "ids.bin").open("ab") as file:
        file.truncate(100)
    with pytest.raises(InputError, match=f"delete {folder}"):
        build_corpus(path, tokenizer, tmp_path / "cache")
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="delete it"):
        build_corpus(path, tokenizer, tmp_path / "cache")
