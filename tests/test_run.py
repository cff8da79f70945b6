"""Runs: what may change between sessions, what may not, and the sharding of a batch."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from tiny_runs import (
    assert_identical,
    draw_on_the_mesh,
    on_devices,
    tiny_config,
    vary,
    with_backbone,
)

from engram_jax import files, platforms, program
from engram_jax.compression import VocabularyProjection
from engram_jax.config import Config, TrainConfig, load_config, save_config
from engram_jax.costs import memory
from engram_jax.decoding.generate import Generator
from engram_jax.decoding.settings import GenerationSettings
from engram_jax.errors import InputError
from engram_jax.formats.export import export_run, import_run
from engram_jax.hashing import NgramHash
from engram_jax.identity import check_same_run, check_saved_by
from engram_jax.layers.attention import AttentionConfig
from engram_jax.layers.engram import EngramConfig
from engram_jax.memory.row_adam import RowAdamConfig
from engram_jax.metrics import MetricsLog, read_metrics
from engram_jax.program import Program
from engram_jax.run import Run
from engram_jax.sharding import MeshConfig, make_mesh
from engram_jax.tokenizer import DEFAULT_MODEL
from engram_jax.trainer import train


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(tmp_path)


def test_devices_follow_one_another_by_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated devices, because the real ones are of one process."""
    shuffled = [
        SimpleNamespace(id=number, process_index=number % 2) for number in (3, 0, 6, 1, 7, 2, 5, 4)
    ]
    grids = []

    class Recorded(jax.sharding.Mesh):
        def __new__(cls, grid: np.ndarray, *_: Any, **__: Any) -> "Recorded":
            grids.append(grid)
            return object.__new__(cls)

    monkeypatch.setattr(jax, "devices", lambda: shuffled)
    monkeypatch.setattr(jax.sharding, "Mesh", Recorded)
    make_mesh(MeshConfig(data=2, fsdp=4))
    assert [device.id for device in grids[0].reshape(-1)] == [0, 2, 4, 6, 1, 3, 5, 7]


def test_a_batch_lies_on_the_mesh_in_its_own_order(config: Config, tmp_path: Path) -> None:
    run = Run.start(replace(config, mesh=MeshConfig(fsdp=4)), tmp_path / "run")
    with run.batches() as batches:
        batch = next(batches)
    placed = run.program.put(batch)
    for host, device in zip(jax.tree.leaves(batch), jax.tree.leaves(placed), strict=True):
        np.testing.assert_array_equal(host, device)


def test_another_mesh_and_log_interval_may_resume(config: Config, tmp_path: Path) -> None:
    Run.start(config, tmp_path / "run")
    changed = replace(
        config,
        mesh=MeshConfig(fsdp=2),
        train=replace(config.train, log_every=1),
        data=replace(config.data, workers=1),
    )
    assert Run.start(changed, tmp_path / "run").program.mesh.shape["fsdp"] == 2
    check_same_run(vary(config, train={"accumulation": 2}), tmp_path / "run")


def test_all_that_differs_is_named_as_flags(config: Config, tmp_path: Path) -> None:
    Run.start(config, tmp_path / "run")
    sources = config.data.sources
    changed = vary(config, data={"sources": sources[:1], "batch_size": 16})
    wanted = rf"give --data.sources {sources[0]} {sources[1]} --data.batch-size 8 to resume it"
    with pytest.raises(
        InputError, match=f"{wanted}, delete .*no checkpoint.*another --run folder.$"
    ):
        Run.start(changed, tmp_path / "run")


def test_another_kind_of_model_is_refused_in_a_sentence(config: Config, tmp_path: Path) -> None:
    """Each has fields that the other does not have."""
    plain, backbone = config, with_backbone(config)
    for mine, other in ((plain, backbone), (backbone, plain)):
        folder = tmp_path / ("plain" if mine is plain else "backbone")
        Run.start(mine, folder)
        with pytest.raises(InputError, match=f"give the configuration {config.name} and the flags"):
            Run.start(other, folder)


