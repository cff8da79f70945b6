"""The files of a run folder that make it self-contained: configuration, hash, tokenizer, versions.

A run folder can be moved, copied, archived and read without the tokenizer file that it was made
with. It contains no training text.
"""

import json
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engram_jax.compression import VocabularyProjection, project_vocabulary
from engram_jax.config import Config, MemoryConfig, save_config
from engram_jax.errors import InputError
from engram_jax.files import atomic_write, hold_lock
from engram_jax.hashing import NgramHash
from engram_jax.tokenizer import Tokenizer, load_tokenizer

_PACKAGES = ("engram-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

_TOKENIZERS = ("tokenizer.model", "tokenizer.json")

# Names of files that a killed start can leave in the folder, before it writes config.json.
_INCOMPLETE_START = re.compile(
    r"lock|(partial-\d+-|partial-)?((hash|texts|config|versions)\.json|tokenizer\.(json|model))"
)


def write_beginning(
    folder: Path,
    config: Config,
    tokenizer: Tokenizer,
    ngram_hash: NgramHash | None,
    texts: Mapping[str, Any],
) -> None:
    """Writes the files that define a run. The last one, config.json, marks them complete."""
    if ngram_hash is not None:
        ngram_hash.save(folder / "hash.json")
    for name in _TOKENIZERS:
        (folder / name).unlink(missing_ok=True)
    store_tokenizer(folder, tokenizer)
    versions = {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    for name, content in (("texts", texts), ("versions", versions)):
        with atomic_write(folder / f"{name}.json") as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n")
    save_config(config, folder / "config.json")


def store_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes a run's tokenizer, unless its folder has one. (Earlier versions wrote none.)"""
    path = folder / f"tokenizer{tokenizer.suffix}"
    if not path.exists():
        with atomic_write(path) as partial:
            partial.write_bytes(tokenizer.file)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # such as a clone that is not installed
        return None


def load_run_tokenizer(config: Config, folder: Path) -> Tokenizer:
    """The tokenizer of a run folder. If it has none, the tokenizer of the configuration.

    Raises:
        InputError: it is missing or damaged.
    """
    data = config.data
    path: str | Path = data.tokenizer
    if (folder / "config.json").exists():  # otherwise a killed start may have left another
        stored = (folder / name for name in _TOKENIZERS)
        path = next((file for file in stored if file.exists()), path)
    return load_tokenizer(path, pad_id=data.pad_id, bos_id=data.bos_id, eos_id=data.eos_id)


def check_empty(folder: Path) -> None:
    """Checks that a folder can become a run folder.

    Raises:
        InputError: it contains something else than a killed start leaves.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose a folder for the run.")
    if folder.exists() and any(
        not _INCOMPLETE_START.fullmatch(path.name) for path in folder.iterdir()
    ):
        raise InputError(f"{folder} is not empty and holds no run; choose another folder.")


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Locks a run folder, so that no other program trains in it.

    Raises:
        InputError: another program trains in it, or it cannot be locked.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(hold_lock(folder / "lock", wait=False))
        except BlockingIOError as error:
            raise InputError(
                f"Another process is training in {folder}; wait for it, or choose another --run "
                "folder."
            ) from error
        yield


def make_hash(config: Config, folder: Path) -> tuple[Tokenizer, NgramHash | None]:
    """The tokenizer, and the hash if the model has memory."""
    tokenizer = load_run_tokenizer(config, folder)
    if tokenizer.vocab_size > config.model.vocabulary:
        raise InputError(
            f"Tokenizer {config.data.tokenizer!r} has {tokenizer.vocab_size} pieces, but the model "
            f"has {config.model.vocabulary}; set model.vocabulary to {tokenizer.vocab_size}."
        )
    if not config.memory.layers:
        return tokenizer, None
    is_qwen = config.memory.hash_variant == "qwen"
    spec = config.memory.hash_spec(tokenizer.eos_id if is_qwen else tokenizer.pad_id)
    if not config.memory.project_vocabulary:
        vocabulary = config.model.vocabulary if is_qwen else tokenizer.vocab_size
        identity = VocabularyProjection.identity(vocabulary)
        return tokenizer, NgramHash.build(spec, identity)
    return tokenizer, NgramHash.build(spec, project_vocabulary(tokenizer))


def warn_of_settings(config: Config) -> None:
    """Warns of settings that work, but are probably not intended."""
    layout, warm_up, steps = config.memory.layout, config.optimizer.warmup_steps, config.train.steps
    chosen = layout.width != MemoryConfig().row_width
    if config.memory.layers and chosen and layout.padding > 0.25:
        narrower, wider = layout.better_widths()
        print(
            f"At memory.row_width {layout.width}, {layout.padding:.0%} of the bytes of a table are "
            f"padding (of a row's values and moments to whole lines); {narrower} or {wider} waste "
            "less.",
            file=sys.stderr,
        )
    if warm_up >= steps:
        print(
            f"The learning rate only rises in this run, because optimizer.warmup_steps is {warm_up}"
            f" and train.steps is {steps}.",
            file=sys.stderr,
        )
