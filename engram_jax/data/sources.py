"""Finds the files of a source: a shipped corpus, a file, or a folder of files."""

import os
from collections.abc import Sequence
from pathlib import Path

from engram_jax.errors import InputError
from engram_jax.files import check_utf8, expand_home

CORPORA = Path(__file__).parent / "corpora"

# Two endings of ArrayRecord files are in use; Grain's documentation uses the first.
ENDINGS = (
    ".jsonl",
    ".jsonl.gz",
    ".jsonl.xz",
    ".jsonl.zst",
    ".txt",
    ".parquet",
    ".array_record",
    ".arrayrecord",
)

ALL_SOURCES = "all sources"  # the name of all sources together, in results


def shipped_corpora() -> tuple[str, ...]:
    """Return the names of the corpora that come with the package."""
    return tuple(sorted(path.name.split(".")[0] for path in CORPORA.glob("*.jsonl.xz")))


def resolve_source(name_or_path: str | Path) -> Path:
    """Return the file or folder of a shipped corpus's name, or of a path.

    The name of a shipped corpus means that corpus. For a file with the same name, write `./name`.

    Raises:
        InputError: it is neither the name of a shipped corpus nor a readable file or folder.
    """
    if str(name_or_path) in shipped_corpora():
        return CORPORA / f"{name_or_path}.jsonl.xz"
    if not str(name_or_path).strip():
        raise InputError("A source has an empty name; give a shipped corpus or a path.")
    path = expand_home(name_or_path)
    if path.is_dir():
        if not source_files(path):
            raise InputError(f"folder {path} holds no file that ends in {', '.join(ENDINGS)}.")
    elif not path.is_file():
        raise InputError(
            f"source {str(name_or_path)!r} is neither a file, a folder nor a shipped corpus "
            f"({', '.join(shipped_corpora())}); check the path. File names must end in "
            f"{', '.join(ENDINGS)}."
        )
    elif ending_of(path) is None:
        raise InputError(f"cannot read {path}: its name must end in {', '.join(ENDINGS)}.")
    check_utf8(path.resolve(), "a source")
    return path


def source_name(path: Path) -> str:
    """Return the name of a resolved source: the file's name without its ending.

    Links are not followed, because the files of some caches are named by their hash.
    """
    name = Path(os.path.abspath(path)).name
    return name[: len(name) - len(ending_of(path) or "")]


def source_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each of several resolved sources, by which results are listed.

    Sources with the same file name also get the folders that distinguish them, as in "en/train".

    Raises:
        InputError: two sources cannot be distinguished or share a file, or one has the name of
            their sum.
    """
    parts = [[*Path(os.path.abspath(path)).parts[:-1], source_name(path)] for path in paths]
    names = [of_path[-1] for of_path in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        names = [
            name if names.count(name) == 1 else "/".join(of_path[-depth:])
            for name, of_path in zip(names, parts, strict=True)
        ]
    for name, path in zip(names, paths, strict=True):
        if names.count(name) > 1:
            raise InputError(
                f"Two sources are called {source_name(path)!r}, and results are listed by this "
                "name; rename one."
            )
        if name == ALL_SOURCES:
            raise InputError(f"Results for all sources are called {name!r}; rename {path}.")
    owners: dict[Path, Path] = {}
    for path in paths:
        for file in source_files(path):
            if (owner := owners.setdefault(file.resolve(), path)) != path:
                raise InputError(f"{file} is also in the source {owner}; remove one of them.")
    return names


def source_files(path: Path) -> list[Path]:
    """Return the files of a resolved source, in the order in which they are read."""
    return scan(path)[0] if path.is_dir() else [path]


def scan(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """Return the files of a folder that are read, and why the others are not, sorted by path.

    Links are followed. A file or folder that is reached again, by another link, is read once.

    Raises:
        InputError: a folder cannot be read, or a link leads nowhere.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot read {error.filename}: {error.strerror}.") from error

    files: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders.sort()
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        files += (Path(place, name) for name in names)
    read: dict[tuple[int, int], Path] = {}
    others: dict[Path, str] = {}
    for file in sorted(files):
        if ending_of(file) is None:
            others[file] = "the ending of its name"
        elif not file.exists():
            raise InputError(f"{file} is a link to a file that does not exist; remove it.")
        elif not file.is_file():
            others[file] = "no regular file"
        elif (first := read.setdefault((file.stat().st_dev, file.stat().st_ino), file)) != file:
            others[file] = f"the same file as {first.relative_to(folder)}"
    return list(read.values()), others


def ending_of(path: Path) -> str | None:
    """Return the ending of a file that is read, None for another file."""
    name = path.name.lower()
    return next((ending for ending in ENDINGS if name.endswith(ending)), None)
