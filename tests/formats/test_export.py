"""Exports of tiny runs, and back."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import assert_identical, make_run, plain_pass, scale_rows, tiny_config, with_backbone

from engram_jax import export, import_run
from engram_jax.errors import InputError
from engram_jax.files import atomic_folder
from engram_jax.formats import safetensors
from engram_jax.formats.export import export_run, open_table
from engram_jax.formats.export import import_run as import_export
from engram_jax.formats.export_identity import write_checksums
from engram_jax.formats.quality import loss_change
from engram_jax.formats.quantize import STORED, TableType
from engram_jax.formats.safetensors import Tensors
from engram_jax.formats.start_memory import open_start
from engram_jax.memory.places import stored_places
from engram_jax.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Many of its rows have pending updates. Opened on one device, as the command does."""
    return Run.open(make_run(tmp_path_factory.mktemp("engram"), "engram").folder)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("table_type", STORED)
def test_export_import_export_gives_the_same_bytes(
    run: Run, tmp_path: Path, table_type: TableType
) -> None:
    weights = run.restore_weights()
    first, again = tmp_path / "first", tmp_path / "again"
    export_run(run, weights, first, table_type)
    imported = import_export(first, tmp_path / "run")
    found = imported.restore_weights()
    assert int(found.step) == int(weights.step) == 2
    assert_identical(found.params, weights.params)
    export_run(imported, found, again, table_type)
    assert content(again) == content(first)
    size = (first / "model.safetensors").stat().st_size
    rows = open_table(first, 1)
    assert rows.parts[0].dtype == STORED[table_type]
    assert size > rows.parts[0].nbytes


def test_rows_are_those_that_the_model_reads(run: Run, tmp_path: Path) -> None:
    """In the order of their numbers, with pending updates; and the import scores equally."""
    weights = run.restore_weights()
    export_run(run, weights, tmp_path / "export")
    table = weights.tables[1]
    program, row_adam = run.program, jax.device_get(run.program.row_adam)
    current = np.asarray(jax.jit(row_adam.current)(*jax.device_get((table.unpack(), weights.step))))
    assert (current != np.asarray(table.unpack().value)).any()  # some updates are pending
    numbers = np.arange(program.ngram_hash.rows[0], dtype=np.int32)
    mapped = open_table(tmp_path / "export", 1)
    np.testing.assert_array_equal(
        mapped.read(numbers), current[stored_places(numbers, len(current))]
    )
    imported = import_export(tmp_path / "export", tmp_path / "run")
    assert imported.config == run.config
    generator = np.random.default_rng(0)
    tokens = generator.integers(4, 500, (2, 24), dtype=np.int32)
    zeros = np.zeros_like(tokens)
    positions = np.tile(np.arange(24, dtype=np.int32), (2, 1))
    ours, _ = plain_pass(run, weights)(tokens, zeros, positions)
    theirs, _ = plain_pass(imported, imported.restore_weights())(tokens, zeros, positions)
    np.testing.assert_array_equal(theirs, ours)


def test_a_failing_export_leaves_nothing(run: Run, tmp_path: Path) -> None:
    weights = run.restore_weights()
    tables = {1: scale_rows(weights.tables[1], float("nan"))}
    with pytest.raises(InputError, match="not finite"):
        export_run(run, replace(weights, tables=tables), tmp_path / "export", "bfloat16")
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    export_run(run, weights, tmp_path / "empty", "bfloat16")
    assert "config.json" in content(tmp_path / "empty")


@pytest.mark.slow
def test_every_parameter_of_the_backbone(tmp_path: Path) -> None:
    """Latent attention, experts with biases, hyper-connections."""
    config = with_backbone(tiny_config(tmp_path))
    run = Run.start(config, tmp_path / "run")
    state = run.program.initial_state()
    bias = {layer: array + 0.5 * layer for layer, array in state.expert_bias.items()}
    run.save(replace(state, expert_bias=bias))
    run = Run.open(tmp_path / "run")
    weights = run.restore_weights()
    export_run(run, weights, tmp_path / "export", "bfloat16")
    found = import_export(tmp_path / "export", tmp_path / "imported").restore_weights()
    assert_identical(found.params, weights.params)
    assert_identical(found.expert_bias, weights.expert_bias)
    assert bias and float(found.expert_bias[3][0]) == 1.5


