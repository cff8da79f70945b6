import json
import re
import sys
from pathlib import Path

import pytest
from programs import run_program

from engram_jax.config import save_config
from engram_jax.errors import InputError
from engram_jax.evaluation.report import POOLED
from engram_jax.run import Run
from engram_jax.sharding import MeshConfig


@pytest.fixture(scope="module")
def run(untrained) -> Run:
    return untrained("engram")


def test_everything_is_printed_and_written(eval_program, run, capsys):
    text = "Alexander the Great <b>"
    eval_program([str(run.folder), "--text", text, "--prompt", "born in", "--sample-tokens", "3"])
    printed = capsys.readouterr().out
    assert "tiny, step 2 of 3" in printed
    assert "perplexity" in printed and "rows zeroed" in printed and "born in|" in printed
    results = json.loads((run.folder / "eval.json").read_text(encoding="utf-8"))
    assert results["gates"]["text"] == text
    assert results["sample"]["prompt"] == "born in"
    held_out = results["held_out"]
    assert set(held_out) == {"first", "second", POOLED}
    for figures in held_out.values():
        for part in ("output", "rows"):
            without = figures["without_memory"][part]
            assert without["loss"] - figures["loss"] == pytest.approx(
                without["difference"], abs=1e-6
            )
    assert "n-grams of 384 training tokens" in printed
    health = results["health"]["1"]
    assert 0 <= health["open"] <= 1 and health["strength"] > 0
    assert f"{health['strength']:>20.3f}" in printed
    assert [table["order"] for table in results["memory"]["tables"]] == [2, 3]
    assert set(results["memory"]["frequencies"][0]["gates"]) == {"1"}
    for name in ("gates.png", "memory.png"):
        assert (run.folder / name).read_bytes().startswith(b"\x89PNG")
    assert "&lt;b&gt;" in (run.folder / "gates.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_sources_and_texts_can_be_chosen(eval_program, run, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("x" + "in Wales " * 340 + "日" * 600)
    before = sorted(run.folder.iterdir())
    eval_program(
        [
            *(str(run.folder), "--sources", run.config.data.sources[1], "--sample-tokens", "0"),
            *("--text-file", str(tmp_path / "text.txt"), "--max-tokens", "50", "--step", "2"),
            *("--no-statistics", "--output", str(tmp_path), "--mesh.data", "1"),
        ]
    )
    assert sorted(run.folder.iterdir()) == before
    names = {"eval_part.json", "gates_part.html", "gates_part.png", "text.txt"}
    assert {path.name for path in tmp_path.iterdir()} == names
    results = json.loads((tmp_path / "eval_part.json").read_text(encoding="utf-8"))
    assert set(results["held_out"]) == {"second", POOLED}
    assert "sample" not in results and "memory" not in results
    assert "the first 1,024 of the text's" in capsys.readouterr().out
    # A token of a Japanese character is one byte, and two of them would fit.
    assert results["gates"]["text"].endswith("in Wales ")
    assert len(run.tokenizer.encode(results["gates"]["text"])) == 1022


def test_scores_are_printed_if_a_file_cannot_be_written(eval_program, run, tmp_path, capsys):
    (tmp_path / "eval_part.json").mkdir()
    with pytest.raises(IsADirectoryError):
        eval_program(
            [
                *(str(run.folder), "--output", str(tmp_path), "--no-statistics"),
                *("--max-tokens", "50", "--sample-tokens", "0"),
            ]
        )
    assert "perplexity" in capsys.readouterr().out
    assert (tmp_path / "gates_part.png").is_file()


@pytest.mark.parametrize("memory", ["dense", pytest.param("over_encoding", marks=pytest.mark.slow)])
def test_models_without_gates_skip_what_needs_them(eval_program, memory, untrained):
    run = untrained(memory)
    eval_program([str(run.folder), "--sample-tokens", "1"])
    results = json.loads((run.folder / "eval.json").read_text(encoding="utf-8"))
    assert not (run.folder / "gates.html").exists()
    ablations = results["held_out"][POOLED]["without_memory"]
    assert set(ablations) == (set() if memory == "dense" else {"output", "rows"})
    assert (run.folder / "memory.png").exists() == ("memory" in results) == (memory != "dense")
    if memory == "over_encoding":
        assert [part["gates"] for part in results["memory"]["frequencies"]] == [{}, {}]


def test_statistics_need_the_text_of_the_training(eval_program, run, tmp_path, monkeypatch):
    source = Path(run.config.data.sources[0])
    elsewhere = tmp_path / "kept.jsonl"
    monkeypatch.setattr(sys.modules["eval"], "evaluate", lambda *_, **__: pytest.exit("too late"))
    source.rename(elsewhere)
    try:
        with pytest.raises(InputError, match=r"first\.jsonl.*--no-statistics"):
            eval_program([str(run.folder), "--sources", str(elsewhere)])
    finally:
        elsewhere.rename(source)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--text", " "], "empty"),
        (["--text", "a", "--text-file", "b"], "not both"),
        (["--text-file", "missing.txt"], "Cannot read missing.txt"),
        (["--sources", "wikipedia"], "'wikipedia' is neither"),
        (["--step", "7"], "no checkpoint of step 7"),
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--batch-size", "12", "--mesh.data", "8"], "12 rows does not divide.*--batch-size"),
        (["--sample-tokens", "-1"], "--sample-tokens is -1"),
        (["--output", "missing"], "missing is no folder; create it"),
        (["--top-k", "0"], "--top-k is 0"),
        (["--temperature", "nan"], "temperature is nan"),
    ],
)
def test_what_cannot_be_done_is_said(eval_program, run, flags, sentence):
    with pytest.raises(InputError, match=sentence):
        eval_program([str(run.folder), *flags])


