"""Tests that need a GPU: kernels at the sizes of real layers, cuDNN, training runs.

Skipped elsewhere, CI included, which has none. On a GPU (`-k pallas_gpu` finds the kernels' other
tests in tests/pallas_kernels): `JAX_PLATFORMS=cuda python -m pytest -n 0 tests/test_gpu.py`.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from tiny_runs import losses, tiny_config, vary

from engram_jax.config import Config, TrainConfig
from engram_jax.layers.attention import AttentionConfig
from engram_jax.layers.scaled_dot_product import attend
from engram_jax.memory.row_adam import RowAdamConfig
from engram_jax.run import Run
from engram_jax.trainer import train
from pallas_kernels import gated_fusion, hashed_gather
from pallas_kernels.gated_fusion import FusionForm
from pallas_kernels.hashed_gather import RowFormat

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

FORM = FusionForm(2.0**-23, dilation=3)


def assert_relative(found: Any, expected: Any, limit: float) -> None:
    """‖found − expected‖ ≤ limit·‖expected‖, for every array."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error <= limit, error  # false for NaN


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 1e-5), (jnp.bfloat16, 4e-3)])
@pytest.mark.parametrize(("branches", "width"), [(1, 768), (4, 2560)])
def test_fusion_of_real_layers(branches: int, width: int, dtype: type, limit: float) -> None:
    """A number of tokens that is not a multiple of a block; packed documents; two rows."""
    shape = (2, 300, branches, width)
    keys = jax.random.split(jax.random.key(0), 9)
    hidden = jax.random.normal(keys[0], shape)
    toward = 2.0 * jax.random.rademacher(keys[1], shape[:3])[..., None]
    inputs = (
        hidden.astype(dtype),
        (jax.random.normal(keys[2], shape) + toward * hidden).astype(dtype),
        jax.random.normal(keys[3], (2, 300, width), dtype),
        1 + 0.3 * jax.random.normal(keys[4], (branches, width)),
        jax.random.normal(keys[5], (4, branches, width)),
    )
    segments = jnp.cumsum(jax.random.bernoulli(keys[6], 0.02, (2, 300)), axis=1, dtype=jnp.int32)
    mask = jnp.arange(300)[None] < jnp.array([[300], [280]])
    cotangents = jax.random.normal(keys[7], shape, dtype), jax.random.normal(keys[8], shape[:3])

    @partial(jax.jit, static_argnums=0)
    def run(name: str, *inputs: Array) -> tuple:
        fuse = partial(gated_fusion.fuse, form=FORM, implementation=name)
        (out, gate), pullback = jax.vjp(lambda *x: fuse(*x, segments, mask), *inputs)
        return out, gate, pullback(cotangents)

    found = run("pallas_gpu", *inputs)
    assert_relative(found, run("reference", *inputs), limit)
    jax.tree.map(np.testing.assert_array_equal, run("pallas_gpu", *inputs), found)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float8"])
def test_gather_of_real_tables(precision: str) -> None:
    """Rows of 320 numbers, equal bit for bit; the gradient sums in the given order."""
    form = RowFormat(320, precision)
    words = -(-form.words // 128) * 128
    table = form.encode(jax.random.normal(jax.random.key(0), (2**20, 320)))
    table = jnp.pad(table, ((0, 0), (0, words - form.words)))
    numbers = jax.random.randint(jax.random.key(1), (5000, 16), 0, 2**20, jnp.int32)
    read = jax.jit(partial(hashed_gather.read, form=form), static_argnames="implementation")
    found = read(table, numbers, implementation="pallas_gpu")
    np.testing.assert_array_equal(found, read(table, numbers, implementation="xla"))

    values = jax.random.normal(jax.random.key(2), (3000, 320))
    slots = (3000 * jax.random.uniform(jax.random.key(3), (5000, 16)) ** 4).astype(jnp.int32)
    order = jnp.argsort(slots.reshape(-1), stable=True).astype(jnp.int32)

    @partial(jax.jit, static_argnums=0)
    def run(name: str) -> tuple[Array, Array]:
        expand = partial(hashed_gather.expand, implementation=name)
        out, pullback = jax.vjp(lambda values: expand(values, slots, order), values)
        return out, pullback(jnp.cos(out))[0]

    found, expected = run("pallas_gpu"), run("reference")
    np.testing.assert_array_equal(found[0], expected[0])
    assert_relative(found[1], expected[1], 1e-5)
    np.testing.assert_array_equal(run("pallas_gpu")[1], found[1])


# Grouped heads; keys wider than values, as in latent attention; the paper's, for Hopper alone.
@pytest.mark.parametrize(
    ("heads", "widths"), [((8, 2), (64, 64)), ((4, 4), (48, 32)), ((2, 2), (192, 128))]
)
def test_cudnn_is_xla_with_gradients(heads: tuple[int, int], widths: tuple[int, int]) -> None:
    """With packed documents, in bfloat16, whose relative rounding error is 2⁻⁹."""
    length, keys = 512, jax.random.split(jax.random.key(0), 5)
    shapes = [(2, length, heads[0], widths[0])]
    shapes += [(2, length, heads[1], width) for width in widths]
    inputs = [
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys[:3], shapes, strict=True)
    ]
    segments = jnp.cumsum(jax.random.bernoulli(keys[3], 0.02, (2, length)), axis=1, dtype=jnp.int32)
    cotangent = jax.random.normal(keys[4], (2, length, heads[0], widths[1]), jnp.bfloat16)

    @partial(jax.jit, static_argnums=0)
    def run(name: str | None, *inputs: Array) -> tuple:
        attend_by = partial(attend, segments=segments, implementation=name)
        out, pullback = jax.vjp(attend_by, *inputs)
        return out, pullback(cotangent.astype(out.dtype))

    exact = run("xla", *(x.astype(jnp.float32) for x in inputs))
    found = run("cudnn", *inputs)
    assert_relative(found, exact, 1e-2)
    jax.tree.map(np.testing.assert_array_equal, run(None, *inputs), found)  # the default


def kernel_run(folder: Path) -> Config:
    """A run whose sizes every kernel supports: width 128, records of a line, lazy row Adam."""
    config = vary(
        tiny_config(folder),
        model={
            "width": 128,
            "attention": AttentionConfig(heads=2, kv_heads=1, head_width=64),
        },
        memory={"row_width": 24, "adam": RowAdamConfig(form="lazy")},
        data={"sequence_length": 64, "batch_size": 4},
    )
    return replace(config, train=TrainConfig(steps=20, seed=1, log_every=1, evaluate_every=0))


def test_kernels_train_as_xla_does(tmp_path: Path) -> None:
    """Twenty steps have the same losses up to rounding (float32 products use TF32 here)."""
    config = kernel_run(tmp_path)
    run = Run.start(config, tmp_path / "xla")
    train(run)
    engram = replace(config.model.engram, implementation="pallas_gpu")
    kernels = vary(config, model={"engram": engram}, memory={"gather": "pallas_gpu"})
    by_kernels = Run.start(kernels, tmp_path / "kernels")
    train(by_kernels)
    found, expected = losses(tmp_path / "kernels"), losses(tmp_path / "xla")
    assert len(found) == 20 and found[-1][1] < found[0][1]
    np.testing.assert_allclose(found, expected, rtol=1e-3)
