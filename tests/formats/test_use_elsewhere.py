"""The readers of docs/use_elsewhere.md, as they stand there, against our own forward pass."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import golden_form, load_golden, set_golden_weights
from tiny_runs import make_run, plain_pass

from engram_jax.formats.export import export_run, import_run
from engram_jax.formats.quantize import STORED, TableType
from engram_jax.layers.engram import Engram
from engram_jax.run import Run

PAGE = Path(__file__).parents[2] / "docs" / "use_elsewhere.md"


def reader(name: str) -> SimpleNamespace:
    """The names that the program of the page with this class defines."""
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (program,) = [program for program in programs if f"class {name}" in program]
    assert len(program.splitlines()) < 100
    names: dict[str, object] = {}
    exec(compile(program, str(PAGE), "exec"), names)
    return SimpleNamespace(**names)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.open(make_run(tmp_path_factory.mktemp("engram"), "engram").folder)


@pytest.fixture(scope="module")
def logits(run: Run) -> Callable[[np.ndarray], np.ndarray]:
    decode = plain_pass(run, run.restore_weights())

    def apply(tokens: np.ndarray) -> np.ndarray:
        zeros, positions = np.zeros_like(tokens), np.arange(tokens.size, dtype=np.int32)[None]
        return np.asarray(decode(tokens, zeros, positions)[0][0])

    return apply


def draw_tokens(vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).integers(4, vocabulary, (1, 24), dtype=np.int32)


def test_the_numpy_reader_gives_our_logits(
    run: Run, logits: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    export_run(run, run.restore_weights(), tmp_path / "export")
    tokens = draw_tokens(run.config.model.vocabulary)
    found = reader("Model").Model(tmp_path / "export")(tokens[0])
    assert found.dtype == np.float32
    expected = logits(tokens)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("table_type", sorted(set(STORED) - {"float32"}))
def test_the_numpy_reader_reads_all_types(run: Run, tmp_path: Path, table_type: TableType) -> None:
    export_run(run, run.restore_weights(), tmp_path / "export", table_type)
    tokens = draw_tokens(run.config.model.vocabulary)[0]
    imported = import_run(tmp_path / "export", tmp_path / "run")
    table = imported.restore_weights().tables[1].unpack().value
    rows = imported.program.ngram_hash.hash_tokens(1, tokens)
    blocks = len(table) // 4096
    expected = np.asarray(table)[rows % 4096 * blocks + rows // 4096].reshape(len(tokens), -1)
    found = reader("Model").Model(tmp_path / "export").memory(1, tokens)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["a_small", "b_small"])
def test_the_pytorch_layer_is_ours(name: str) -> None:
    torch = pytest.importorskip("torch", reason="its wheel takes gigabytes, so CI has none")
    golden, sizes = load_golden(name)
    form, memory_width = golden_form(sizes), golden["key_w"].shape[1]
    ours = Engram(sizes["hidden"], memory_width, form, branches=sizes["branches"], rngs=nnx.Rngs(0))
    set_golden_weights(ours, golden)
    weights = {
        ".".join(map(str, path)): np.asarray(leaf)
        for path, leaf in nnx.to_flat_state(nnx.state(ours, nnx.Param))
    }
    layer = reader("Engram").Engram(weights, vars(form))
    memory = np.random.default_rng(0).normal(size=(*golden["ids"].shape, memory_width))
    memory = memory.astype(np.float32)
    expected, _ = ours(jnp.asarray(golden["hidden"]), jnp.asarray(memory))
    with torch.no_grad():
        found = layer(torch.from_numpy(golden["hidden"]), torch.from_numpy(memory))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
