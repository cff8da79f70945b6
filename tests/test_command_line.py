"""The command line: named configs, flags, and what a typo gets."""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest
import tyro
from programs import ROOT, run_program, run_program_in_fork

from engram_jax.command_line import load_named_config, named_configs, parse, parse_flags
from engram_jax.errors import InputError, one_sentence


@dataclass(frozen=True)
class Options:
    """Options.

    Attributes:
        run: a folder.
        profile: a switch.
    """

    run: Path | None = None
    profile: bool = False


def test_flags_change_the_named_config_and_nothing_else() -> None:
    args = ["dense", "--run", "x", "--profile", "--train.steps", "7", "--data.sources", "a", "b"]
    options, config = parse(Options, "", args)
    named = load_named_config("dense")
    assert options == Options(Path("x"), True)
    assert config.train.steps == 7 and config.data.sources == ("a", "b")
    assert config.model == named.model and config.memory == named.memory


def test_default_is_the_config_without_a_name() -> None:
    assert parse(Options, "", [])[1] == load_named_config("default")


def test_unknown_config_lists_the_known() -> None:
    with pytest.raises(InputError, match=re.escape(", ".join(named_configs()))):
        parse(Options, "", ["defalt"])


@pytest.mark.parametrize(
    ("args", "sentence", "listed"),
    [
        (
            ["--model.widht", "3"],
            r"Unknown argument '--model.widht'; did you mean --model\.width",
            ["--model.layers", "--model.attention.heads"],
        ),
        (
            ["--memory.adam.beta1", "0.9"],
            "Unknown argument '--memory.adam.beta1'",
            ["--memory.adam.b1", "--memory.adam.form"],
        ),
        (["--model.experts", "3"], r"argument '--model\.experts'(?!.*--model\.experts)", []),
        (["--train.steps", "3", "--nonsense"], "'--nonsense'", ["--run", "--name", "--data.…"]),
        (["--profile", "dense"], "argument 'dense'.* must come first", ["--run", "--train.…"]),
    ],
)
def test_unknown_flag_lists_the_known(args: list[str], sentence: str, listed: list[str]) -> None:
    with pytest.raises(InputError, match=sentence) as refused:
        parse(Options, "", args)
    message = str(refused.value)
    assert all(flag in message for flag in listed) and "--optimizer.b1" not in message


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--data.held-out 3", "data: held_out is 3.0; it must be between 0 and 1. See --help."),
        ("--train.steps x", r"--train.steps: invalid literal for int\(\) with base 10: 'x'."),
        ("--memory.adam.form foo", "invalid choice 'foo' for argument '--memory.adam.form'. "),
        ("--train.steps", "Missing value for argument '--train.steps'."),
        ("--model.experts.routed 8", "The configuration default has no model.experts, so --model"),
    ],
)
def test_an_invalid_value_is_one_sentence(words: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as refused:
        parse(Options, "", words.split())
    assert "\n" not in str(refused.value) and "│" not in str(refused.value)


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_help_explains_every_flag(program: str, capfd: pytest.CaptureFixture[str]) -> None:
    ended = run_program(capfd, program, "--help")
    assert ended.status == 0, ended.err
    assert max(map(len, ended.out.splitlines())) <= 80
    flags = re.split(r"^│ (?=--)", ended.out, flags=re.MULTILINE)[1:]
    assert len(flags) >= 5
    for flag in flags:
        words = " ".join(line.strip(" │") for line in flag.splitlines())
        explanation = re.match(r"--.*?(?:\s[a-z\"].*)\(default: ", words)
        assert explanation and len(explanation[0].split()) > 4, flag


def test_help_in_a_terminal_without_columns_is_not_endless(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tyro took minutes for it in four columns."""
    columns: list[int] = []
    monkeypatch.setattr(
        tyro, "cli", lambda *_, **__: columns.append(shutil.get_terminal_size().columns)
    )
    monkeypatch.setenv("COLUMNS", "1")
    parse_flags(Options, description="", args=["--help"])
    assert columns == [40]


PROGRAMS = [
    *("train.py", "eval.py"),
    *(
        f"engram_jax/{name}.py"
        for name in ("accounting", "ahead_of_time", "export", "generate", "import_run")
    ),
    "engram_jax/tokenizer_training.py",
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_begin_before_they_import_anything_slow(program: str) -> None:
    """So that Ctrl-C during the imports gives no traceback."""
    before, call, _ = (ROOT / program).read_text().partition("begin(")
    assert call
    modules = set()
    for line in ast.parse(before.removesuffix('if __name__ == "__main__":\n    ')).body:
        if isinstance(line, ast.Import):
            modules |= {alias.name for alias in line.names}
        elif isinstance(line, ast.ImportFrom):
            modules.add(line.module)
    assert modules <= {*sys.stdlib_module_names, "engram_jax.beginning"}


def test_a_setting_that_jax_refuses_is_one_sentence() -> None:
    environment = os.environ | {"JAX_ENABLE_X64": "many"}
    command = [sys.executable, "-m", "engram_jax.generate", "run"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("error: JAX cannot be imported (invalid truth value 'many'")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("waits", [True, False])
def test_an_interrupt_that_python_ignores_comes_again(waits: bool) -> None:
    """As in JAX's callback of the garbage collector, and in destructors; also at the end."""

    class Interrupted:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    report = sys.unraisablehook
    with pytest.raises(SystemExit) as ended, one_sentence():
        Interrupted()  # freed at once
        if waits:
            time.sleep(60)
    assert ended.value.code == 130 and sys.unraisablehook is report


def test_sentence_and_status_of_bad_input(capfd: pytest.CaptureFixture[str]) -> None:
    ended = run_program(capfd, "train.py", "nothing")
    assert ended.status == 2 and ended.out == ""
    assert ended.err.startswith("error: There is no configuration 'nothing'")
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError(13, "Permission denied", "/x"), "Cannot use /x (Permission denied)"),
        (IsADirectoryError(21, "Is a directory", "/x"), "Cannot use /x (Is a directory)"),
        (OSError(28, "No space left on device", "/x"), "Cannot write /x (No space left on device)"),
        (OSError(27, "File too large"), "Cannot write a file (File too large)"),
        (OSError(24, "Too many open files", "/x"), "Too many files are open"),
        (MemoryError("Unable to allocate 7 GiB"), "The memory is full (Unable to allocate 7 GiB)"),
        (MemoryError(), "The memory is full"),
        (
            jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n\nx"
            ),
            "The memory is full (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes)",
        ),
    ],
)
def test_errors_of_files_are_one_sentence(
    error: Exception, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, one_sentence():
        raise error
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and printed.startswith(f"error: {sentence}; ")
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"JAX_PLATFORMS": "foo"}, "error: Unable to initialize backend 'foo'"),
        ({"PYTHONOPTIMIZE": "2"}, "error: There is no configuration 'nothing'"),
    ],
)
def test_an_odd_environment_is_one_sentence(variables: dict[str, str], sentence: str) -> None:
    config = "default" if "JAX_PLATFORMS" in variables else "nothing"
    result = subprocess.run(
        [sys.executable, "train.py", config, "--run", "runs/none", "--train.steps", "1"],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stderr.startswith(sentence)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FileNotFoundError(2, "No such file"), "The current folder does not exist any more"),
        (RuntimeError("Unable to initialize backend 'x'."), "Unable to initialize backend 'x'"),
    ],
)
def test_errors_of_the_environment_are_one_sentence(
    error: Exception, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, one_sentence():
        raise error
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and printed.startswith(f"error: {sentence}; ")


def test_an_error_without_a_file_is_a_bug() -> None:
    with pytest.raises(OSError, match="strange"), one_sentence():
        raise OSError(5, "strange")


def test_a_terminal_without_the_character_gets_an_escape() -> None:
    program = "from engram_jax.errors import one_sentence\nwith one_sentence(): print('±')"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (result.stdout, result.stderr) == ("\\xb1\n", "")


def test_help_cut_short_by_its_reader_is_no_failure() -> None:
    command = f"{sys.executable} train.py --help | head -1"
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.startswith("usage:") and result.stderr == ""


def test_no_other_processes_to_join(tmp_path: Path) -> None:
    ended = run_program_in_fork(tmp_path, "train.py", "--distributed")
    assert ended.status == 2 and len(ended.err.splitlines()) == 1
    assert ended.err.startswith("error: --distributed finds no other processes")


@pytest.mark.parametrize(
    ("kind", "limit", "sentence"),
    [
        ("NOFILE", 40, "error: Only 40 files may be open; raise the limit (ulimit -n) to 128."),
        (
            "AS",
            10**9,
            "error: Only 1.0 GB of virtual memory is allowed; raise the limit (ulimit -v)",
        ),
    ],
)
def test_limits_of_the_shell_that_are_too_low_are_told(
    kind: str, limit: int, sentence: str
) -> None:
    program = (
        f"import resource as r; r.setrlimit(r.RLIMIT_{kind}, ({limit}, {limit}))\n"
        "from engram_jax.errors import one_sentence\nwith one_sentence(): print('runs')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (2, "") and result.stderr.startswith(sentence)


def test_a_low_limit_of_open_files_that_may_be_raised_is_raised() -> None:
    """As on macOS, where it is 256 at first."""
    program = (
        "import resource as r\nn = r.RLIMIT_NOFILE\nr.setrlimit(n, (30, r.getrlimit(n)[1]))\n"
        "from engram_jax.errors import one_sentence\n"
        "with one_sentence(): print(r.getrlimit(n)[0])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert int(result.stdout) >= 128


def test_a_full_log_ends_no_program() -> None:
    program = (
        "import sys\nfrom engram_jax.errors import one_sentence\n"
        "with one_sentence(): print('warning', file=sys.stderr, flush=True); print('runs')"
    )
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=full,
            text=True,
        )
    assert (result.returncode, result.stdout) == (0, "runs\n")
