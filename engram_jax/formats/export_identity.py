"""What binds the files of an export together: format, fingerprints and checksums."""

import json
import re
from pathlib import Path

from engram_jax.checkpoint_files import FileFacts, damage_of, facts_of
from engram_jax.errors import InputError
from engram_jax.files import parse_json
from engram_jax.formats.safetensors import Tensors
from engram_jax.hashing import NgramHash
from engram_jax.tokenizer import Tokenizer

FORMAT = "engram-jax 3"  # 2: with fingerprints; 3: with checksums
CHECKSUMS = "checksums.json"
TENSORS = "model.safetensors"
_NOT_CHECKED = {"README.md", "eval.json", CHECKSUMS}


def write_checksums(folder: Path) -> None:
    """Writes sizes and checksums of the files that must not change."""
    names = sorted({path.name for path in folder.iterdir()} - _NOT_CHECKED)
    facts = {name: facts_of(folder / name)._asdict() for name in names}
    (folder / CHECKSUMS).write_text(json.dumps(facts, indent=1) + "\n")


def check_files(folder: Path, *, tensors: bool) -> None:
    """Compares the files of an export with their checksums.

    Args:
        folder: the export.
        tensors: also those of the tensors, which are all read for it.

    Raises:
        InputError: a file is damaged or was edited, or there are no checksums.
    """
    try:
        saved = parse_json((folder / CHECKSUMS).read_text("utf-8"))
        files = {Path(name).name: FileFacts(**facts) for name, facts in saved.items()}
        if missing := {"config.json", TENSORS} - files.keys():
            raise ValueError(f"without {min(missing)}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder} has no {CHECKSUMS} that can be read ({error}); export the run again."
        ) from error
    for name, facts in files.items():
        checked = tensors or name != TENSORS
        if checked and (damage := damage_of(folder / name, name, facts)):
            raise InputError(
                f"{folder} is damaged, or was edited: {damage}. Restore that, or export the run "
                "again."
            )


def check_parts(
    tensors: Tensors,
    folder: Path,
    ngram_hash: NgramHash | None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Checks that the files of an export belong together.

    Args:
        tensors: its tensors.
        folder: the export.
        ngram_hash: the hash in its `hash.json`; None without memory.
        tokenizer: its tokenizer; None: not checked.

    Raises:
        InputError: a file is of another export, or of another version of this format.
    """
    metadata = tensors.metadata
    if metadata.get("format") != FORMAT or not re.fullmatch(
        r"[0-9]{1,9}", metadata.get("step", "")
    ):
        raise InputError(
            f"{folder} is no export that this version of engram_jax reads ({FORMAT}); export the "
            "run again."
        )
    for what, fingerprint in fingerprints(ngram_hash, tokenizer).items():
        if metadata.get(what) != fingerprint:
            raise InputError(
                f"The {what} in {folder} is not the one that model.safetensors was exported with; "
                "export the run again."
            )


def fingerprints(ngram_hash: NgramHash | None, tokenizer: Tokenizer | None) -> dict[str, str]:
    """What an export depends on besides its tensors."""
    parts = {"hash": ngram_hash, "tokenizer": tokenizer}
    return {what: part.fingerprint for what, part in parts.items() if part is not None}
