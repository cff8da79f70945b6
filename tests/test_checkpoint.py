import errno
import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from programs import fork

from engram_jax import checkpoint, checkpoint_files, checkpoint_orbax
from engram_jax.checkpoint import Checkpoints, ocp
from engram_jax.errors import InputError

IDENTITY = {"hash": "0123456789abcdef", "tokenizer": "fedcba9876543210"}


class Tables(NamedTuple):
    rows: jax.Array
    counts: tuple[jax.Array, ...]


def make_state(seed: int = 0) -> dict:
    params = {"dense": {"kernel": jax.random.normal(jax.random.key(seed), (8, 6))}}
    return {
        "params": params,
        "optimizer": optax.adam(1e-3).init(params),
        "tables": Tables(
            jax.random.normal(jax.random.key(seed + 1), (4096, 16), jnp.bfloat16),
            (jnp.arange(64, dtype=jnp.int32) + seed, jnp.full((64,), -0.0)),
        ),
        "odd": jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1e-45, -0.0]),
        "key": jax.random.key(seed),
        "batch": jnp.uint32(seed),
        "flags": jnp.array([True, False]),
    }


def abstract_of(state: object) -> object:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def assert_identical(left: object, right: object) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def open_checkpoints(folder: Path, keep: int = 3) -> Checkpoints:
    return Checkpoints(folder, keep=keep, identity=IDENTITY)


def open_in_background(folder: Path) -> Checkpoints:
    return Checkpoints(folder, keep=3, identity=IDENTITY, background=True)


@pytest.fixture
def saved(tmp_path: Path) -> SimpleNamespace:
    """Two checkpoints, of steps 10 and 20, in a folder of their own."""
    checkpoints = open_checkpoints(tmp_path / "checkpoints")
    states = {step: make_state(step) for step in (10, 20)}
    for step, state in states.items():
        checkpoints.save(step, state, config={"width": 64})
    return SimpleNamespace(
        checkpoints=checkpoints,
        folder=tmp_path / "checkpoints",
        states=states,
        abstract=abstract_of(states[10]),
    )


def test_round_trip_is_bit_for_bit(saved: SimpleNamespace) -> None:
    assert saved.checkpoints.steps() == [10, 20]
    for asked, expected in ((None, 20), (10, 10)):
        step, state = saved.checkpoints.restore(saved.abstract, asked)
        assert step == expected
        assert_identical(state, saved.states[expected])
    manifest = json.loads((saved.folder / "00000020" / "manifest.json").read_text())["content"]
    assert manifest["config"] == {"width": 64} and manifest["identity"] == IDENTITY
    assert manifest["arrays"]["tables/rows"] == {"shape": [4096, 16], "dtype": "bfloat16"}


def test_a_relative_folder_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = {"a": jnp.arange(3)}
    open_checkpoints(Path("runs/one")).save(1, state, config={})
    assert_identical(open_checkpoints(Path("runs/one")).restore(abstract_of(state))[1], state)


def test_restores_on_another_mesh(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((4096, 6)).astype(np.float32)
    specs = {"rows": PartitionSpec("data"), "bias": PartitionSpec()}
    values = {"rows": rows, "bias": rows[0]}

    def shardings(shape: tuple[int, ...], names: tuple[str, ...]) -> dict[str, NamedSharding]:
        auto = (jax.sharding.AxisType.Auto,) * len(names)
        mesh = jax.make_mesh(shape, names, auto)
        return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}

    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(1, jax.device_put(values, shardings((8,), ("data",))), config={})
    for target in (
        shardings((2, 4), ("data", "other")),
        shardings((1,), ("data",)),
        dict.fromkeys(values),
    ):
        abstract = {
            name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=target[name])
            for name, value in values.items()
        }
        _, state = checkpoints.restore(abstract)
        assert_identical(state, jax.tree.map(jnp.asarray, values))
        for name, array in state.items():
            assert target[name] is None or array.sharding == target[name]


