"""The loss in parts: against float64, against the loss of all logits, and on eight devices."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.layers import cross_entropy as module
from engram_jax.layers.cross_entropy import TokenLosses, cross_entropy
from engram_jax.parameters import VocabularyMatrix
from engram_jax.sharding import TOKEN_AXES, MeshConfig, gather_parameters, make_mesh, split_axes

B, T, D, V = 8, 12, 16, 50
TARGETS = np.random.default_rng(2).integers(0, V, (B, T), np.int32)
WEIGHTS = np.random.default_rng(3).uniform(size=(2, B, T)).astype(np.float32)


def draw(dtype: str) -> tuple[jax.Array, jax.Array]:
    """Hidden states and head."""
    normal = np.random.default_rng(1).normal
    return jnp.asarray(normal(size=(B, T, D)), dtype), jnp.asarray(normal(size=(V, D)), "float32")


def weighted(
    hidden: jax.Array, head: jax.Array, targets: jax.Array
) -> tuple[jax.Array, TokenLosses]:
    """A sum that has a gradient of both losses."""
    gathered = gather_parameters(
        nnx.Param(head, role=VocabularyMatrix()), hidden.dtype, split_axes(targets)
    )
    losses = cross_entropy(hidden, gathered[...], targets)
    return sum(jnp.sum(part * weight) for part, weight in zip(losses, WEIGHTS, strict=True)), losses


differentiate = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logits of 7 tokens at a time, or fewer: the last part is not full."""
    monkeypatch.setattr(module, "LOGIT_BYTES", 4 * V * 7)
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_losses_are_those_of_float64(in_parts: None) -> None:
    hidden, head = draw("float32")
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    log_normalizer = np.log(np.sum(np.exp(logits), axis=-1))
    expected = log_normalizer - np.take_along_axis(logits, TARGETS[..., None], -1)[..., 0]
    losses = cross_entropy(hidden, head, jnp.asarray(TARGETS))
    np.testing.assert_allclose(losses.cross_entropy, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(losses.log_normalizer, log_normalizer, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("devices", [1, 8])
def test_parts_have_the_gradients_of_all_logits(
    in_parts: None, monkeypatch: pytest.MonkeyPatch, dtype: str, tolerance: float, devices: int
) -> None:
    """On eight devices, the head is split over "fsdp" and its gradient, too."""
    hidden, head = draw(dtype)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        monkeypatch.setattr(module, "LOGIT_BYTES", 1 << 30)
        (_, expected), gradients = differentiate(hidden, head, jnp.asarray(TARGETS))
        jax.clear_caches()
        monkeypatch.setattr(module, "LOGIT_BYTES", 4 * V * 7)
    config = MeshConfig(fsdp=2, expert=2) if devices == 8 else MeshConfig()
    mesh = make_mesh(config, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        split = jax.P(TOKEN_AXES)
        inputs = (
            jax.device_put(array, spec)
            for array, spec in ((hidden, split), (head, jax.P("fsdp")), (TARGETS, split))
        )
        (_, losses), found = jax.jit(differentiate)(*inputs)
    for ours, theirs in zip((*losses, *found), (*expected, *gradients), strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())


def test_no_array_of_all_logits_exists(in_parts: None) -> None:
    hidden, head = draw("float32")
    head, logits = jnp.tile(head, (40, 1)), 4 * B * T * 40 * V
    compiled = jax.jit(differentiate).lower(hidden, head, jnp.asarray(TARGETS)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 0.7 * logits
