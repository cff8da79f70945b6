"""The identity of a run: configuration, texts, tokenizer, hash, format of the stored rows.

A run can be resumed only with the same identity. Another run's weights can start a new run only if
they have the same meaning in it. An error names the difference and the remedy in one sentence.
"""

import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax

from engram_jax.config import Config, load_config
from engram_jax.errors import InputError
from engram_jax.files import parse_json, read_regular
from engram_jax.hashing import NgramHash
from engram_jax.memory.layout import RecordLayout
from engram_jax.optimizer import OptimizerConfig
from engram_jax.program import Program
from engram_jax.tokenizer import Tokenizer
from engram_jax.typing import PyTree

# Fields that may change when a run is resumed. They change trained weights by rounding only.
CHANGEABLE = (
    "memory.gather",
    "memory.placement",
    "model.attention.implementation",
    "model.engram.implementation",
    "model.experts.implementation",
    "model.remat",
    "model.scan",
    "mesh.",
    "data.workers",
    "data.prefetch",
    "data.cache",
    "train.accumulation",
    "train.log_every",
    "train.evaluate_",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)


# Fields that may change with `reschedule`. They affect training after the newest checkpoint.
_RESCHEDULABLE = (
    *("train.steps", "memory.frozen"),
    # Not the choice of the optimizer, because the states of optimizers differ.
    *(f"optimizer.{f.name}" for f in fields(OptimizerConfig) if f.name != "matrices"),
    *(f"memory.adam.{name}" for name in ("factor", "b1", "b2", "eps")),
)


