"""The manifest of a checkpoint: what it holds, and for which hash, tokenizer and configuration."""

import json
import os
import zlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from engram_jax.checkpoint_files import FileFacts
from engram_jax.errors import InputError
from engram_jax.files import is_irregular, parse_json, sync_folder

MANIFEST = "manifest.json"
FORMAT = 4  # in format 1 models did not scale the embedding; in 2 a table was four arrays
RECORD_AS_TEXT = 3  # in format 3 the identity described the row records by a Python repr

type Arrays = Mapping[str, jax.Array] | Mapping[str, jax.ShapeDtypeStruct]


def manifest_content(
    step: int, identity: Mapping[str, Any], config: Mapping[str, Any], arrays: Arrays
) -> dict[str, Any]:
    """What a manifest says, except for the files."""
    return {
        "format": FORMAT,
        "step": step,
        "identity": identity,
        "config": config,
        "arrays": _described(arrays),
        "versions": {name: version(name) for name in ("jax", "orbax-checkpoint")},
    }


def write_manifest(
    folder: Path, content: Mapping[str, Any], files: Mapping[str, FileFacts]
) -> None:
    """Writes the manifest of a checkpoint's folder, after all other files.

    Args:
        folder: the folder.
        content: what the manifest says beside that.
        files: the facts of all other files.
    """
    content = {**content, "files": {name: facts._asdict() for name, facts in files.items()}}
    manifest = {"crc32": zlib.crc32(json.dumps(content).encode()), "content": content}
    unfinished = folder / "manifest.partial"
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1))
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(folder / MANIFEST)
    sync_folder(folder)


def read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, FileFacts]]:
    """Returns the content of a manifest, and the facts of its files.

    Raises:
        ValueError, TypeError, KeyError: it is damaged.
        OSError: it cannot be read.
    """
    path = folder / MANIFEST
    if is_irregular(path):
        raise ValueError(f"{path} is no regular file")
    manifest = parse_json(path.read_text(encoding="utf-8"))
    content: dict[str, Any] = manifest["content"]
    if zlib.crc32(json.dumps(content).encode()) != manifest["crc32"]:
        raise ValueError(f"{path} has a wrong checksum")
    return content, {name: FileFacts(**facts) for name, facts in content["files"].items()}


def check_identity(folder: Path, content: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Checks that a checkpoint in `folder` has a format that can be read, and this identity.

    Raises:
        InputError: it has another one.
    """
    which = f"The checkpoint of step {content['step']} in {folder}"
    if content["format"] not in (FORMAT, RECORD_AS_TEXT):
        raise InputError(
            f"{which} has format {content['format']}, and this version reads {RECORD_AS_TEXT} and "
            f"{FORMAT}: use the version that wrote it."
        )
    saved = content["identity"]
    names = saved.keys() | ours.keys()
    if content["format"] == RECORD_AS_TEXT:
        names -= {"record"}  # checked through the configuration and the array shapes
    for name in sorted(names):
        if saved.get(name) != ours.get(name):
            raise InputError(
                f"{which} was saved with another {name} ({saved.get(name)}, here "
                f"{ours.get(name)}): use the {name} of that run or another run folder."
            )


def check_arrays(content: Mapping[str, Any], wanted: Arrays, *, partial: bool) -> None:
    """Checks that a checkpoint has these arrays; with `partial`, it may have more.

    Raises:
        InputError: it has other arrays.
    """
    saved, ours = content["arrays"], _described(wanted)
    for name in [*ours, *(name for name in saved if name not in ours and not partial)]:
        here, there = ours.get(name), saved.get(name)
        if here != there:
            texts = [
                f"{array['dtype']}{array['shape']}" if array else "nothing"
                for array in (there, here)
            ]
            raise InputError(
                f"The checkpoint of step {content['step']} holds {texts[0]} where the model has "
                f"{texts[1]}, for {name}: use the config that it was saved with."
            )


def _described(arrays: Arrays) -> dict[str, dict[str, Any]]:
    return {
        name: {"shape": list(array.shape), "dtype": str(array.dtype)}
        for name, array in arrays.items()
    }
