"""How processes divide the files of a checkpoint, and put their checksums together."""

import zlib
from pathlib import Path

import numpy as np
import pytest

from engram_jax import checkpoint_files
from engram_jax.checkpoint_files import (
    FileFacts,
    find_damage,
    gather_facts,
    list_facts,
    list_files,
    read_share,
    share_of,
)


def sizes_of(*writers: int) -> dict[str, int]:
    """Files of 100 bytes, of which `writers` wrote so many each, and two files of no writer."""
    own = {
        f"state/default/ocdbt.process_{index}/d/{number}": 100
        for index, count in enumerate(writers)
        for number in range(count)
    }
    return own | {"state/manifest.ocdbt": 7, "config.json": 30}


@pytest.mark.parametrize("writers", [(3, 3), (8, 0), (1, 2, 3, 4), (), (1, 1, 1)])
@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_every_file_has_one_reader_and_all_read_about_as_much(
    writers: tuple[int, ...], processes: int
) -> None:
    sizes = sizes_of(*writers)
    shares = [share_of(sizes, process, processes) for process in range(processes)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) <= sum(sizes.values()) / processes + 100


def test_a_process_reads_what_it_wrote() -> None:
    sizes = sizes_of(3, 3)
    for process in (0, 1):
        own = [name for name in sizes if f"process_{process}/" in name]
        assert set(own) <= set(share_of(sizes, process, 2))


def test_checksums_of_two_processes_come_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process has read a name of its own, an old file, and only half of the rest."""
    contents = {name: name.encode() * 9 for name in ("a", "b/c", "b/d", "e")} | {"empty": b""}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert list_files(tmp_path) == {name: len(content) for name, content in contents.items()}
    expected = {name: FileFacts(len(data), zlib.crc32(data)) for name, data in contents.items()}
    assert read_share(tmp_path) == expected
    assert list_facts(tmp_path, gather_facts(expected)) == expected

    large = FileFacts(5 << 32 | 7, 0xFFFFFFFF)
    sent: list[np.ndarray] = []
    monkeypatch.setattr(checkpoint_files, "gather", lambda rows: sent.append(rows) or rows[None])
    gather_facts({"gone": large, "b/c": expected["b/c"], "e": FileFacts(3, 1)})
    count, others = sent
    monkeypatch.setattr(checkpoint_files, "facts_of", lambda path: FileFacts(-1, path.name))
    monkeypatch.setattr(
        checkpoint_files,
        "gather",
        lambda rows: np.stack([rows, count if rows.ndim == 0 else others]),
    )
    mine = {name: expected[name] for name in ("a", "b/d", "empty")}
    assert list_facts(tmp_path, gather_facts(mine)) == expected | {"e": FileFacts(-1, "e")}


def test_a_large_size_survives_being_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = FileFacts(5 << 32 | 7, 0xFFFFFFFE)
    monkeypatch.setattr(checkpoint_files, "list_files", lambda folder: {"large": large.size})
    assert list_facts(tmp_path, gather_facts({"large": large})) == {"large": large}


def test_damage_is_that_of_the_first_file(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode() * 5_000_000)  # more than a block
    facts = read_share(tmp_path)
    assert find_damage(tmp_path, facts) is None
    for name, damage in (("c", "is missing"), ("b", "has 1 bytes, not 5,000,000")):
        (tmp_path / name).unlink() if name == "c" else (tmp_path / name).write_bytes(b"b")
        assert find_damage(tmp_path, facts) == f"{name} {damage}"
    (tmp_path / "a").write_bytes(b"a" * 4_999_999 + b"b")
    assert find_damage(tmp_path, facts) == "a has another checksum"
