"""Random numbers that tests draw outside of compiled functions, drawn by NumPy.

JAX compiles a program for each shape, which took a quarter of the time of the layers' tests. These
are inputs of tests, and parameters of modules (but not those of `initializers.normal`, which draws
uniform numbers).
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.special import ndtr, ndtri


def draw_with_numpy() -> None:
    """Replaces `normal` and `truncated_normal` of `jax.random`, except where they are traced."""
    jax.random.normal = _replace(jax.random.normal, _normal)
    jax.random.truncated_normal = _replace(jax.random.truncated_normal, _truncated_normal)
    # `initializers.lecun_normal` looks `truncated_normal` up there.
    internal: Any = jax._src.random  # type: ignore[attr-defined]
    internal.normal, internal.truncated_normal = jax.random.normal, jax.random.truncated_normal


def _replace(original: Callable[..., Array], draw: Callable[..., Array]) -> Callable[..., Array]:
    @wraps(original)
    def drawn(key: Array, *arguments: Any, **named: Any) -> Array:
        if isinstance(key, jax.core.Tracer) or named.get("out_sharding") is not None:
            return original(key, *arguments, **named)
        random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return draw(random, *arguments, **named)

    return drawn


def _normal(
    random: np.random.Generator,
    shape: Sequence[int] = (),
    dtype: Any = float,
    *,
    out_sharding: None = None,
) -> Array:
    return _as(random.normal(size=tuple(shape)), dtype)


def _truncated_normal(
    random: np.random.Generator,
    lower: Any,
    upper: Any,
    shape: Sequence[int] = (),
    dtype: Any = float,
    *,
    out_sharding: None = None,
) -> Array:
    shares = random.uniform(ndtr(float(lower)), ndtr(float(upper)), tuple(shape))
    return _as(ndtri(shares), dtype)


def _as(numbers: np.ndarray, dtype: Any) -> Array:
    assert jnp.issubdtype(dtype, jnp.floating), dtype  # as JAX, which refuses integers
    return jnp.asarray(numbers, dtype)
