"""The benchmarks of what changes most run at the smallest sizes: nothing else calls them."""

import sys
from pathlib import Path

import jax
import pytest
from tiny_runs import tiny_config, vary

from benchmarks import decoding, placement
from engram_jax.costs.accounting import account
from engram_jax.sharding import make_mesh


@pytest.mark.slow
def test_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path)
    kinds = {"default": config, "dense": vary(config, memory={"layers": ()})}
    monkeypatch.setattr(decoding, "load_named_config", kinds.get)
    monkeypatch.setattr(decoding, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
    decoding.main(rounds=1, large_width=64)
    assert len(capsys.readouterr().out.splitlines()) == 3 + 3 * 3 + 2 * 2 + 4 + 4


def test_the_large_model_has_four_times_the_last_level_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, size in enumerate(("48K", "491520K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(decoding, "CACHES", tmp_path)
    config = decoding.large_config(None)
    smaller = decoding.large_config(config.model.width - 128)
    assert account(smaller).total < 480 << 20 <= account(config).total  # four bytes each


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("flags", "lines"), [(["--steps", "1"], 3 + 2 * 2 + 5), (["--decode"], 5), (["--read"], 8)]
)
def test_placement(
    flags: list[str],
    lines: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = vary(tiny_config(tmp_path), train={"steps": 9})
    monkeypatch.setattr(placement, "load_named_config", lambda name: config)
    monkeypatch.setattr(sys, "argv", ["placement", "--rounds", "1", *flags])
    placement.main()
    assert len(capsys.readouterr().out.splitlines()) == lines