def test_the_card_has_the_figures_of_the_same_step(run: Run, tmp_path: Path) -> None:
    without = {"output": {"loss": 5.25, "standard_error": None}}
    score = {"loss": 4.125, "standard_error": 0.25, "bits_per_byte": 1.5, "without_memory": without}
    evaluation = run.folder / "eval.json"
    evaluation.write_text(json.dumps({"step": 2, "held_out": {"all sources": score}}))
    weights = run.restore_weights()
    export_run(run, weights, tmp_path / "a", "int8")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "| all sources | 4.125 ± 0.250 | 1.500 | 5.250 |" in card
    rows = f"{run.program.ngram_hash.rows[0]:,}"
    assert f"| table of layer 1 | {rows} rows × 8, int8, with one bfloat16" in card
    assert str(tmp_path) not in card and "first.jsonl, second.jsonl" in card
    evaluation.write_text(json.dumps({"step": 3, "held_out": {"all sources": score}}))
    export_run(run, weights, tmp_path / "b", "int8")
    assert "4.125" not in (tmp_path / "b" / "README.md").read_text()
    evaluation.unlink()


def test_the_gate_measures_and_refuses(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = run.restore_weights()
    before, change = loss_change(run, weights, "float32", run.corpora())
    assert before.tokens > 100 and change.loss == 0  # exactly the same rows
    _, change = loss_change(run, weights, "float8", run.corpora())
    assert 0 < abs(change.loss) < 0.1
    limit = change.loss / 2 if change.loss > 0 else change.loss * 2
    words = [str(run.folder), str(tmp_path / "export"), "--tables", "float8", "--tolerance"]
    with pytest.raises(InputError, match=r"raise the held-out loss by .* more than --tolerance"):
        export.main([*words, f"{limit:.9f}"])
    assert not (tmp_path / "export").exists()
    export.main([*words, "0.2"])
    printed = capsys.readouterr().out
    assert f"changes by {change.loss:+.5f}" in printed and "model.safetensors (" in printed
    import_run.main([str(tmp_path / "export"), str(tmp_path / "run")])
    assert Run.open(tmp_path / "run").checkpoints.steps() == [2]


def test_a_run_without_memory(untrained: Callable[[str], Run], tmp_path: Path) -> None:
    run = Run.open(untrained("dense").folder)
    export.main([str(run.folder), str(tmp_path / "export")])
    assert not (tmp_path / "export" / "hash.json").exists()
    found = import_export(tmp_path / "export", tmp_path / "run").restore_weights()
    assert_identical(found.params, run.restore_weights().params)


def test_invalid_folders_are_one_sentence(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run folder"):
        export.main([str(tmp_path / "none"), str(tmp_path / "export")])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="not empty"):
        export.main([str(run.folder), str(tmp_path / "full")])
    with pytest.raises(InputError, match="--max-tokens is 0"):
        export.main([str(run.folder), str(tmp_path / "a"), "--max-tokens", "0"])
    with pytest.raises(InputError, match="--tolerance is nan; give a finite number"):
        export.main([str(run.folder), str(tmp_path / "none"), "--tolerance", "nan"])
    with pytest.raises(InputError, match="--max-tokens needs --tolerance"):
        export.main([str(run.folder), str(tmp_path / "a"), "--max-tokens", "9"])
    with pytest.raises(InputError, match="No configuration"):
        import_run.main([str(tmp_path / "none"), str(tmp_path / "run")])


def test_an_export_is_no_run_and_a_run_no_export(run: Run, tmp_path: Path) -> None:
    export_run(run, run.restore_weights(), tmp_path / "export")
    with pytest.raises(InputError, match=r"is an export and no run; run .*import_run"):
        Run.open(tmp_path / "export")
    with pytest.raises(InputError, match="is a run already"):
        import_export(run.folder, tmp_path / "imported")


def test_a_damaged_export_is_one_sentence(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    export_run(run, run.restore_weights(), folder, "float8")
    path = folder / "model.safetensors"
    original = path.read_bytes()
    tensors = Tensors.open(folder)
    arrays = {name: tensors.view(name).copy() for name in tensors.infos}
    metadata, scales = tensors.metadata, arrays["tables.1.scale"]
    infinite = np.full(scales.shape, np.nan).astype(scales.dtype)
    for change, facts, message in (
        ({"tables.1.scale": None}, metadata, r"no tensor tables\.1\.scale"),
        ({"tables.1.weight": arrays["tables.1.weight"][1:]}, metadata, r"tables\.1\.weight in"),
        ({"norm.gain": np.zeros(3, np.float32)}, metadata, r"norm\.gain in .*expected F32 \[32\]"),
        ({"norm.gain": np.full(32, np.nan, np.float32)}, metadata, r"norm\.gain in .*not finite"),
        ({"tables.1.scale": infinite}, metadata, r"tables\.1 in .*not finite"),
        ({"more": np.zeros(0, np.float32)}, metadata, "has a tensor more"),
        ({}, metadata | {"step": "x"}, "no export that this version"),
        ({}, metadata | {"step": "²"}, "no export that this version"),
        ({}, metadata | {"step": "99999999999"}, "no export that this version"),
        ({}, metadata | {"hash": "0"}, "The hash in .* is not the one"),
        ({}, metadata | {"tokenizer": "0"}, "The tokenizer in .* is not the one"),
        ({}, {}, "no export that this version"),
    ):
        changed = {key: value for key, value in (arrays | change).items() if value is not None}
        safetensors.write(path, changed, facts)
        write_checksums(folder)
        with pytest.raises(InputError, match=message):
            import_export(folder, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["export"]  # nothing half written
    path.write_bytes(original)
    with pytest.raises(InputError, match="no table of layer 0"):
        open_table(folder, 0)
    os.truncate(path, len(original) - 1)
    write_checksums(folder)
    with pytest.raises(InputError, match="not a valid safetensors file"):
        import_export(folder, tmp_path / "run")


def test_what_was_changed_since_the_export_is_named(run: Run, tmp_path: Path) -> None:
    """Also numbers that are finite, and settings that fit the tensors."""
    folder = tmp_path / "export"
    export_run(run, run.restore_weights(), folder)
    (folder / "README.md").write_text("Mine.")  # may change
    for name in ("model.safetensors", "config.json", "hash.json"):
        original = (folder / name).read_bytes()
        changed = bytearray(original)
        changed[-200] ^= 1
        if name != "model.safetensors":
            changed = original + b"\n"
        (folder / name).write_bytes(changed)
        with pytest.raises(InputError, match=rf"was edited: {name} has "):
            import_export(folder, tmp_path / "run")
        if name != "model.safetensors":
            with pytest.raises(InputError, match=rf"was edited: {name} has "):
                open_start(folder, run.program.ngram_hash, run.config.memory.row_width)
        (folder / name).write_bytes(original)
    for content in ("[]", '{"config.json": 3}', "{", "{}"):
        (folder / "checksums.json").write_text(content)
        with pytest.raises(InputError, match=r"no checksums\.json that can be read"):
            import_export(folder, tmp_path / "run")


def test_a_folder_that_another_program_fills_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    with (
        pytest.raises(InputError, match=r"Another program has written to .*export meanwhile"),
        atomic_folder(folder) as partial,
    ):
        (partial / "ours").touch()
        folder.mkdir()
        (folder / "theirs").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "theirs"]
