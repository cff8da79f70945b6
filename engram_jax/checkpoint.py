"""Checkpoints: Orbax writes the arrays, a manifest written last says that they are whole.

`checkpoints/00000120/` holds Orbax's folder `state/` and `manifest.json`: step, identity, config,
the name, shape and dtype of every array, and size and checksum of every file. Orbax reports
truncation, flipped bits and wrong shapes with one and the same misleading error, hence the manifest
is checked first. Only damage may fall back to an earlier checkpoint; what differs on purpose
(another hash, another tokenizer, other shapes) is an error.
"""

import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from engram_jax.errors import DISK_FULL, InputError
from engram_jax.processes import all_agree, collective, is_leader

try:
    from orbax.checkpoint import v1 as ocp
except ImportError:  # the path until Orbax moves it
    from orbax.checkpoint.experimental import v1 as ocp

FORMAT = 4  # 1 had models whose embedding entered unscaled, 2 tables of four arrays
RECORD_AS_TEXT = 3  # format 3 named the form of the rows by a text that changed with the code
STATE = "state"
MANIFEST = "manifest.json"
PARTIAL = "partial-"  # being written or removed
REPLACED = ".replaced"  # complete, until a second save of its step has taken the place

# Zstandard gains 8 % on float32 tables and takes five times as long; 64 MiB chunks bound what is in
# flight and let a restore on another mesh read only what it needs.
CHUNK_BYTES = 64 << 20


