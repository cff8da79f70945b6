"""The command: prompts from the command line, a file, a pipe and a person; bad input."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from engram_jax import generate
from engram_jax.decoding import batches
from engram_jax.decoding.text import Continuation, GrowingText
from engram_jax.errors import InputError
from engram_jax.generate import main
from engram_jax.run import Run


@pytest.fixture
def folder(untrained) -> str:
    return str(untrained("engram").folder)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b"")


def pipe(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """A standard input that is no terminal."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """A terminal on which a person types lines, or presses keys."""
    waiting = iter([*lines, EOFError])

    def ask(_: str) -> str:
        line = next(waiting)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)


def test_a_prompt_is_continued_and_its_speed_printed(folder: str, capsys) -> None:
    main([folder, "Alexander the", "--tokens", "5", "--temperature", "0"])
    printed = capsys.readouterr()
    expected = Run.open(Path(folder)).generate(["Alexander the"], tokens=5, temperature=0.0)
    assert printed.out == f"Alexander the|{expected[0].text}\n"
    assert "Prompt: " in printed.err and "tokens/s. It has all --tokens." in printed.err


def test_prompts_of_a_file_as_json(folder: str, tmp_path, capsys) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the"}\n\n{"prompt": "東京"}\n')
    flags = ["--tokens", "4", "--json", "--compare-without-memory", "--seed", "3"]
    main([folder, "--prompts-file", str(prompts), *flags])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["number"], line["prompt"]) for line in lines] == [(1, "the"), (2, "東京")]
    for line in lines:
        assert line["reason"] in ("length", "end")
        assert len(line["tokens"]) == len(line["log_probabilities"]) <= 4
        assert line["without_memory"].keys() == line.keys() - {"number", "prompt", "without_memory"}
    assert lines[0]["without_memory"]["tokens"] != lines[0]["tokens"]


def test_each_line_of_a_pipe_is_a_prompt(folder: str, monkeypatch, capsys) -> None:
    pipe(monkeypatch, "\n東\u2028京 the\r\n \nAlexander\n".encode())
    main([folder, "--tokens", "3", "--json"])
    lines = map(json.loads, capsys.readouterr().out.split("\n")[:-1])
    assert [line["prompt"] for line in lines] == ["東\u2028京 the", "Alexander"]
    pipe(monkeypatch, b"the\n\xff")
    with pytest.raises(InputError, match="The standard input is not UTF-8"):
        main([folder])


def test_results_are_printed_after_each_batch(folder: str, monkeypatch, capsys) -> None:
    """The longest prompt is first; numbers and seeds are those of the given order."""
    prompts = ["Alexander", "in Wales and on café", "the"]
    expected = Run.open(Path(folder)).generate(prompts, tokens=3, seed=5)
    monkeypatch.setattr(batches, "MOST_SEQUENCES", 1)
    printed = []

    def compare(self: GrowingText) -> Continuation:
        printed.append(capsys.readouterr().out)
        return finish(self)

    finish = GrowingText.finish
    monkeypatch.setattr(GrowingText, "finish", compare)
    main([folder, *prompts, "--tokens", "3", "--seed", "5", "--json"])
    lines = [json.loads(text) for text in [*printed[1:], capsys.readouterr().out]]
    assert [line["number"] for line in lines] == [2, 1, 3]
    for line in lines:
        assert line["tokens"] == expected[line["number"] - 1].tokens


def test_a_person_types_prompts(folder: str, monkeypatch, capsys) -> None:
    """Ctrl-C at the question and a bad prompt do not end the program."""
    type_lines(monkeypatch, "the", KeyboardInterrupt, "\ud800", "", "Alexander")
    main([folder, "--tokens", "3", "--compare-without-memory"])
    printed = capsys.readouterr()
    assert printed.out.startswith("the|") and "[without memory] Alexander|" in printed.out
    assert not any(line.startswith("|") for line in printed.out.splitlines())  # of an empty line
    assert "Ctrl-D ends" in printed.err and "error: Prompt 1 is not valid" in printed.err


def test_ctrl_c_ends_only_the_continuation(folder: str, monkeypatch, capsys) -> None:
    def interrupt(*_: object, **__: object) -> None:
        monkeypatch.undo()
        type_lines(monkeypatch)
        raise KeyboardInterrupt

    type_lines(monkeypatch, "the")
    monkeypatch.setattr("engram_jax.decoding.generate.GrowingText.add", interrupt)
    main([folder, "--tokens", "3"])
    assert "Interrupted." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["the", "--tokens", "0"], "--tokens is 0"),
        (["the", "--top-p", "0"], "--top-p is 0"),
        (["the", "--temperature", "nan"], "--temperature is nan"),
        (["the", "--temperature", "inf"], "--temperature is inf; it must be finite"),
        (["the", "--top-k", "9000"], "--top-k is 9000"),
        (["the", "--stop", ""], "--stop has an empty string"),
        (["the", "--stop", "a\udcff"], "--stop is not valid Unicode"),
        (["the", "--prompts-file", "x.jsonl"], "not both"),
        (["--prompts-file", "missing.jsonl"], "Cannot read --prompts-file missing.jsonl"),
        ([], r"The standard input has no prompts; give at least one\.$"),
        (["--stop", "a", "the"], "--stop takes all words after it, so write it last"),
        (["the " * 20, "--capacity", "10"], "--capacity is 10"),
        (["\ud800"], "Prompt 1 is not valid"),
    ],
)
def test_bad_input_is_one_sentence_before_the_checkpoint_is_read(
    folder: str, monkeypatch, flags: list[str], named: str
) -> None:
    monkeypatch.setattr(Run, "restore_weights", None)
    with pytest.raises(InputError, match=named):
        main([folder, *flags])


def test_a_closed_input_is_one_sentence(folder: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="The standard input is closed"):
        main([folder])


def test_an_unknown_step_is_refused(folder: str) -> None:
    with pytest.raises(InputError, match="7"):
        main([folder, "the", "--step", "7"])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "has no prompts"),
        (b"\n\n", "has no prompts"),
        (b'{"prompt": 3}\n', "Line 1"),
        (b'{"prompt": "a"}\nnothing\n', "Line 2"),
        (b"\xff", "not UTF-8"),
        (b'{"prompt": "a", "prompt": "b"}\n', "Line 1"),
    ],
)
def test_bad_files_are_refused(folder: str, tmp_path, content: bytes, named: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"--prompts-file.*{named}|{named}.*--prompts-file"):
        main([folder, "--prompts-file", str(path)])


def test_a_file_that_never_ends_is_refused(folder: str, monkeypatch) -> None:
    monkeypatch.setattr(generate, "MOST_BYTES", 1 << 20)
    with pytest.raises(InputError, match="--prompts-file /dev/zero has more than 1 MiB"):
        main([folder, "--prompts-file", "/dev/zero"])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--verify-rows"], "--verify-rows needs --tables host"),
        (["--hot-rows", "9"], "--hot-rows needs --tables host"),
        (["--hot-rows", "0", "--tables", "host"], "--hot-rows is 0; give a positive number"),
    ],
)
def test_options_of_tables_outside_the_device(folder: str, flags: list[str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        main([folder, "the", *flags])


def test_the_most_frequent_rows_of_the_training_text_get_copies(folder: str, capsys) -> None:
    flags = ["--tokens", "4", "--temperature", "0"]
    main([folder, "the", *flags])
    main([folder, "the", *flags, "--tables", "host", "--hot-rows", "20"])
    printed = capsys.readouterr()
    lines = printed.out.splitlines()  # a text may have several
    half = len(lines) // 2
    assert half and lines[:half] == lines[half:]
    assert "20 rows of layer 1 are copied to the device" in printed.err


def test_rows_are_counted_in_the_training_text(folder: str, untrained, tmp_path) -> None:
    flags = ["the", "--tables", "host", "--hot-rows", "9"]
    with pytest.raises(InputError, match="has no memory; leave out --hot-rows"):
        main([str(untrained("dense").folder), *flags])
    moved = Path(shutil.copytree(folder, tmp_path / "run"))
    config = json.loads((moved / "config.json").read_text())
    config["data"] |= {"sources": [str(tmp_path / "gone.jsonl")]}
    (moved / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"training text\. .*gone\.jsonl.* leave out --hot-rows"):
        main([str(moved), *flags])


def test_a_run_without_memory_or_checkpoint(untrained, tmp_path) -> None:
    with pytest.raises(InputError, match="has no memory; leave out --compare-without-memory"):
        main([str(untrained("dense").folder), "the", "--compare-without-memory"])
    with pytest.raises(InputError, match="There is no run folder"):
        main([str(tmp_path / "nothing"), "the"])
    config = (untrained("dense").folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match="checkpoint"):
        main([str(tmp_path), "the"])