def test_no_prompt_is_continued_if_the_parameters_are_split(eval_program, run, capsys):
    with pytest.raises(InputError, match="no checkpoint of step 7"):
        eval_program([str(run.folder), "--mesh.fsdp", "2", "--step", "7"])
    assert capsys.readouterr().out.startswith("No sample: ")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--top-k", "9000"], "--top-k is 9000"),
        (["--sample-tokens", "1000000"], "ask for fewer tokens"),
        (["--prompt", "\ud800"], "Prompt 1 is not valid"),
        (["--temperature", "inf"], "--temperature is inf; it must be finite"),
    ],
)
def test_the_sample_is_checked_before_the_checkpoint_is_read(
    eval_program, run, monkeypatch, flags, sentence
):
    """With sentences that name only flags of eval.py."""
    monkeypatch.setattr(Run, "restore_weights", None)
    with pytest.raises(InputError, match=sentence) as refused:
        eval_program([str(run.folder), *flags])
    assert set(re.findall(r"--[\w-]+", str(refused.value))) <= set(flags)


def test_the_sample_is_drawn_before_the_slow_statistics(eval_program, run, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise InputError("drawn")

    def study(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("engram_jax.decoding.generate.Generator.generate", fail)
    monkeypatch.setitem(eval_program.__globals__, "MemoryStudy", study)
    with pytest.raises(InputError, match="drawn"):
        eval_program([str(run.folder)])


def test_other_sources_are_checked_like_the_runs_own(eval_program, run, tmp_path):
    (tmp_path / "book.txt").write_text("One long document. " * 50)
    with pytest.raises(InputError, match="held out"):
        eval_program([str(run.folder), "--sources", str(tmp_path / "book.txt")])
    with pytest.raises(InputError, match="Two sources are called"):
        eval_program([str(run.folder), "--sources", *run.config.data.sources[:1] * 2])


def test_a_text_for_a_model_without_gates_is_refused(eval_program, untrained):
    with pytest.raises(InputError, match="no gates"):
        eval_program([str(untrained("dense").folder), "--text", "Wales"])


def test_a_folder_that_is_no_run_is_refused(eval_program, run, tmp_path):
    with pytest.raises(InputError, match="no run folder"):
        eval_program([str(tmp_path / "missing")])
    with pytest.raises(InputError, match="run folder"):
        eval_program([str(tmp_path)])
    bare = tmp_path / "bare"
    bare.mkdir()
    save_config(run.config, bare / "config.json")
    run.program.ngram_hash.save(bare / "hash.json")
    with pytest.raises(InputError, match="no complete checkpoint"):
        eval_program([str(bare)])


def test_mistakes_leave_with_one_line_and_status_2(tmp_path, capfd):
    ended = run_program(capfd, "eval.py", str(tmp_path / "missing"))
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("error: There is no run folder")
    assert len(ended.err.splitlines()) == 1


@pytest.mark.usefixtures("eval_program")
def test_a_size_of_the_mesh_counts_also_if_it_is_the_default():
    import eval

    trained = MeshConfig(fsdp=2, context=2)
    for flags, mesh in (
        ([], MeshConfig(2, fsdp=2, context=2)),  # of 8 devices
        (["--mesh.context", "1"], MeshConfig()),
        (["--mesh.data", "1", "--mesh.fsdp", "2"], MeshConfig(1, fsdp=2)),
    ):
        assert eval.parse_options(["run", *flags]).mesh.resolve(trained, rows=8) == mesh
