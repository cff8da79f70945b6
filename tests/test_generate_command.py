"""The command: prompts from the command line, a file, a pipe and a person; bad input."""

import io
import json
import sys
from pathlib import Path

import pytest

from engram_jax.errors import InputError
from engram_jax.generate import main
from engram_jax.run import Run


@pytest.fixture
def folder(untrained) -> str:
    return str(untrained("engram").folder)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


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
    assert "Prompt: " in printed.err and "tokens/s" in printed.err


def test_prompts_of_a_file_as_json(folder: str, tmp_path, capsys) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the"}\n\n{"prompt": "東京"}\n')
    flags = ["--tokens", "4", "--json", "--compare-without-memory", "--seed", "3"]
    main([folder, "--prompts-file", str(prompts), *flags])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["the", "東京"]
    for line in lines:
        assert line["reason"] in ("length", "end")
        assert len(line["tokens"]) == len(line["log_probabilities"]) <= 4
        assert line["without_memory"].keys() == line.keys() - {"prompt", "without_memory"}
    assert lines[0]["without_memory"]["tokens"] != lines[0]["tokens"]


def test_each_line_of_a_pipe_is_a_prompt(folder: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\nAlexander\n"))
    main([folder, "--tokens", "3"])
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].startswith("the|") and any(line.startswith("Alexander|") for line in lines)


def test_a_person_types_prompts(folder: str, monkeypatch, capsys) -> None:
    """Ctrl-C at the question and a bad prompt do not end the program."""
    type_lines(monkeypatch, "the", KeyboardInterrupt, "\ud800", "Alexander")
    main([folder, "--tokens", "3", "--compare-without-memory"])
    printed = capsys.readouterr()
    assert "the|" in printed.out and "[without memory] Alexander|" in printed.out
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
        (["the", "--stop", ""], "--stop has an empty string"),
        (["the", "--prompts-file", "x.jsonl"], "not both"),
        (["--prompts-file", "missing.jsonl"], "Cannot read --prompts-file missing.jsonl"),
        ([], "The standard input has no prompts"),
        (["the " * 20, "--capacity", "10"], "--capacity is 10"),
        (["\ud800"], "Prompt 1 is not valid"),
        (["the", "--step", "7"], "7"),
    ],
)
def test_bad_input_is_one_sentence(folder: str, flags: list[str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        main([folder, *flags])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "has no prompts"),
        (b"\n\n", "has no prompts"),
        (b'{"prompt": 3}\n', "Line 1"),
        (b'{"prompt": "a"}\nnothing\n', "Line 2"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_bad_files_are_refused(folder: str, tmp_path, content: bytes, named: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"--prompts-file.*{named}|{named}.*--prompts-file"):
        main([folder, "--prompts-file", str(path)])


def test_a_run_without_memory_or_checkpoint(untrained, tmp_path) -> None:
    with pytest.raises(InputError, match="has no memory; leave out --compare-without-memory"):
        main([str(untrained("dense").folder), "the", "--compare-without-memory"])
    with pytest.raises(InputError, match="There is no run folder"):
        main([str(tmp_path / "nothing"), "the"])
    config = (untrained("dense").folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match="checkpoint"):
        main([str(tmp_path), "the"])
