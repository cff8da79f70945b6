"""What binds the files of an export together: its format, and fingerprints in its metadata."""

import re
from pathlib import Path

from engram_jax.errors import InputError
from engram_jax.formats.safetensors import Tensors
from engram_jax.hashing import NgramHash
from engram_jax.tokenizer import Tokenizer

FORMAT = "engram-jax 2"  # 2: with fingerprints


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
        raise InputError(f"{folder} is no export of this version; export the run again.")
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
