"""The public names, and what importing parts of the package may load."""

import subprocess
import sys

import pytest
from programs import ROOT, run_program

import engram_jax


def test_every_public_name_is_there() -> None:
    for name in engram_jax.__all__:
        assert getattr(engram_jax, name).__module__.startswith("engram_jax.")
    with pytest.raises(AttributeError):
        engram_jax.nothing  # noqa: B018


def test_host_modules_import_no_jax() -> None:
    program = """
import importlib, sys
for module in ("hashing", "compression", "tokenizer", "memory.plan", "evaluation.statistics"):
    importlib.import_module(f"engram_jax.{module}")
    assert "jax" not in sys.modules, f"{module} imports JAX"
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_drop_in_example_learns_with_the_memory(capfd: pytest.CaptureFixture[str]) -> None:
    ended = run_program(capfd, "examples/drop_in.py")
    without, with_memory = (float(line.split()[-4]) for line in ended.out.splitlines())
    assert with_memory < 0.05 < 1 < without
