"""Nonzero parameters: with layers initialized to zero, many tests would test nothing."""

import jax
import numpy as np

from engram_jax.typing import PyTree


def enliven(params: PyTree, seed: int = 1) -> PyTree:
    """The parameters, with small random numbers instead of leaves that are all zero."""
    generator = np.random.default_rng(seed)

    def draw(leaf: jax.Array) -> jax.Array:
        if np.any(np.asarray(leaf)):  # without compiling
            return leaf
        values = generator.normal(0, 0.1, leaf.shape).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    return jax.tree.map(draw, params)