def largest_file(folder: Path) -> Path:
    return max(folder.glob("state/**/*"), key=lambda path: path.is_file() and path.stat().st_size)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda d: os.truncate(largest_file(d), 100), "has 100 bytes, not"),
    "flipped": (lambda d: flip_a_byte(largest_file(d)), "has another checksum"),
    "missing": (lambda d: largest_file(d).unlink(), "is missing"),
    "no state": (lambda d: shutil.rmtree(d / "state"), "is missing"),
    "garbled manifest": (lambda d: (d / "manifest.json").write_bytes(b"\xff{"), "is unreadable"),
    "flipped manifest": (lambda d: flip_a_byte(d / "manifest.json"), "is unreadable"),
    "empty manifest": (lambda d: (d / "manifest.json").write_text(""), "is unreadable"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_falls_back_and_says_so(
    saved: SimpleNamespace, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inflict, message = DAMAGES[damage]
    inflict(saved.folder / "00000020")

    step, state = saved.checkpoints.restore(saved.abstract)
    assert step == 10
    assert_identical(state, saved.states[10])
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "step 20 is damaged" in sentence and message in sentence

    with pytest.raises(InputError, match=f"of step 20 .* is damaged .*{message}"):
        saved.checkpoints.restore(saved.abstract, 20)
    saved.checkpoints.save(20, saved.states[20], config={})
    assert_identical(saved.checkpoints.restore(saved.abstract, 20)[1], saved.states[20])


def test_all_damaged_is_an_error(saved: SimpleNamespace) -> None:
    for folder in saved.folder.iterdir():
        flip_a_byte(largest_file(folder))
    with pytest.raises(InputError, match=r"No checkpoint in .* is undamaged .*new run"):
        saved.checkpoints.restore(saved.abstract)


def test_no_checkpoint_and_an_unknown_step_are_errors(
    tmp_path: Path, saved: SimpleNamespace
) -> None:
    with pytest.raises(InputError, match="no complete checkpoint"):
        open_checkpoints(tmp_path / "nothing").restore(saved.abstract)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(InputError, match=r"no checkpoint of step 15: choose one of \[10, 20\]"):
        saved.checkpoints.restore(saved.abstract, 15)


@pytest.mark.parametrize("name", ["hash", "tokenizer"])
def test_another_identity_never_falls_back(saved: SimpleNamespace, name: str) -> None:
    other = Checkpoints(saved.folder, keep=3, identity=IDENTITY | {name: "eeee"})
    with pytest.raises(InputError, match=f"step 20 .*another {name} .{IDENTITY[name]}, here eeee"):
        other.restore(saved.abstract)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"odd": jax.ShapeDtypeStruct((6,), jnp.float32)},
            r"float32\[5\] .* float32\[6\], for odd",
        ),
        ({"odd": jax.ShapeDtypeStruct((5,), jnp.int32)}, r"float32\[5\] .* int32\[5\], for odd"),
        ({"new": jax.ShapeDtypeStruct((2,), jnp.int32)}, r"nothing .* int32\[2\], for new"),
        ({"odd": None}, r"float32\[5\] .* nothing, for odd"),
    ],
)
def test_other_arrays_never_fall_back(saved: SimpleNamespace, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"step 20 holds {message}: use the config"):
        saved.checkpoints.restore(saved.abstract | change)


def test_keeps_the_newest(tmp_path: Path) -> None:
    checkpoints = open_checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 100_000_000):
        checkpoints.save(step, {"a": jnp.full((3,), step)}, config={})
    assert checkpoints.steps() == [3, 100_000_000]
    # A run that resumed from an earlier step keeps what it has just written.
    checkpoints.save(2, {"a": jnp.full((3,), 7)}, config={})
    assert checkpoints.steps() == [2, 3, 100_000_000]
    with pytest.raises(InputError, match="At least 1"):
        open_checkpoints(tmp_path, keep=0)


def test_a_second_save_of_a_step_replaces_the_first(saved: SimpleNamespace) -> None:
    saved.checkpoints.save(20, saved.states[10], config={})
    step, state = saved.checkpoints.restore(saved.abstract)
    assert step == 20
    assert_identical(state, saved.states[10])
    assert {path.name for path in saved.folder.iterdir()} == {"00000010", "00000020"}


def test_a_disk_too_small_is_found_before_writing(
    saved: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=999))
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(saved.states[10]))
    with pytest.raises(InputError, match=f": {needed:,} bytes needed, 999 free"):
        saved.checkpoints.save(30, saved.states[10], config={})
    many = Checkpoints(saved.folder, keep=10**9, identity={})
    with pytest.raises(InputError, match=f"3 checkpoints do not fit .*: {3 * needed:,} bytes"):
        many.require_space(saved.states[10], to_come=3)
    assert {path.name for path in saved.folder.iterdir()} == {"00000010", "00000020"}