def checkpoint_identity(
    tokenizer: Tokenizer, ngram_hash: NgramHash | None, layout: RecordLayout
) -> dict[str, Any]:
    """The values that a checkpoint and the run that restores it must share, as plain JSON.

    They are the values that change the meaning of a stored number. A field added later must be left
    out if it has its default, because older checkpoints do not have it.
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
    """The values on which `make_config_row_adam` depends."""
    optimizer = config.optimizer
    schedule = (
        *(optimizer.learning_rate, optimizer.warmup_steps),
        *(optimizer.decay, optimizer.final_fraction),
    )
    return config.memory.adam, config.memory.frozen, schedule, config.train.steps


def stored_hash(ours: NgramHash, config: Config, folder: Path) -> NgramHash:
    """The stored hash of a folder's run, which NumPy's random stream cannot change.

    Raises:
        InputError: it differs from `ours` in more than the multipliers.
    """
    stored = NgramHash.load(folder / "hash.json")
    if stored.projection.fingerprint != ours.projection.fingerprint:
        raise InputError(
            f"{folder} was hashed for another tokenizer than {config.data.tokenizer!r}; restore "
            "that tokenizer, or start another run."
        )
    if stored.spec != ours.spec:
        raise InputError(
            f"{folder / 'hash.json'} does not match {folder / 'config.json'}: {stored.spec} there, "
            f"{ours.spec} here; restore it from a checkpoint's folder."
        )
    return stored


def check_same_run(config: Config, folder: Path, *, reschedule: bool = False) -> None:
    """Checks that a folder's run has this configuration, except for fields that may change.

    Raises:
        InputError: it does not; the message gives the flags that would resume it.
    """
    stored = load_config(folder / "config.json")
    ours, theirs = _flatten(asdict(config)), _flatten(asdict(stored))
    changeable = CHANGEABLE + (_RESCHEDULABLE if reschedule else ())
    differ = _differing(ours, theirs, changeable)
    if not differ:
        return
    if "name" in differ or ours.keys() != theirs.keys():
        wanted = f"the configuration {theirs['name']} and the flags that it was started with"
    else:
        wanted = " ".join(_as_flag(name, theirs[name]) for name in differ)
    message = f"{folder} holds another run: give {wanted} to resume it"
    if all(name.startswith(_RESCHEDULABLE) for name in differ):
        message += ", add --reschedule to continue it with your flags"
    if any((folder / "checkpoints").glob("*")):
        weights = f" (to start with the weights of {folder}, add --start-from {folder})"
    else:
        message += f", delete {folder}, which has no checkpoint, to start again"
        weights = ""
    raise InputError(f"{message}, or name another --run folder{weights}.")


def check_saved_by(config: Config, folder: Path, *, trains: bool) -> None:
    """Checks that a run with this configuration saved the checkpoint in a folder.

    It could be of another run, or the run's config.json could have been edited. What a resumed or
    rescheduled run may change can differ, and the places of texts and tokenizer.

    Args:
        config: the configuration of the run.
        folder: folder of the checkpoint.
        trains: the run goes on, so all that changes training matters. Otherwise, only what changes
            the model and the held-out texts.

    Raises:
        InputError: another run saved it.
    """
    ours, theirs = (_flatten(asdict(of)) for of in (config, load_config(folder / "config.json")))
    for of in (ours, theirs):  # texts are compared by name, without folder and ending
        of["data.sources"] = [Path(source).name.split(".")[0] for source in of["data.sources"]]
    if trains:
        parts: tuple[str, ...] = ("model.", "memory.", "optimizer.", "data.", "train.")
        free: tuple[str, ...] = ()
    else:
        parts, free = ("model.", "memory.", "data.held_out"), ("memory.adam.", "memory.init_scale")
    free = (*CHANGEABLE, *_RESCHEDULABLE, *free, "data.tokenizer", "memory.start_from")
    for name in _differing(ours, theirs, free):
        if name.startswith(parts):
            raise InputError(
                f"Another run saved the checkpoint {folder}, or the run's config.json was changed: "
                f"{name} is {theirs.get(name)} in the checkpoint, and {ours.get(name)} in the "
                "run's config.json; restore that file from a checkpoint of the run, or move this "
                "checkpoint away."
            )


def _differing(ours: dict[str, Any], theirs: dict[str, Any], free: tuple[str, ...]) -> list[str]:
    """The fields that differ, except for those that begin with a name in `free`.

    If only one of them has a part, such as experts, all fields of that part differ.
    """
    return [
        name
        for name in ours | theirs
        if ours.get(name) != theirs.get(name) and not name.startswith(free)
    ]


def _as_flag(name: str, value: Any) -> str:
    """The flag and its values, as on a command line."""
    values = value if isinstance(value, (list, tuple)) else [value]
    words = [shlex.quote(str(word)) for word in values]
    return " ".join([f"--{name.replace('_', '-')}", *words])


def check_texts(texts: dict[str, Any], folder: Path) -> None:
    """Checks that a resumed run reads the same tokens in the same order as when it started."""
    path = folder / "texts.json"
    try:
        begun = parse_json(read_regular(path))
        tokenizer, theirs = begun["tokenizer"], dict(begun["corpora"])
        order = begun.get("order", 1)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path}, the fingerprints of the texts, is missing or damaged ({error}); restore it, "
            "or choose another --run folder to start again."
        ) from error
    if tokenizer != texts["tokenizer"]:
        raise InputError(
            f"{folder} was begun with another tokenizer; restore that, or choose another --run "
            "folder to start again."
        )
    ours = texts["corpora"]
    changed = [name for name in ours if theirs.get(name) != ours[name]]
    if changed:
        raise InputError(
            f"The text of {', '.join(changed)} is not what {folder} was begun with; restore it, or "
            "choose another --run folder to start again."
        )
    if order != texts["order"]:
        raise InputError(
            f"{folder} was begun by a version that reads texts in another order; choose another "
            f"--run folder (to start with its weights, add --start-from {folder})."
        )


def check_fitting(
    folder: Path,
    ours: tuple[Program, Tokenizer],
    theirs: tuple[Program, Tokenizer],
) -> None:
    """Checks that another run can start with the weights of the run in a folder.

    Args:
        folder: folder of the run that has the weights.
        ours: program and tokenizer of the run that would start with them.
        theirs: program and tokenizer of the run in the folder.

    Raises:
        InputError: it has another tokenizer, hash, row format, or other sizes.
    """
    (program, tokenizer), (other, other_tokenizer) = ours, theirs
    if other_tokenizer.fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"{folder} has another tokenizer than this run, so its embeddings are for other "
            "tokens; give this run the same data.tokenizer."
        )
    if (
        program.ngram_hash
        and other.ngram_hash
        and program.ngram_hash.fingerprint != other.ngram_hash.fingerprint
    ):
        raise InputError(
            f"{folder} has the hash {other.ngram_hash.fingerprint}, this run has "
            f"{program.ngram_hash.fingerprint}: its table rows are for other n-grams. Give this "
            "run the same memory and tokenizer."
        )
    layout, other_layout = program.config.memory.layout, other.config.memory.layout
    if program.ngram_hash and layout != other_layout:
        raise InputError(
            f"{folder} stores its rows as {other_layout}, this run as {layout}; give this run the "
            "same memory.row_width and memory.storage."
        )
    wanted, found = (
        _shapes(each.on_device().abstract_state().weights) for each in (program, other)
    )
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise InputError(
                f"Parameter {name} is {found.get(name, 'missing')} in {folder}, and "
                f"{wanted.get(name, 'missing')} in this run; give this run the same model and "
                "memory sizes."
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
