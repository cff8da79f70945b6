"""What makes two runs the same: configuration, texts, tokenizer, hash, form of the stored rows.

A folder's run is resumed only by the run that it holds, and another run's weights begin a new one
only if they mean the same there. What differs is named in one sentence, with the remedy.
"""

import json
import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax

from engram_jax.config import Config, load_config
from engram_jax.errors import InputError
from engram_jax.hashing import NgramHash
from engram_jax.memory.layout import RecordLayout
from engram_jax.optimizer import OptimizerConfig
from engram_jax.program import Program
from engram_jax.tokenizer import Tokenizer
from engram_jax.typing import PyTree

# What may change when a run is resumed: none of it changes what is learned.
_CHANGEABLE = (
    "memory.gather",
    "model.attention.implementation",
    "model.engram.implementation",
    "model.experts.implementation",
    "model.remat",
    "model.scan",
    "mesh.",
    "data.workers",
    "data.prefetch",
    "data.cache",
    "train.log_every",
    "train.evaluate_",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)


# What may change if `reschedule` is given: how it goes on learning, from the newest checkpoint.
_RESCHEDULABLE = (
    *("train.steps", "memory.frozen"),
    # All but which optimizers there are: their states differ.
    *(f"optimizer.{f.name}" for f in fields(OptimizerConfig) if f.name != "matrices"),
    *(f"memory.adam.{name}" for name in ("factor", "b1", "b2", "eps")),
)


def checkpoint_identity(
    tokenizer: Tokenizer, ngram_hash: NgramHash | None, layout: RecordLayout
) -> dict[str, Any]:
    """What a checkpoint must share with the run that restores it, as plain JSON values.

    Only what changes the meaning of a stored number is here; fields are added when their value is
    not the one that older checkpoints mean by leaving them out.
    """
    identity: dict[str, Any] = {"tokenizer": tokenizer.fingerprint}
    if ngram_hash is not None:
        identity["hash"] = ngram_hash.fingerprint
        identity["record"] = {
            "width": layout.width,
            "value": layout.storage.value,
            "moments": layout.storage.moments,
            "second_moment": layout.storage.second_moment,
        }
    return identity


def row_adam_facts(config: Config) -> tuple[Any, ...]:
    """What `make_config_row_adam` depends on."""
    optimizer = config.optimizer
    schedule = (
        *(optimizer.learning_rate, optimizer.warmup_steps),
        *(optimizer.decay, optimizer.final_fraction),
    )
    return config.memory.adam, config.memory.frozen, schedule, config.train.steps


def stored_hash(ours: NgramHash, config: Config, folder: Path) -> NgramHash:
    """The hash that a folder's run began with, whatever multipliers NumPy draws today."""
    stored = NgramHash.load(folder / "hash.json")
    if stored.projection.fingerprint != ours.projection.fingerprint:
        raise InputError(
            f"{folder} was hashed for another tokenizer than {config.data.tokenizer!r}; restore "
            "that tokenizer or start another run."
        )
    if stored.spec != ours.spec:
        raise InputError(
            f"{folder / 'hash.json'} is of another memory than {folder / 'config.json'}: "
            f"{stored.spec} there, {ours.spec} here; restore it from a checkpoint's folder."
        )
    return stored


def check_same_run(config: Config, folder: Path, *, reschedule: bool = False) -> None:
    """Looks whether a folder's run is one of this configuration, but for what may change.

    Raises:
        InputError: it is not; the sentence gives the flags that would resume it.
    """
    stored = load_config(folder / "config.json")
    ours, theirs = _flatten(asdict(config)), _flatten(asdict(stored))
    changeable = _CHANGEABLE + (_RESCHEDULABLE if reschedule else ())
    # Parts that only one of them has, as experts, are a difference in all their fields.
    differ = [
        name
        for name in ours | theirs
        if ours.get(name) != theirs.get(name) and not name.startswith(changeable)
    ]
    if not differ:
        return
    if "name" in differ or ours.keys() != theirs.keys():
        wanted = f"the configuration {theirs['name']} and the flags that it was begun with"
    else:
        wanted = " ".join(_as_flag(name, theirs[name]) for name in differ)
    message = f"{folder} holds another run: give {wanted} to resume it"
    if all(name.startswith(_RESCHEDULABLE) for name in differ):
        message += ", add --reschedule to go on with yours"
    if any((folder / "checkpoints").glob("*")):
        weights = f" (to begin with the weights of this one, add --start-from {folder})"
    else:
        message += f", delete {folder}, which has no checkpoint, to start anew"
        weights = ""
    raise InputError(f"{message}, or name another --run folder{weights}.")


def _as_flag(name: str, value: Any) -> str:
    """As one would type it."""
    values = value if isinstance(value, (list, tuple)) else [value]
    words = [shlex.quote(str(word)) for word in values]
    return " ".join([f"--{name.replace('_', '-')}", *words])


def check_texts(texts: dict[str, Any], folder: Path) -> None:
    """Compares the fingerprints of tokenizer and corpora with those a resumed run began with."""
    path = folder / "texts.json"
    try:
        begun = json.loads(path.read_text())
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            f"{path}, the fingerprints of the texts, is missing or damaged ({error}); restore it, "
            "or give another --run folder to start anew."
        ) from error
    if begun["tokenizer"] != texts["tokenizer"]:
        raise InputError(
            f"{folder} was begun with another tokenizer; restore that, or give another --run "
            "folder to start anew."
        )
    ours, theirs = texts["corpora"], begun["corpora"]
    changed = [name for name in ours if theirs.get(name) != ours[name]]
    if changed:
        raise InputError(
            f"The text of {', '.join(changed)} is not what {folder} was begun with; restore it, or "
            "give another --run folder to start anew."
        )


def check_fitting(
    folder: Path,
    ours: tuple[Program, Tokenizer],
    theirs: tuple[Program, Tokenizer],
) -> None:
    """Looks whether the weights of the run in a folder can begin another run.

    Args:
        folder: of the run that has the weights.
        ours: the run that would begin with them: its program and tokenizer.
        theirs: the run in the folder.

    Raises:
        InputError: its tokenizer, hash, stored rows or sizes are others.
    """
    (program, tokenizer), (other, other_tokenizer) = ours, theirs
    if other_tokenizer.fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"{folder} has another tokenizer than this run, so its embeddings mean other "
            "tokens; give this run the same data.tokenizer."
        )
    if (
        program.ngram_hash
        and other.ngram_hash
        and program.ngram_hash.fingerprint != other.ngram_hash.fingerprint
    ):
        raise InputError(
            f"{folder} hashes with {other.ngram_hash.fingerprint}, this run with "
            f"{program.ngram_hash.fingerprint}: its table rows would mean other n-grams. Give "
            "this run the same memory and tokenizer."
        )
    layout, other_layout = program.config.memory.layout, other.config.memory.layout
    if program.ngram_hash and layout != other_layout:
        raise InputError(
            f"{folder} stores its rows as {other_layout}, this run as {layout}; give this run the "
            "same memory.row_width and memory.storage."
        )
    wanted, found = (_shapes(each.abstract_state().weights) for each in (program, other))
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise InputError(
                f"The model in {folder} has other weights than this run: at {name} "
                f"{found.get(name, 'nothing')} there, {wanted.get(name, 'nothing')} here; give "
                "this run the same model and memory sizes."
            )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves
    }


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= (
            _flatten(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return flat