@pytest.mark.parametrize(
    ("flag", "section", "changed"),
    [
        ("memory.gather pallas_tpu needs a TPU", "memory", {"gather": "pallas_tpu"}),
        (
            "model.engram.implementation pallas_gpu needs a GPU",
            "model",
            {"engram": EngramConfig(implementation="pallas_gpu")},
        ),
        (
            "model.attention.implementation cudnn needs a GPU",
            "model",
            {"attention": AttentionConfig(implementation="cudnn")},
        ),
    ],
)
def test_a_kernel_of_another_device_is_refused(
    config: Config, tmp_path: Path, flag: str, section: str, changed: dict
) -> None:
    with pytest.raises(InputError, match=f"--{flag}, and this runs on cpu"):
        Run.start(vary(config, **{section: changed}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_changed_text_is_refused(config: Config, tmp_path: Path) -> None:
    Run.start(config, tmp_path / "run")
    with Path(config.data.sources[0]).open("a") as file:
        file.write(json.dumps({"text": "Something more was written."}) + "\n")
    with pytest.raises(InputError, match="The text of first is not what"):
        Run.start(config, tmp_path / "run")


def test_unreadable_text_leaves_no_folder_behind(config: Config, tmp_path: Path) -> None:
    missing = replace(config, data=replace(config.data, sources=("nothing.jsonl",)))
    with pytest.raises(InputError, match=r"nothing\.jsonl"):
        Run.start(missing, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    Run.start(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sequence_length": 100_000}, "too few for one row"),
        ({"weights": (1.0, -1.0)}, "weights must be positive"),
    ],
)
def test_rows_that_cannot_be_made_leave_no_folder_behind(
    config: Config, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        Run.start(vary(config, data=change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_run_begun_in_the_folder_meanwhile_is_noticed(
    config: Config, tmp_path: Path
) -> None:
    run = Run.start(config, tmp_path / "run")
    save_config(vary(config, optimizer={"learning_rate": 0.5}), tmp_path / "run" / "config.json")
    with pytest.raises(InputError, match="learning-rate"):
        train(run)


def test_a_full_disk_is_found_before_the_first_step(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.start(config, tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    with pytest.raises(InputError, match="999 free"):
        train(run)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_row_optimizer_that_is_refused_leaves_no_folder_behind(
    config: Config, tmp_path: Path
) -> None:
    """And a reschedule with it leaves the run's configuration as it is."""
    refused = vary(config, memory={"adam": RowAdamConfig(form="exact", b1=0.5, b2=0.26)})
    with pytest.raises(InputError, match="momentum"):
        Run.start(refused, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    Run.start(vary(config, memory={"adam": RowAdamConfig(form="exact")}), tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(InputError, match="momentum"):
        Run.start(refused, tmp_path / "run", reschedule=True)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_batch_without_a_plan_is_refused(config: Config, tmp_path: Path) -> None:
    """Otherwise a step would train without the memory, and lose the tables."""
    ours = Run.start(config, tmp_path / "run").program
    with pytest.raises(InputError, match="no plan"):
        ours.read_rows(ours.abstract_state().weights, None, ours.row_adam)


def test_a_kernel_that_reads_lines_needs_rows_of_lines(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platforms, "NEEDS", {"pallas_gpu": "cpu"})
    change = {"gather": "pallas_gpu", "adam": RowAdamConfig(form="exact")}
    with pytest.raises(InputError, match=r"lines of 128 words.*at least 22"):
        Run.start(vary(config, memory=change), tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("seed[1]", r"contains \[ \], so"),
        ("[y]/run", r"contains \[ \], so"),
        ("a*b?", r"contains \* \?, so"),
        ("a\\b", r"contains \\, so"),
        ("gs://bucket/run", "is a remote folder"),
        ("caf\udce9", "not UTF-8"),
    ],
)
def test_a_path_that_checkpoints_cannot_have_is_refused(
    config: Config, tmp_path: Path, name: str, message: str
) -> None:
    folder = Path(name) if "://" in name else tmp_path / name
    with pytest.raises(InputError, match=message):
        Run.start(config, folder)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["config.json", "texts.json", "hash.json"])
def test_a_file_of_a_run_that_is_a_folder_is_one_sentence(
    config: Config, tmp_path: Path, name: str
) -> None:
    Run.start(config, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / name).mkdir()
    with pytest.raises(InputError, match=rf"{name}.*[Ii]s a directory"):
        Run.start(config, tmp_path / "run")


def test_a_run_of_another_order_of_texts_is_not_resumed(config: Config, tmp_path: Path) -> None:
    Run.start(config, tmp_path / "run")
    path = tmp_path / "run" / "texts.json"
    begun = json.loads(path.read_text())
    del begun["order"]  # as of the first versions
    path.write_text(json.dumps(begun))
    with pytest.raises(InputError, match=r"reads texts in another order; .* --start-from"):
        Run.start(config, tmp_path / "run")


@pytest.mark.parametrize("content", ["null", "{}", "[]", '{"tokenizer": 1, "corpora": 2}'])
def test_fingerprints_of_texts_of_another_form_are_one_sentence(
    config: Config, tmp_path: Path, content: str
) -> None:
    Run.start(config, tmp_path / "run")
    (tmp_path / "run" / "texts.json").write_text(content)
    with pytest.raises(InputError, match=r"texts\.json.*damaged"):
        Run.start(config, tmp_path / "run")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EINVAL])
def test_a_lock_that_fails_is_one_sentence(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", fail)
    with (
        pytest.raises(InputError, match=rf"lock .*{os.strerror(number)}"),
        files.hold_lock(tmp_path / "lock"),
    ):
        pass
    for unsupported in (errno.ENOLCK, errno.ENOTSUP):
        number = unsupported
        with files.hold_lock(tmp_path / "lock"):
            pass


def test_a_pipe_is_no_lock(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    with (
        pytest.raises(InputError, match=r"lock is no regular file"),
        files.hold_lock(tmp_path / "lock"),
    ):
        pass


def test_the_home_of_nobody_is_named(config: Config) -> None:
    with pytest.raises(InputError, match=r"^~no-such-user/x begins with the home folder"):
        Run.start(config, "~no-such-user/x")


def test_64_bit_types_are_refused(config: Config, tmp_path: Path) -> None:
    with jax.enable_x64(True), pytest.raises(InputError, match="unset JAX_ENABLE_X64"):
        Run.start(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option",
    [
        lambda: jax.disable_jit(),
        lambda: jax.numpy_dtype_promotion("strict"),
        lambda: jax.transfer_guard("disallow"),
    ],
    ids=["jit", "promotion", "transfers"],
)
def test_options_under_which_nothing_works_are_refused(
    config: Config, tmp_path: Path, option: Callable[[], AbstractContextManager[None]]
) -> None:
    with option(), pytest.raises(InputError, match="does not support; unset JAX_"):
        Run.start(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_is_no_run_folder(config: Config, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("notes")
    with pytest.raises(InputError, match="is a file"):
        Run.start(config, tmp_path / "notes")


def test_nothing_held_out_is_refused_before_training(config: Config, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("One long document. " * 500)
    data = replace(config.data, sources=(str(tmp_path / "book.txt"),), held_out=1e-6)
    with pytest.raises(InputError, match="held out"):
        Run.start(replace(config, data=data), tmp_path / "run")


def test_two_sources_of_one_name_are_refused(config: Config, tmp_path: Path) -> None:
    twice = replace(config.data, sources=(config.data.sources[0],) * 2)
    with pytest.raises(InputError, match="Two sources are called 'first'"):
        Run.start(replace(config, data=twice), tmp_path / "run")


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(2, 1), *(pytest.param(h, 2, marks=pytest.mark.slow) for h in (2, 4))]
)
def test_one_row_on_one_device(config: Config, tmp_path: Path, heads: int, kv_heads: int) -> None:
    attention = AttentionConfig(heads=heads, kv_heads=kv_heads, head_width=8)
    Run.start(replace(config, model=replace(config.model, attention=attention)), tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert run.program.mesh.size == 1
    generator = Generator(run.program, run.tokenizer, run.program.initial_state().weights)
    assert generator.generate(["Alexander"], GenerationSettings(tokens=1))[0].tokens


def test_rows_that_do_not_divide_over_the_devices_are_refused(tiny: Config, tmp_path: Path) -> None:
    for change in ({"data": {"batch_size": 4}}, {"train": {"accumulation": 2}}):
        with pytest.raises(InputError, match="4 rows does not divide over 8 devices"):
            Run.start(vary(tiny, **change), tmp_path / "run")
    with pytest.raises(InputError, match="12 rows does not divide over 8 devices"):
        Run.start(vary(tiny, train={"evaluate_batch_size": 12}), tmp_path / "run")
    with pytest.raises(InputError, match="8 devices"):
        Run.start(vary(tiny, mesh={"fsdp": 3}), tmp_path / "run")
    with pytest.raises(InputError, match=r"6 positions of a sequence, but .* 9 back"):
        Run.start(vary(tiny, mesh={"context": 4}), tmp_path / "run")
    split = vary(tiny, mesh={"context": 2}, data={"sequence_length": 25})
    with pytest.raises(InputError, match=r"sequence_length 25 does not divide over mesh.context 2"):
        Run.start(split, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_configuration_is_refused(tiny: Config, tmp_path: Path) -> None:
    Run.start(tiny, tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    for change, field in (
        ({"optimizer": {"learning_rate": 0.5}}, "--optimizer.learning-rate 0.003 to resume"),
        ({"memory": {"rows_per_head": (500, 501)}}, "--memory.rows-per-head 500 500 to resume"),
        ({"model": {"tie_embeddings": False}}, "--model.tie-embeddings True to resume"),
    ):
        with pytest.raises(InputError, match=field):
            Run.start(vary(tiny, **change), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_folder_with_something_else_is_refused(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("Dear reader")
    with pytest.raises(InputError, match="holds no run"):
        Run.start(tiny, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_start_that_was_killed_is_started_again(tiny: Config, tmp_path: Path) -> None:
    Run.start(tiny, tmp_path / "run")
    (tmp_path / "run" / "config.json").rename(tmp_path / "run" / "partial-1-config.json")
    again = Run.start(tiny, tmp_path / "run")
    hashes = (run.program.ngram_hash for run in (Run.open(tmp_path / "run"), again))
    assert len({ngram_hash.fingerprint for ngram_hash in hashes}) == 1


def test_another_tokenizer_than_the_models_is_refused(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"8192 pieces.*100.*model.vocabulary"):
        Run.start(vary(tiny, model={"vocabulary": 100}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_may_have_ids_to_spare(tiny: Config, tmp_path: Path) -> None:
    """Like the paper's models: 129,280 ids for 128,815 pieces. Unused ids are never sampled."""
    run = Run.start(vary(tiny, model={"vocabulary": 8200, "tie_embeddings": False}), tmp_path)
    weights = run.program.initial_state().weights
    # The unused ids have the largest logits, for either sign.
    sizes = np.r_[np.ones(8192), 2e6 * np.ones(4), -2e6 * np.ones(4)].astype(np.float32)
    head = 0 * weights.params["head"] + sizes[:, None]
    weights = replace(weights, params=weights.params | {"head": head})
    generator = Generator(run.program, run.tokenizer, weights)
    for heat in (0.0, 1.0):
        drawn = generator.generate(["the"], GenerationSettings(tokens=5, temperature=heat))[
            0
        ].tokens
        assert drawn and max(drawn) < 8192


@pytest.fixture
def saved(trained: Run, tmp_path: Path) -> Run:
    """A copy of the trained run."""
    shutil.copytree(trained.folder, tmp_path / "run")
    return Run.open(tmp_path / "run")


def test_a_run_is_read_and_resumed_without_the_files_it_was_made_from(
    tiny: Config, tmp_path: Path
) -> None:
    """Its folder may have moved. A changed tokenizer file changes nothing, either."""
    file = tmp_path / "mine.model"
    shutil.copy(DEFAULT_MODEL, file)
    config = vary(tiny, data={"tokenizer": str(file)})
    fingerprint = Run.start(config, tmp_path / "run").tokenizer.fingerprint
    versions = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert versions["jax"] == jax.__version__ and "engram-jax" in versions
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    for content in (b"no model", None):
        file.unlink() if content is None else file.write_bytes(content)
        assert Run.open(moved).tokenizer.fingerprint == fingerprint
        assert Run.start(config, moved).tokenizer.fingerprint == fingerprint
        with pytest.raises(InputError, match=r"mine\.model"):
            Run.start(config, tmp_path / "new")
    (moved / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        Run.open(moved)


def test_a_run_whose_folder_was_moved_saves_a_checkpoint_that_can_be_read(
    saved: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = saved.restore()
    saved.folder.rename(tmp_path / "moved")
    path = saved.save(state)
    assert f"{saved.folder} was moved or removed" in capsys.readouterr().err
    for name in ("config.json", "hash.json", "tokenizer.model"):
        assert (path / name).read_bytes() == (tmp_path / "moved" / name).read_bytes()
    assert_identical(saved.restore(), state)


def test_checkpoints_that_are_no_folder_are_refused_before_training(
    tiny: Config, tmp_path: Path
) -> None:
    run = Run.start(tiny, tmp_path / "run")
    (run.folder / "checkpoints").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match="link to nothing"):
        train(run)


def test_a_hash_of_another_tokenizer_is_refused(tiny: Config, saved: Run) -> None:
    NgramHash.build(saved.program.ngram_hash.spec, VocabularyProjection.identity(8192)).save(
        saved.folder / "hash.json"
    )
    with pytest.raises(InputError, match="hashed for another tokenizer"):
        Run.start(tiny, saved.folder)


def test_another_tokenizer_is_not_called_another_text(config: Config, tmp_path: Path) -> None:
    dense = vary(config, memory={"layers": ()})
    Run.start(dense, tmp_path / "run")
    texts = tmp_path / "run" / "texts.json"
    texts.write_text(texts.read_text().replace('"tokenizer": "', '"tokenizer": "0'))
    with pytest.raises(InputError, match="begun with another tokenizer"):
        Run.start(dense, tmp_path / "run")


def test_a_checkpoint_of_another_hash_is_refused(tiny: Config, saved: Run) -> None:
    """A valid hash for this tokenizer: only the checkpoint shows that it is another hash."""
    ours = saved.program.ngram_hash
    replace(ours, multipliers=ours.multipliers + 2).save(saved.folder / "hash.json")
    run = Run.start(tiny, saved.folder)
    with pytest.raises(InputError, match=f"another hash.*{ours.fingerprint}"):
        train(run)


def test_a_run_whose_hash_is_gone_or_damaged_is_refused(tiny: Config, saved: Run) -> None:
    path = saved.folder / "hash.json"
    content = path.read_text()
    path.write_text(content[: len(content) // 2])
    for begin in (lambda: Run.start(tiny, saved.folder), lambda: Run.open(saved.folder)):
        with pytest.raises(InputError, match=r"hash\.json"):
            begin()
    path.unlink()
    with pytest.raises(InputError, match=r"hash\.json"):
        Run.open(saved.folder)


def test_a_checkpoint_of_another_run_is_refused(tiny: Config, saved: Run) -> None:
    """Also if the run's own configuration was edited. Only the places of texts may change."""
    folder = saved.checkpoints.path(6)
    elsewhere = tuple(f"/elsewhere/{Path(source).name}" for source in tiny.data.sources)
    moved = vary(tiny, data={"sources": elsewhere, "workers": 1}, train={"steps": 9})
    for trains in (True, False):
        check_saved_by(moved, folder, trains=trains)
    started = vary(moved, memory={"start_from": "/elsewhere", "init_scale": 0.1})
    check_saved_by(started, folder, trains=False)
    with pytest.raises(InputError, match=r"data\.held_out is 0\.5 in the checkpoint"):
        check_saved_by(vary(tiny, data={"held_out": 0.6}), folder, trains=False)
    other = vary(tiny, data={"sources": (tiny.data.sources[0], "other.jsonl")})
    check_saved_by(other, folder, trains=False)
    for config, named in ((other, "data.sources"), (vary(tiny, train={"seed": 2}), "train.seed")):
        with pytest.raises(InputError, match=f"Another run saved .*00000006, .*: {named} is"):
            check_saved_by(config, folder, trains=True)
    theta = replace(tiny.model.attention, theta=20_000.0)
    save_config(vary(tiny, model={"attention": theta}), saved.folder / "config.json")
    with pytest.raises(
        InputError, match=r"model\.attention\.theta is 10000\.0 in the checkpoint, and 20000"
    ):
        Run.open(saved.folder).restore_weights()


def test_a_run_opens_on_one_device_whatever_trained_it(trained: Run) -> None:
    opened = Run.open(trained.folder)
    assert (trained.program.mesh.size, opened.program.mesh.size) == (8, 1)
    assert_identical(opened.restore(), trained.restore())


def test_a_run_opens_on_a_part_of_the_devices_but_not_on_more(trained: Run) -> None:
    opened = Run.open(trained.folder, MeshConfig(data=1, fsdp=2))
    assert opened.program.mesh.devices.shape == (1, 2, 1, 1)
    for mesh, sentence in (
        (MeshConfig(data=16), "does not fit 8 devices"),
        (MeshConfig(expert=2), "no experts"),
    ):
        with pytest.raises(InputError, match=sentence):
            Run.open(trained.folder, mesh)
    with pytest.raises(InputError, match=r"batch of 12 rows does not divide over 8 devices"):
        Run.open(trained.folder, MeshConfig(), evaluate_batch_size=12)


def test_a_run_that_named_a_kernel_opens_on_another_platform(saved: Run) -> None:
    config = vary(saved.config, memory={"gather": "pallas_gpu"})
    config = vary(
        config, model={"attention": replace(config.model.attention, implementation="splash")}
    )
    save_config(config, saved.folder / "config.json")
    opened = Run.open(saved.folder)
    assert opened.config == saved.config
    with pytest.raises(InputError, match="pallas_gpu needs a GPU"):
        Run.start(config, saved.folder)


def test_a_state_moves_between_numbers_of_devices_bit_for_bit(
    tiny: Config, trained: Run, tmp_path: Path
) -> None:
    first, source = trained.restore(), trained.checkpoints
    for number, devices in enumerate((4, 1, 8)):
        with on_devices(devices):
            run = Run.start(tiny, tmp_path / str(number))
        state = replace(run, checkpoints=source).restore()
        shards = state.tables[1].records.addressable_shards
        assert len({shard.device for shard in shards}) == devices
        assert {len(shard.data) * devices for shard in shards} == {len(first.tables[1].records)}
        assert_identical(state, first)
        run.save(state)
        source = run.checkpoints


def test_weights_are_read_without_the_optimizers_part(trained: Run) -> None:
    opened = Run.open(trained.folder)
    assert_identical(opened.restore_weights(), opened.restore().weights)
    with pytest.raises(InputError, match="no checkpoint of step 5"):
        opened.restore_weights(5)


def test_a_checkpoint_holds_configuration_and_hash(trained: Run) -> None:
    checkpoint = trained.folder / "checkpoints" / "00000006"
    for name in ("config.json", "hash.json"):
        assert (checkpoint / name).read_bytes() == (trained.folder / name).read_bytes()
    loaded = NgramHash.load(checkpoint / "hash.json")
    assert loaded.fingerprint == trained.program.ngram_hash.fingerprint


def test_two_programs_do_not_train_in_one_folder(saved: Run, tiny: Config) -> None:
    holds = (
        "import pathlib, sys\n"
        "from engram_jax.files import hold_lock\n"
        "with hold_lock(pathlib.Path(sys.argv[1]), wait=False):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holds, str(saved.folder / "lock")],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="Another process is training"):
            train(Run.start(tiny, saved.folder))
        other.stdin.close()
    assert train(Run.start(tiny, saved.folder)).step == 6


@pytest.mark.usefixtures("one_device")
def test_seeds_differ(tiny: Config, tmp_path: Path) -> None:
    one, other = (
        Run.start(vary(tiny, train={"seed": seed}), tmp_path / str(seed)).program.initial_state()
        for seed in (0, 1)
    )
    assert np.any(one.params["embedding"] != other.params["embedding"])
    assert np.any(one.tables[1].records != other.tables[1].records)


def test_a_seed_means_the_same_whatever_generator_is_jaxs_default(
    tiny: Config,
) -> None:
    program = Program.of_sizes(tiny, make_mesh(MeshConfig(), jax.devices()[:1]))
    with program.use_mesh(), jax.default_prng_impl("rbg"):
        text = str(jax.make_jaxpr(program._make_state)(np.uint32(0)))
    assert "impl=fry" in text and "impl=rbg" not in text


@pytest.mark.usefixtures("one_device")
def test_tables_of_two_layers_start_differently(tiny: Config, tmp_path: Path) -> None:
    run = Run.start(vary(tiny, memory={"layers": (0, 1)}), tmp_path / "run")
    one, other = (table.unpack().value for table in run.program.initial_state().tables.values())
    assert np.mean(one[:1000] == other[:1000]) < 0.01  # of 1,021 values, some are equal


@pytest.mark.parametrize("compiled", ["fast", pytest.param("optimized", marks=pytest.mark.slow)])
def test_the_initial_state_does_not_depend_on_the_mesh(
    tiny: Config, tmp_path: Path, compiled: str, request: pytest.FixtureRequest
) -> None:
    if compiled == "optimized":
        request.getfixturevalue("optimized")
    states = []
    for sizes in ((2, 4), (1, 1)):
        with on_devices(*sizes):
            run = Run.start(tiny, tmp_path / str(sizes))
        states.append(draw_on_the_mesh(run.program))
    assert_identical(*states)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "width", 10**8),
        ("model", "vocabulary", 10**9),
        ("memory", "row_width", 10**8),
        ("data", "batch_size", 10**9),
        ("data", "sequence_length", 10**9),
        ("data", "workers", 999),
        ("train", "steps", 2**31 - 1),
    ],
)
def test_a_run_that_no_memory_can_hold_is_refused_at_once(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    field: str,
    value: int,
) -> None:
    monkeypatch.setattr(memory, "_memory", lambda _: (1.6e10, 1.6e10))
    config = vary(config, memory={"adam": RowAdamConfig(form="lazy")})
    with (
        on_devices(1),
        pytest.raises(InputError, match=r"at least [\d,.]+ GB .*16\.0 GB of memory"),
    ):
        Run.start(vary(config, **{section: {field: value}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_exact_adam_of_a_run_without_end_is_refused_at_once() -> None:
    with pytest.raises(InputError, match=r"1000000000; lower .* or set memory\.adam\.form to lazy"):
        program.make_config_row_adam(Config(train=TrainConfig(steps=10**9)))


def test_paths_may_be_strings(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everywhere in the interface; ~ is the home folder."""
    folder = str(tmp_path)
    monkeypatch.setenv("HOME", folder)
    with on_devices(1):
        fresh = Run.start(config, "~/run")
        with pytest.raises(InputError, match="no complete checkpoint"):
            Run.start(config, f"{folder}/other", start_from="~/run")
    opened = Run.open("~/run")
    assert fresh.folder == opened.folder == tmp_path / "run"
    assert load_config(f"{folder}/run/config.json") == config
    save_config(config, f"{folder}/config.json")
    NgramHash.load(f"{folder}/run/hash.json").save(f"{folder}/hash.json")
    assert read_metrics(f"{folder}/run") == []
    with pytest.raises(InputError, match="exists and is not empty"):
        export_run(opened, fresh.program.initial_state().weights, f"{folder}/run")
    with pytest.raises(InputError, match="No configuration"):
        import_run(f"{folder}/none", f"{folder}/imported")


@pytest.mark.parametrize(
    "name", ["config.json", "hash.json", "texts.json", "metrics.jsonl", "tokenizer.model"]
)
def test_a_pipe_in_a_run_folder_is_not_waited_for(
    config: Config, tmp_path: Path, name: str
) -> None:
    with on_devices(1):
        run = Run.start(config, tmp_path / "run")
        (run.folder / name).unlink(missing_ok=True)
        os.mkfifo(run.folder / name)
        with pytest.raises(InputError, match="no regular file"):
            MetricsLog(Run.start(config, run.folder).folder)
