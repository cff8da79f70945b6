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
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from engram_jax.checkpoint_files import (
    FileFacts,
    find_damage,
    gather_facts,
    list_facts,
)
from engram_jax.checkpoint_manifest import (
    MANIFEST,
    check_arrays,
    check_identity,
    manifest_content,
    read_manifest,
    write_manifest,
)
from engram_jax.checkpoint_orbax import ocp, orbax_context, read_when_written
from engram_jax.errors import InputError, disk_reason
from engram_jax.files import remove, sync_folder
from engram_jax.processes import collective, first_text, gather, is_leader
from engram_jax.train_state import array_bytes, named_leaves

STATE = "state"
TABLES = "tables"  # prefix of the tables' arrays, or folder of the files with their rows
PARTIAL = "partial-"  # prefix of a folder that is being written or removed
REPLACED = ".replaced"  # suffix of a complete checkpoint that a second save of its step replaces


class Checkpoints:
    """The checkpoints of one run, in `folder`; the newest `keep` are kept.

    `identity` holds fingerprints, such as {"hash": …, "tokenizer": …}. A checkpoint with other
    fingerprints is not restored. All processes of a run call `save`, `finish` and `restore`, on one
    shared folder. Nothing on disk changes before the first `save`, so opening for reading is safe.

    `background` allows `save` to return early. By default, it is allowed unless the arrays are on a
    CPU, where writing takes cores from the training, and the arrays must be copied.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int,
        identity: Mapping[str, Any],
        background: bool | None = None,
    ) -> None:
        """Raises InputError if `keep` is less than 1."""
        if keep < 1:
            raise InputError(f"At least 1 checkpoint must be kept, not {keep}: raise `keep`.")
        self.folder = Path(folder).absolute()  # Orbax does not accept a relative path
        self._keep = keep
        self._identity = dict(identity)
        self._background = background
        self._saving: _Saving | None = None

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
        wait: bool = True,
    ) -> Path:
        """Writes the checkpoint of `step`, and returns its folder.

        `write_files` writes more files into it, so that it can be read without its run folder.
        `write_parts` does so on every process, and needs `more_bytes` of disk space. An earlier
        checkpoint of the same step is kept until the new one is complete.

        Without `wait`, this may return when these files are written and the arrays are copied to
        the host. The arrays are written meanwhile, and `finish` or the next `save` completes it.

        Raises:
            InputError: the disk is too small or full. The earlier checkpoints are unchanged.
        """
        self.finish()
        arrays = named_leaves(state)
        partial = self.folder / f"{PARTIAL}{step:08d}"
        on_cpu = any(next(iter(a.devices())).platform == "cpu" for a in arrays.values())
        wait = wait or not (self._background or (self._background is None and not on_cpu))
        if on_cpu and not wait:  # Orbax reads the memory of these arrays, which a step may donate
            arrays = jax.jit(lambda leaves: jax.tree.map(jnp.copy, leaves))(arrays)
        with self._removing(step):
            with collective(f"begin the checkpoint of step {step}"):
                if is_leader():
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self._tidy()
                    self.require_space(arrays, more_bytes=more_bytes)
                    partial.mkdir()
            with collective(f"write the files of step {step}"):
                write_parts(partial)
                if is_leader():
                    write_files(partial)
            with collective(f"write the checkpoint of step {step}"), orbax_context():
                response = ocp.save_async(partial / STATE, arrays)
        content = manifest_content(step, self._identity, config, arrays)
        self._saving = _Saving(step, content, read_when_written(partial, response))
        if wait:
            self.finish()
        return self.folder / f"{step:08d}"

    def finish(self, *, wait: bool = True) -> None:
        """Completes the checkpoint that is being written; all processes call this before a step.

        Without `wait`, nothing happens before all of them have written their part.

        Raises:
            InputError: as for `save`.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        step, facts = saving.step, saving.facts
        partial, final = (self.folder / f"{prefix}{step:08d}" for prefix in (PARTIAL, ""))
        with self._removing(step):
            while True:
                futures.wait([facts], timeout=1 if wait else 0)
                done = facts.done()
                failed = done and facts.exception() is not None
                all_done, all_failed = gather(np.asarray([done, failed])).T
                if all_done.all() or all_failed.any():  # the others may wait for one that failed
                    break
                if not wait:
                    self._saving = saving
                    return
            with collective(f"write the checkpoint of step {step}"):
                mine = facts.result() if done else {}
            gathered = gather_facts(mine)
            with collective(f"publish the checkpoint of step {step}"):
                if is_leader():
                    write_manifest(partial, saving.content, list_facts(partial, gathered))
                    self._publish(partial, final)

    @contextmanager
    def _removing(self, step: int) -> Iterator[None]:
        """On an error, removes the unfinished checkpoint; a full disk is an error of the user."""
        try:
            yield
        except BaseException as error:
            if is_leader():  # the next save removes files that Orbax still writes after this
                shutil.rmtree(self.folder / f"{PARTIAL}{step:08d}", ignore_errors=True)
            if (reason := disk_reason(error)) is not None:
                problem = f"Cannot write the checkpoint of step {step} to {self.folder} ({reason})"
                raise InputError(f"{problem}; free some space.") from error
            raise

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
        if not found and (self.folder.parent / MANIFEST).exists():
            raise InputError(
                f"{self.folder.parent} is a checkpoint; give the run's folder, and the step."
            )
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
                with orbax_context(partial):
                    arrays = ocp.load(self.path(candidate) / STATE, here)
                leaves = [arrays.get(name) for name in wanted]
                return candidate, jax.tree.unflatten(jax.tree.structure(abstract), leaves)
            if step is None and not self.path(candidate).exists():
                raise InputError(f"{self.path(candidate)} was just removed; try again.")
            if is_leader() and step is None and candidate != found[0]:
                print(
                    f"The checkpoint of step {candidate} is damaged ({damage}): restoring the one "
                    "before it.",
                    file=sys.stderr,
                )
        if step is None:
            raise InputError(
                f"No checkpoint in {self.folder} is undamaged (step {found[0]}: {damage}); start a "
                "new run."
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
        check_identity(self.folder, content, self._identity)
        check_arrays(content, wanted, partial=partial)
        return find_damage(folder, files)

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
                removed = path.rename(path.with_name(PARTIAL + path.name))
                removed.unlink() if removed.is_symlink() else shutil.rmtree(removed)

    def _free(self) -> int:
        there = next(path for path in [self.folder, *self.folder.parents] if path.exists())
        return shutil.disk_usage(there).free

    def _full(self, needed: int, count: int) -> InputError:
        what = "The checkpoint does" if count == 1 else f"{count} checkpoints do"
        return InputError(
            f"{what} not fit in {self.folder}: {needed:,} bytes needed, {self._free():,} free; "
            "free some space, or lower train.keep_checkpoints."
        )


class _Saving(NamedTuple):
    """A checkpoint that is being written: step, manifest without files, this process's share."""

    step: int
    content: Mapping[str, Any]
    facts: futures.Future[dict[str, FileFacts]]
