"""Checkpoints: Orbax writes the arrays, then a manifest with their checksums is written.

`checkpoints/00000120/` contains Orbax's folder `state/` and `manifest.json`: step, identity,
config, name, shape and dtype of every array, size and checksum of every file. Before a restore,
the processes read all files, each a share of them, and compare: Orbax reports truncation, flipped
bits and wrong shapes with the same misleading error. Only a damaged checkpoint causes a fall back
to an earlier one. A different identity (hash or tokenizer) or different shapes are an error.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from engram_jax.checkpoint_files import (
    MANIFEST,
    find_damage,
    gather_facts,
    list_files,
    read_facts,
    read_manifest,
    share_of,
    write_manifest,
)
from engram_jax.errors import InputError, disk_reason
from engram_jax.files import remove, sync_folder
from engram_jax.processes import collective, first_text, is_leader
from engram_jax.train_state import array_bytes, named_leaves

try:
    from orbax.checkpoint import v1 as ocp
except ImportError:  # the path until Orbax moves it
    from orbax.checkpoint.experimental import v1 as ocp

FORMAT = 4  # in format 1 models did not scale the embedding; in 2 a table was four arrays
RECORD_AS_TEXT = 3  # in format 3 the identity described the row records by a Python repr
STATE = "state"
TABLES = "tables"  # prefix of the tables' arrays, or folder of the files with their rows
PARTIAL = "partial-"  # prefix of a folder that is being written or removed
REPLACED = ".replaced"  # suffix of a complete checkpoint that a second save of its step replaces

# Chunks of 64 MiB limit the memory in use, and let a restore on another mesh read only the parts it
# needs. No compression: Zstandard saves 8 % on float32 tables and takes five times as long.
CHUNK_BYTES = 64 << 20


class Checkpoints:
    """The checkpoints of one run, in `folder`; the newest `keep` are kept.

    `identity` holds fingerprints, such as {"hash": …, "tokenizer": …}. A checkpoint with other
    fingerprints is not restored. All processes of a run call `save` and `restore`, on one shared
    folder. Nothing on disk changes before the first `save`, so opening for reading is safe.
    """

    def __init__(self, folder: str | Path, *, keep: int, identity: Mapping[str, Any]) -> None:
        """Raises InputError if `keep` is less than 1."""
        if keep < 1:
            raise InputError(f"At least 1 checkpoint must be kept, not {keep}: raise `keep`.")
        self.folder = Path(folder).absolute()  # Orbax does not accept a relative path
        self._keep = keep
        self._identity = dict(identity)

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending; only those have their final name.

        Entries of the folder that cannot be checkpoints, such as files, are left out.
        """
        steps = set()
        for path in self.folder.glob("*"):
            name = path.name.removesuffix(REPLACED)
            is_step = re.fullmatch(r"\d{8,10}", name) and name == f"{int(name):08d}"
            if is_step and ((path / STATE).exists() or (path / MANIFEST).exists()):
                steps.add(int(name))
        return sorted(steps)

    def save(
        self,
        step: int,
        state: PyTree[jax.Array],
        *,
        config: Mapping[str, Any],
        write_files: Callable[[Path], object] = lambda folder: None,
        write_parts: Callable[[Path], object] = lambda folder: None,
        more_bytes: int = 0,
    ) -> Path:
        """Writes the checkpoint of `step`, waits until it is complete, and returns its folder.

        `write_files` writes more files into it, so that it can be read without its run folder.
        `write_parts` does so on every process, and needs `more_bytes` of disk space. An earlier
        checkpoint of the same step is kept until the new one is complete.

        Raises:
            InputError: the disk is too small or full. The earlier checkpoints are unchanged.
        """
        arrays = named_leaves(state)
        final, partial = (self.folder / f"{prefix}{step:08d}" for prefix in ("", PARTIAL))
        with collective(f"begin the checkpoint of step {step}"):
            if is_leader():
                self.folder.mkdir(parents=True, exist_ok=True)
                self._tidy()
                self.require_space(arrays, more_bytes=more_bytes)
                partial.mkdir()
        try:
            with collective(f"write the files of step {step}"):
                write_parts(partial)
                if is_leader():
                    write_files(partial)
            with collective(f"write the checkpoint of step {step}"), _orbax_context():
                ocp.save(partial / STATE, arrays)
            with collective(f"read the files of step {step}"):
                mine = read_facts(partial, _share(list_files(partial)))
            facts = gather_facts(partial, mine)
            with collective(f"publish the checkpoint of step {step}"):
                if is_leader():
                    write_manifest(partial, self._content(step, config, arrays), facts)
                    self._publish(partial, final)
        except BaseException as error:
            if is_leader():  # the next save removes files that Orbax still writes after this
                shutil.rmtree(partial, ignore_errors=True)
            if (reason := disk_reason(error)) is not None:
                problem = f"Cannot write the checkpoint of step {step} to {self.folder} ({reason})"
                raise InputError(f"{problem}; free some space.") from error
            raise
        return final

    def require_space(self, state: PyTree, to_come: int = 1, *, more_bytes: int = 0) -> None:
        """Checks that a checkpoint of the state (arrays, or their shapes) fits on the disk.

        With several `to_come`, that those fit which the run keeps, and a new one. `more_bytes` are
        those of a checkpoint's other files.

        Raises:
            InputError: the disk has too little space, or the folder cannot be one.
        """
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise InputError(f"{self.folder} is no folder, or a link to nothing; remove it.")
        count = min(max(self._keep + 1 - len(self.steps()), 1), to_come)
        needed = count * (array_bytes(state) + more_bytes)
        if self._free() < needed:
            raise self._full(needed, count)

    def require(self, step: int | None = None) -> list[int]:
        """Returns `steps()`, after checking that it contains `step`, or any step if None.

        Raises:
            InputError: there is no such checkpoint.
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
        """Restores the newest intact checkpoint, or that of `step`, as (step, state), bit for bit.

        `abstract` gives structure, shapes, dtypes and shardings. The mesh may differ from the one
        at saving. A leaf without a sharding goes to the first device. Tables whose rows are in
        files (see `placement`) are not read; their arrays are None. With `partial`, only the
        leaves of `abstract` are read, and the checkpoint may contain more. Without `step`, damaged
        checkpoints are skipped, with a message on stderr.

        Raises:
            InputError: there is no checkpoint, the requested one (or all) is damaged, or it has
                another identity or other arrays.
        """
        before = self.require(step)
        try:
            return self._restore(before, abstract, step, partial)
        except Exception:
            # Another program may have removed the checkpoint meanwhile, because it saved a newer.
            if step is not None or jax.process_count() > 1 or self.steps() == before:
                raise
        return self.restore(abstract, partial=partial)

    def _restore(self, found: list[int], abstract: PyTree, step: int | None, partial: bool) -> Any:
        wanted = {
            name: leaf
            if leaf.sharding is not None
            else leaf.update(sharding=SingleDeviceSharding(jax.devices()[0]))
            for name, leaf in named_leaves(abstract).items()
        }
        for candidate in [step] if step is not None else reversed(found):
            here = self._saved_arrays(candidate, wanted)
            with collective(f"read the checkpoint of step {candidate}"):
                own = self._damage(candidate, here, partial)
            damage = first_text(own)
            if damage is None:
                with _orbax_context(partial):
                    arrays = ocp.load(self.path(candidate) / STATE, here)
                leaves = [arrays.get(name) for name in wanted]
                return candidate, jax.tree.unflatten(jax.tree.structure(abstract), leaves)
            if step is None and not self.path(candidate).exists():
                raise InputError(f"{self.path(candidate)} was just removed; try again.")
            if is_leader() and step is None:
                print(
                    f"The checkpoint of step {candidate} is damaged ({damage}): restoring the one "
                    "before it.",
                    file=sys.stderr,
                )
        if step is None:
            raise InputError(
                f"All checkpoints in {self.folder} are damaged ({damage}); start a new run."
            )
        raise InputError(
            f"The checkpoint of step {step} in {self.folder} is damaged ({damage}); restore "
            "another step, or start a new run."
        )

    def path(self, step: int) -> Path:
        """The folder of a checkpoint."""
        final = self.folder / f"{step:08d}"
        return final if final.exists() else final.with_name(final.name + REPLACED)

    def _saved_arrays(
        self, step: int, wanted: dict[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The leaves that a checkpoint has as arrays: all, or all except the tables."""
        try:
            _, files = read_manifest(self.path(step))
        except (OSError, ValueError, TypeError, KeyError):
            return wanted  # `_damage` says what is wrong
        if not any(name.startswith(f"{TABLES}/") for name in files):
            return wanted
        return {name: leaf for name, leaf in wanted.items() if not name.startswith(f"{TABLES}/")}

    def _damage(
        self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct], partial: bool
    ) -> str | None:
        """Describes the damage of a checkpoint; None if this process finds none.

        All processes read the manifest, and each reads its share of the other files.

        Raises:
            InputError: the checkpoint is readable, but has another identity or other arrays.
        """
        folder = self.path(step)
        try:
            content, files = read_manifest(folder)
        except FileNotFoundError:
            return f"{MANIFEST} is missing"
        except (ValueError, TypeError, KeyError, IsADirectoryError, NotADirectoryError):
            return f"{MANIFEST} is unreadable"
        self._check_identity(step, content)
        saved = content["arrays"]
        if partial:
            saved = {name: saved[name] for name in wanted if name in saved}
        _check_arrays(step, saved, _described(wanted))
        names = _share({name: facts.size for name, facts in files.items()})
        return find_damage(folder, {name: files[name] for name in names})

    def _check_identity(self, step: int, content: Mapping[str, Any]) -> None:
        if content["format"] not in (FORMAT, RECORD_AS_TEXT):
            raise InputError(
                f"The checkpoint of step {step} in {self.folder} has format {content['format']}, "
                f"and this version reads {RECORD_AS_TEXT} and {FORMAT}: use the version that "
                "wrote it."
            )
        saved = content["identity"]
        names = saved.keys() | self._identity.keys()
        if content["format"] == RECORD_AS_TEXT:
            names -= {"record"}  # checked through the configuration and the array shapes
        for name in sorted(names):
            if saved.get(name) != self._identity.get(name):
                raise InputError(
                    f"The checkpoint of step {step} in {self.folder} was saved with another {name} "
                    f"({saved.get(name)}, here {self._identity.get(name)}): use the {name} of that "
                    "run or another run folder."
                )

    def _content(
        self, step: int, config: Mapping[str, Any], arrays: Mapping[str, jax.Array]
    ) -> dict[str, Any]:
        """What the manifest says beside the files."""
        return {
            "format": FORMAT,
            "step": step,
            "identity": self._identity,
            "config": config,
            "arrays": _described(arrays),
            "versions": {name: version(name) for name in ("jax", "orbax-checkpoint")},
        }

    def _tidy(self) -> None:
        """Removes the remains of a killed save, and completes an interrupted replacement."""
        for leftover in self.folder.glob(f"{PARTIAL}*"):
            remove(leftover)
        for replaced in self.folder.glob(f"*{REPLACED}"):
            final = replaced.with_name(replaced.name.removesuffix(REPLACED))
            if final.exists():
                remove(replaced)
            else:
                replaced.rename(final)

    def _publish(self, partial: Path, final: Path) -> None:
        """Renames a complete checkpoint to its final name, then removes superseded ones."""
        replaced = final.with_name(final.name + REPLACED)
        if os.path.lexists(final):
            final.rename(replaced)
        partial.rename(final)
        sync_folder(self.folder)
        remove(replaced)
        for path in [self.path(step) for step in self.steps()[: -self._keep]]:
            if path != final:
                # Rename first: a killed process must not leave an incomplete checkpoint.
                shutil.rmtree(path.rename(path.with_name(PARTIAL + path.name)))

    def _free(self) -> int:
        there = next(path for path in [self.folder, *self.folder.parents] if path.exists())
        return shutil.disk_usage(there).free

    def _full(self, needed: int, count: int) -> InputError:
        what = "The checkpoint does" if count == 1 else f"{count} checkpoints do"
        return InputError(
            f"{what} not fit in {self.folder}: {needed:,} bytes needed, {self._free():,} free; "
            "free some space, or lower train.keep_checkpoints."
        )


def _orbax_context(partial: bool = False) -> Any:
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    return context


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
                f"for {name}: use the config that it was saved with."
            )


def _share(sizes: Mapping[str, int]) -> list[str]:
    """The files that this process reads."""
    return share_of(sizes, jax.process_index(), jax.process_count())
