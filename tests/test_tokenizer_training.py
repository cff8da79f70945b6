import json
import subprocess
import sys
from pathlib import Path

import pytest

from engram_jax.errors import InputError
from engram_jax.tokenizer import load_tokenizer
from engram_jax.tokenizer_sentencepiece import SentencePieceTokenizer
from engram_jax.tokenizer_training import main, train_tokenizer

TEXTS = ["the cat and the hat", "the rat sat on the mat", "tab\tand ▅ block and ▁ mark"] * 5


def test_training_is_deterministic_and_lossless() -> None:
    model = train_tokenizer(TEXTS, 290)
    assert model == train_tokenizer(TEXTS, 290)
    tokenizer = SentencePieceTokenizer(model, "toy.model")
    assert tokenizer.vocab_size == 290
    # A document with a character that SentencePiece reserves is not skipped.
    assert "b" in [tokenizer.piece(i) for i in range(260, 290)]
    for text in [*TEXTS, "\u2581<s> été 中文\0"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("texts", "size", "name"),
    [
        (["", ""], 300, "no text"),
        (TEXTS, 100_000, "at most"),
        (TEXTS, 261, "cannot hold"),
        (TEXTS, -5, "-5"),
    ],
)
def test_training_that_cannot_work(texts: list[str], size: int, name: str) -> None:
    with pytest.raises(InputError) as error:
        train_tokenizer(texts, size)
    message = str(error.value)
    assert name in message and "\n" not in message and message.endswith("."), message


def write_source(folder: Path) -> Path:
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return source


def test_train_command(tmp_path: Path) -> None:
    out = tmp_path / "toy.model"
    command = [sys.executable, "-m", "engram_jax.tokenizer_training", str(out), "--vocab-size"]
    command += ["280", "--sources", str(write_source(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "bytes per token" in done.stdout
    assert "reading" in done.stderr and "15 documents" in done.stderr
    assert load_tokenizer(out).vocab_size == 280
    assert str(tmp_path).encode() not in out.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl", "toy.model"]

    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1 and "toy.model exists" in again.stderr


def test_train_command_takes_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_source(tmp_path)
    command = [str(tmp_path / "a.model"), "--vocab-size", "285"]
    main([*command, "--sources", str(source), str(source), "--shares", "0.2", "1"])
    lines = capsys.readouterr().out.splitlines()
    total = sum(len(text.encode()) for text in TEXTS)
    assert f"{total:,} of {total:,} bytes" in lines[1]
    # Every fifth document: the 5th, 10th and 15th, one of each kind.
    assert f"{total // 5:,} of {total:,} bytes" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["a.txt", "--sources", "texts.jsonl"], "a.txt"),
        (["nowhere/a.model", "--sources", "texts.jsonl"], "nowhere"),
        (["a.model", "--sources", "missing.jsonl"], "missing.jsonl"),
        (["a.model", "--sources", "empty.jsonl"], "empty.jsonl"),
        (["a.model", "--sources", "texts.jsonl", "--shares", "0.5", "0.5"], "0.5 0.5"),
        (["a.model", "--sources", "texts.jsonl", "--shares", "0"], "--shares 0"),
        (["a.model", "--sources", "texts.jsonl", "--vocab-size", "200"], "200"),
        (["a.model", "--sources", "texts.jsonl", "--vocab-size", "-5"], "-5"),
        (["a.model", "--sources", "texts.jsonl", "--vocab-size", "ten"], "--vocab-size: invalid"),
        (["a.model", "--source", "texts.jsonl"], "--source"),
        ([], "--sources"),
    ],
)
def test_train_command_with_bad_input(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    name: str,
) -> None:
    write_source(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    errors = capsys.readouterr().err
    assert "│" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("error: ") and name in last
    assert not list(tmp_path.glob("*.model*"))