def test_a_manifest_that_cannot_be_read_now_is_no_damage(
    saved: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network failure must not cause a fall back to an older checkpoint."""

    def fail(path: Path, *_: object, **__: object) -> str:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(OSError, match="Stale"):
        saved.checkpoints.restore(saved.abstract)


@pytest.mark.parametrize("wait", [True, False])
def test_a_disk_that_fills_up_while_writing(
    saved: SimpleNamespace, wait: bool, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = open_in_background(saved.folder)
    large = saved.states[10] | {"large": jax.random.normal(jax.random.key(0), (1024, 1024))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(InputError, match=r"step 30 .*\(File too large\); free some"):
            checkpoints.save(30, large, config={}, wait=wait)
            assert not wait
            checkpoints.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [record for record in caplog.records if record.exc_info]
    assert saved.checkpoints.steps() == [10, 20]
    assert_identical(saved.checkpoints.restore(saved.abstract)[1], saved.states[20])
    checkpoints.save(30, large, config={})
    assert {path.name for path in saved.folder.iterdir()} == {"00000010", "00000020", "00000030"}


def save_and_die(folder: Path, step: int, call: str, count: int) -> None:
    """Saves step 1 of ones, then, being killed at the named call, a step of twos."""
    jax.config.update("jax_num_cpu_devices", 1)
    checkpoints = Checkpoints(folder, keep=1, identity={}, background=True)
    checkpoints.save(1, {"a": jnp.ones(5)}, config={})
    if call == "finish":
        checkpoints.save(step, {"a": jnp.full(5, 2.0)}, config={}, wait=False)
        while not checkpoints._saving.facts.done():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    owners = {"checksum": (checkpoint_files, "facts_of"), "rename": (Path, "rename")}
    owner, name = (owners | {"rmtree": (shutil, "rmtree")})[call]
    original, calls = getattr(owner, name), []

    def kill(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, kill)
    checkpoints.save(step, {"a": jnp.full(5, 2.0)}, config={})


@pytest.mark.parametrize(
    ("step", "call", "count", "restored"),
    [
        (2, "finish", 1, (1, 1.0)),  # all is written in the background, and not published yet
        (2, "checksum", 1, (1, 1.0)),  # Orbax is done, the manifest is not written
        (2, "rename", 1, (1, 1.0)),  # the manifest does not have its final name yet
        (2, "rename", 2, (1, 1.0)),  # the folder does not have its final name yet
        (2, "rmtree", 1, (2, 2.0)),  # step 1, no longer kept, still there
        (1, "rename", 3, (1, 1.0)),  # the first step 1 is renamed, the second not yet published
        (1, "rmtree", 1, (1, 2.0)),  # both versions of step 1 exist
    ],
)
def test_a_kill_while_saving_leaves_a_whole_checkpoint(
    tmp_path: Path, step: int, call: str, count: int, restored: tuple[int, float]
) -> None:
    process = fork(save_and_die, tmp_path, step, call, count)
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL
    before = sorted(path.name for path in tmp_path.iterdir())
    assert len(before) == 2 or call == "rmtree"

    checkpoints = Checkpoints(tmp_path, keep=1, identity={})
    found, state = checkpoints.restore({"a": jax.ShapeDtypeStruct((5,), jnp.float32)})
    assert (found, float(state["a"][0])) == restored
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "reading wrote"

    checkpoints.save(3, {"a": jnp.full(5, 3.0)}, config={})
    assert [path.name for path in tmp_path.iterdir()] == ["00000003"]


def test_a_save_in_the_background_has_the_state_before_later_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_share, is_held = checkpoint_orbax.read_share, threading.Event()

    def wait_and_read(folder: Path) -> dict:
        assert is_held.wait(timeout=60)
        return read_share(folder)

    monkeypatch.setattr(checkpoint_orbax, "read_share", wait_and_read)
    train_step = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
    state = train_step({"rows": np.arange(1 << 20, dtype=np.float32), "step": np.int32(0)})
    expected = jax.tree.map(np.array, state)
    checkpoints = open_in_background(tmp_path)
    checkpoints.save(1, state, config={}, wait=False)
    for _ in range(3):
        state = train_step(state)
    checkpoints.finish(wait=False)
    assert [path.name for path in tmp_path.iterdir()] == ["partial-00000001"]
    assert checkpoints.steps() == []
    is_held.set()
    checkpoints.save(4, state, config={}, wait=False)  # completes the first
    assert checkpoints.steps() == [1]
    while checkpoints.steps() == [1]:
        checkpoints.finish(wait=False)
    checkpoints.finish()  # nothing is left to do
    for step, ahead in ((1, 0), (4, 3)):
        _, found = checkpoints.restore(abstract_of(state), step)
        assert_identical(found, jax.tree.map(lambda a, n=ahead: jnp.asarray(a + n), expected))


def test_any_other_error_of_a_save_passes_and_leaves_nothing(saved: SimpleNamespace) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        saved.checkpoints.save(30, {"a": jnp.ones(3)}, config={"bad": object()})
    assert {path.name for path in saved.folder.iterdir()} == {"00000010", "00000020"}


@pytest.mark.parametrize("name", ["00000030", "000000021", "99999999999999999999"])
@pytest.mark.parametrize("kind", ["file", "folder", "link to nothing", "partial", "replaced"])
def test_other_entries_of_the_folder_are_no_checkpoints(
    saved: SimpleNamespace, name: str, kind: str
) -> None:
    """A link to nothing was counted, so that the oldest checkpoint was removed for it."""
    entry = saved.folder / name
    if kind == "folder":
        entry.mkdir()
    elif kind == "link to nothing":
        entry.symlink_to("nothing")
    elif kind == "file":
        entry.write_text("x")
    else:
        entry = saved.folder / (f"partial-{name}" if kind == "partial" else f"{name}.replaced")
        entry.write_text("x")
    assert saved.checkpoints.steps() == [10, 20]
    assert saved.checkpoints.require() == [10, 20]
    if name == "00000030":  # the place of the next one
        saved.checkpoints.save(30, saved.states[10], config={})
        assert saved.checkpoints.steps() == [10, 20, 30]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_a_checkpoint_without_a_readable_manifest_is_damaged(
    saved: SimpleNamespace, capsys: pytest.CaptureFixture[str], make: Callable[[Path], object]
) -> None:
    manifest = saved.folder / "00000020" / "manifest.json"
    manifest.unlink()
    make(manifest)
    assert saved.checkpoints.restore(saved.abstract)[0] == 10
    assert "step 20 is damaged (manifest.json is unreadable)" in capsys.readouterr().err


def test_a_linked_checkpoint_is_pruned_without_its_files(saved: SimpleNamespace) -> None:
    elsewhere = saved.folder.parent / "elsewhere"
    (saved.folder / "00000010").rename(elsewhere)
    (saved.folder / "00000010").symlink_to(elsewhere)
    checkpoints = open_checkpoints(saved.folder, keep=2)
    checkpoints.save(30, saved.states[10], config={})
    assert checkpoints.steps() == [20, 30]
    assert {path.name for path in saved.folder.iterdir()} == {"00000020", "00000030"}
    assert (elsewhere / "manifest.json").is_file()


def test_a_checkpoint_is_not_taken_for_its_run(saved: SimpleNamespace) -> None:
    inside = open_checkpoints(saved.folder / "00000020" / "checkpoints", keep=2)
    with pytest.raises(InputError, match="00000020 is a checkpoint; give the run's folder"):
        inside.require()


@pytest.mark.parametrize("moment", ["manifest", "arrays"])
def test_a_newer_checkpoint_is_read_if_the_newest_goes_meanwhile(
    saved: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    moment: str,
) -> None:
    """As when a training program saves and prunes while another one reads."""
    owner, name = {"manifest": (checkpoint, "read_manifest"), "arrays": (ocp, "load")}[moment]
    original = getattr(owner, name)

    def replace_first(*arguments: object) -> object:
        monkeypatch.undo()
        (saved.folder / "00000020").rename(saved.folder / "00000021")
        shutil.rmtree(saved.folder / "00000010")
        return original(*arguments)

    monkeypatch.setattr(owner, name, replace_first)
    assert saved.checkpoints.restore(saved.abstract)[0] == 21
    assert "damaged" not in capfd.readouterr().err
