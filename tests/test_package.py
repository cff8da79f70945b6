"""The public names, and what importing parts of the package may load."""

import subprocess
import sys
from pathlib import Path

import pytest

import engram_jax

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_there() -> None:
    for name in engram_jax.__all__:
        assert getattr(engram_jax, name).__module__.startswith("engram_jax.")
    with pytest.raises(AttributeError):
        engram_jax.nothing  # noqa: B018


@pytest.mark.parametrize("module", ["hashing", "compression", "tokenizer", "memory.plan"])
def test_host_modules_import_no_jax(module: str) -> None:
    program = f"import engram_jax.{module}, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_drop_in_example_learns_with_the_memory() -> None:
    result = subprocess.run(
        [sys.executable, "examples/drop_in.py"],
        cwd=ROOT,
        env={"PYTHONPATH": ".", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    without, with_memory = (float(line.split()[-4]) for line in result.stdout.splitlines())
    assert with_memory < 0.05 < 1 < without