class Checkpoints:
    """The checkpoints of one run, in `folder`; the newest `keep` stay.

    `identity` holds fingerprints, such as {"hash": …, "tokenizer": …}: a checkpoint that does not
    share them is not restored. All processes of a run call `save` and `restore` alike, on one
    shared folder. Nothing on disk changes until the first `save`, so that others may read.
    """

    def __init__(self, folder: Path, *, keep: int, identity: Mapping[str, Any]) -> None:
        """Raises InputError unless at least one checkpoint is to be kept."""
        if keep < 1:
            raise InputError(f"At least 1 checkpoint must be kept, not {keep}: raise `keep`.")
        self.folder = folder.absolute()  # Orbax takes no relative path
        self._keep = keep
        self._identity = dict(identity)

    def steps(self) -> list[int]:
        """The steps whose checkpoint was completed, ascending: only those have their final name."""
        names = {path.name.removesuffix(REPLACED) for path in self.folder.glob("*")}
        return sorted(int(name) for name in names if re.fullmatch(r"\d{8,}", name))

    def save(
        self,
        step: int,
        state: PyTree[jax.Array],
        *,
        config: Mapping[str, Any],
        files: Iterable[Path] = (),
    ) -> Path:
        """Writes the checkpoint of `step`, blocks until it is complete, and returns its folder.

        `files` are copied into it, so that it can be read without its run folder.

        An earlier checkpoint of the same step stays until the new one is complete. On the CPU
        no second copy of the state is made.

        Raises:
            InputError: the disk is too small or full; the earlier checkpoints are untouched.
        """
        arrays = _named(state)
        final = self.folder / f"{step:08d}"
        partial = self.folder / f"{PARTIAL}{step:08d}"
        with collective(f"begin the checkpoint of step {step}"):
            if is_leader():
                self.folder.mkdir(parents=True, exist_ok=True)
                self._tidy()
                self.require_space(arrays)
                partial.mkdir()
        try:
            with collective(f"write the checkpoint of step {step}"):
                with _orbax_context():
                    ocp.save(partial / STATE, arrays)
                if is_leader():
                    for file in files:
                        shutil.copy(file, partial)
                    _write_manifest(partial, step, self._identity, config, arrays)
                    self._publish(partial, final)
        except BaseException as error:
            if is_leader():  # what a concurrent write of Orbax leaves here, the next save removes
                shutil.rmtree(partial, ignore_errors=True)
            if _is_disk_full(error):
                raise self._full(arrays) from error
            raise
        return final

    def require_space(self, state: PyTree, *, all_to_come: bool = False) -> None:
        """Looks whether a checkpoint of the state (arrays, or their shapes) fits on the disk.

        With `all_to_come`, as many as a run has at most: those it keeps, and a new one until it is
        complete.

        Raises:
            InputError: it does not.
        """
        count = max(self._keep + 1 - len(self.steps()), 1) if all_to_come else 1
        if self._free() < count * _size(state):
            raise self._full(state, count)

    def require(self, step: int | None = None) -> list[int]:
        """As `steps`, if there are any, and that of `step` among them.

        Raises:
            InputError: it is not there.
        """
        found = self.steps()
        if not found:
            raise InputError(
                f"{self.folder} has no complete checkpoint: start the run from its beginning."
            )
        if step is not None and step not in found:
            raise InputError(
                f"{self.folder} has no checkpoint of step {step}: choose one of {found}."
            )
        return found

    def restore(
        self,
        abstract: PyTree[jax.ShapeDtypeStruct],
        step: int | None = None,
        *,
        partial: bool = False,
    ) -> tuple[int, PyTree[jax.Array]]:
        """The newest whole checkpoint, or that of `step`, as (step, state), bit for bit as saved.

        `abstract` gives structure, shapes, dtypes and shardings, which may be those of another mesh
        than the one that saved; a leaf without a sharding goes to the first device. A `partial`
        restore reads its leaves alone, and the checkpoint may hold more. With no `step`, a damaged
        checkpoint is passed over and a sentence on stderr says so.

        Raises:
            InputError: there is none, the asked one (or all) is damaged, or it is of another
                identity or has other arrays.
        """
        found = self.require(step)
        wanted = {
            name: leaf
            if leaf.sharding is not None
            else leaf.update(sharding=SingleDeviceSharding(jax.devices()[0]))
            for name, leaf in _named(abstract).items()
        }
        for candidate in [step] if step is not None else reversed(found):
            with collective(f"read the checkpoint of step {candidate}"):
                damage = self._damage(candidate, wanted, partial)
            if all_agree(damage is None):
                with _orbax_context(partial):
                    arrays = ocp.load(self.path(candidate) / STATE, wanted)
                leaves = [arrays[name] for name in wanted]
                return candidate, jax.tree.unflatten(jax.tree.structure(abstract), leaves)
            if is_leader() and step is None:
                print(
                    f"The checkpoint of step {candidate} is damaged ({damage or 'on a host'}): "
                    "falling back to the one before it.",
                    file=sys.stderr,
                )
        which = f"of step {step}" if step is not None else f"of every step ({found})"
        raise InputError(
            f"The checkpoint {which} in {self.folder} is damaged"
            f"{f' ({damage})' if damage else ''}: restore another step or start the run anew."
        )

    def path(self, step: int) -> Path:
        """The folder of a checkpoint."""
        final = self.folder / f"{step:08d}"
        return final if final.exists() else final.with_name(final.name + REPLACED)

    def _damage(
        self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct], partial: bool
    ) -> str | None:
        """What is broken in a checkpoint, or None; raises InputError if it is whole but another's.

        Process 0 reads the files for all.
        """
        folder = self.path(step)
        try:
            content = _read_manifest(folder / MANIFEST)
        except FileNotFoundError:
            return f"{MANIFEST} is missing"
        except (ValueError, TypeError, KeyError):
            return f"{MANIFEST} is unreadable"
        self._check_identity(step, content)
        saved = content["arrays"]
        if partial:
            saved = {name: saved[name] for name in wanted if name in saved}
        _check_arrays(step, saved, _described(wanted))
        if not is_leader():
            return None
        for name, saved in content["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != saved["size"]:
                return f"{name} has {path.stat().st_size:,} bytes, not {saved['size']:,}"
            if _checksum(path) != saved["crc32"]:
                return f"{name} has another checksum"
        return None

    def _check_identity(self, step: int, content: Mapping[str, Any]) -> None:
        if content["format"] not in (FORMAT, RECORD_AS_TEXT):
            raise InputError(
                f"The checkpoint of step {step} in {self.folder} has format {content['format']}, "
                f"and this version reads {FORMAT}: use the version that wrote it."
            )
        saved = content["identity"]
        names = saved.keys() | self._identity.keys()
        if content["format"] == RECORD_AS_TEXT:
            names -= {"record"}  # the configuration and the arrays' shapes say the same
        for name in sorted(names):
            if saved.get(name) != self._identity.get(name):
                raise InputError(
                    f"The checkpoint of step {step} in {self.folder} was made with another {name} "
                    f"({saved.get(name)}, here {self._identity.get(name)}): use the {name} of that "
                    "run or another run folder."
                )

    def _tidy(self) -> None:
        """Removes what a killed save left, and finishes a replacement that a kill interrupted."""
        for leftover in self.folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(leftover)
        for replaced in self.folder.glob(f"*{REPLACED}"):
            final = replaced.with_name(replaced.name.removesuffix(REPLACED))
            if final.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(final)

    def _publish(self, partial: Path, final: Path) -> None:
        """Gives a complete checkpoint its name, then removes what it replaces and the oldest."""
        replaced = final.with_name(final.name + REPLACED)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        _sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        for path in [self.path(step) for step in self.steps()[: -self._keep]]:
            if path != final:
                # Under another name first: a kill in between must leave no half checkpoint behind.
                shutil.rmtree(path.rename(path.with_name(PARTIAL + path.name)))

    def _free(self) -> int:
        there = next(path for path in [self.folder, *self.folder.parents] if path.exists())
        return shutil.disk_usage(there).free

    def _full(self, state: PyTree, count: int = 1) -> InputError:
        what = "A checkpoint does" if count == 1 else f"{count} checkpoints do"
        return InputError(
            f"{what} not fit in {self.folder}: that needs {count * _size(state):,} bytes, and "
            f"{self._free():,} are free; free some space or keep fewer checkpoints."
        )


def _size(state: PyTree) -> int:
    """Bytes of all arrays together."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _orbax_context(partial: bool = False) -> Any:
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    return context


def _named(tree: PyTree) -> dict[str, Any]:
    """The leaves by their path, such as "params/blocks/0/norm/scale", in the tree's order."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("Two leaves of the state have one and the same path.")
    return named


def _described(
    arrays: Mapping[str, jax.Array] | Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, dict[str, Any]]:
    return {
        name: {"shape": list(array.shape), "dtype": str(array.dtype)}
        for name, array in arrays.items()
    }


def _check_arrays(step: int, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in [*wanted, *(name for name in saved if name not in wanted)]:
        here, there = wanted.get(name), saved.get(name)
        if here != there:
            texts = [
                f"{array['dtype']}{array['shape']}" if array else "nothing"
                for array in (there, here)
            ]
            raise InputError(
                f"The checkpoint of step {step} holds {texts[0]} where the model has {texts[1]}, "
                f"at {name}: use the config that it was saved with."
            )


def _write_manifest(
    folder: Path,
    step: int,
    identity: Mapping[str, Any],
    config: Mapping[str, Any],
    arrays: Mapping[str, jax.Array],
) -> None:
    """Describes what lies in a checkpoint's folder; written last."""
    content = {
        "format": FORMAT,
        "step": step,
        "identity": identity,
        "config": config,
        "arrays": _described(arrays),
        "files": {
            path.relative_to(folder).as_posix(): {
                "size": path.stat().st_size,
                "crc32": _checksum(path),
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
        "versions": {name: version(name) for name in ("jax", "orbax-checkpoint")},
    }
    text = json.dumps(content)
    partial = folder / "manifest.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"crc32": zlib.crc32(text.encode()), "content": content}, indent=1))
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / MANIFEST)
    _sync(folder)


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    content: dict[str, Any] = manifest["content"]
    if zlib.crc32(json.dumps(content).encode()) != manifest["crc32"]:
        raise ValueError(f"{path} has another checksum")
    return content


def _sync(folder: Path) -> None:
    """Makes the renames in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for lack of space, by quota or by a limit on the size of a file.

    TensorStore raises ValueError with the operating system's number in the text.
    """
    return any(
        (isinstance(cause, OSError) and cause.errno in DISK_FULL)
        or any(f"os_error_code='{number}'" in str(cause) for number in DISK_FULL)
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
