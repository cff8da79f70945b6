"""Manifold-constrained hyper-connections, mHC (arXiv 2512.24880): M residual branches.

A layer F reads a weighted sum of the M branches and writes to all of them. H_res mixes the branches
with each other:

    x ← H_res x + H_postᵀ ⊗ F(H_pre x)

The three mappings depend on x. H_res is approximately doubly stochastic: Sinkhorn's iterations
leave a small error (`column_error`). Thus H_res preserves the mean of the branches, at any depth.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from engram_jax.errors import InputError
from engram_jax.parameters import Connection

# Initial diagonal of H_res's logits. The weight of a branch's own entry is e⁸ times the others', so
# H_res starts close to the identity.
_OWN_BRANCH = 8.0
# Largest relative difference of the initial H_pre weights from their mean. Branches with equal
# weights would stay equal up to rounding, and the rounding differs between meshes.
_SPREAD = 0.1
# If, after the columns are scaled, all logits of a row of H_res are below this value, the row is
# shifted so that its largest logit is this value. The gradient divides by the square of the row's
# sum, and the smallest normal float32 is e^−87.
_LEAST_LOGIT = -40.0


@dataclass(frozen=True)
class HyperConnectionsConfig:
    """Sizes of the hyper-connections.

    Attributes:
        branches: residual branches M.
        sinkhorn_iterations: Sinkhorn iterations of H_res; each normalizes columns, then rows.
        scale: initial factor of the part of the mappings that depends on x; 0 is the plain residual
            network.
        norm_epsilon: epsilon of the norm over all branches.
    """

    branches: int = 4
    sinkhorn_iterations: int = 20
    scale: float = 0.01
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.branches < 2:
            raise InputError(
                f"hyper_connections.branches is {self.branches}; it must be at least 2. For one "
                "residual stream, use a model without hyper-connections."
            )
        if self.sinkhorn_iterations < 1:
            raise InputError("hyper_connections.sinkhorn_iterations must be at least 1.")


class Mappings(NamedTuple):
    """The mappings of a hyper-connection for one residual stream, in float32.

    Attributes:
        pre: H_pre, the weights with which a layer reads the branches.
        post: H_post, the weights with which it writes to them.
        mix: H_res; entry (m, n) is the weight of branch n in the new branch m.
    """

    pre: Float[Array, "B T M"]
    post: Float[Array, "B T M"]
    mix: Float[Array, "B T M M"]


def read(x: Float[Array, "B T M D"], mappings: Mappings | None) -> Float[Array, "B T D"]:
    """H_pre x, the input of a layer; without mappings, the only branch."""
    if mappings is None:
        return x[:, :, 0]
    return _keeping_its_inputs(_weighted_sum, x.dtype)(mappings.pre, x)


def _weighted_sum(pre: Float[Array, "B T M"], x: Float[Array, "B T M D"]) -> Float[Array, "B T D"]:
    return jnp.sum(pre[..., None] * x.astype(jnp.float32), axis=2).astype(x.dtype)


def _keeping_its_inputs(function: Callable[..., Array], dtype: Any) -> Callable[..., Array]:
    """The function, whose backward pass keeps the stream in its dtype, and no copy in float32.

    A stream in float32 has no copy.
    """
    if dtype == jnp.float32:
        return function
    return jax.checkpoint(function, policy=jax.checkpoint_policies.dots_saveable)


def write(
    x: Float[Array, "B T M D"], y: Float[Array, "B T D"], mappings: Mappings | None
) -> Float[Array, "B T M D"]:
    """H_res x + H_postᵀ ⊗ y, the residual stream after a layer with output y.

    Without mappings, x + y.
    """
    if mappings is None:
        return x + y[:, :, None]
    return _write(x, y, mappings.mix, mappings.post)


def _mix_and_add(
    x: Float[Array, "B T M D"],
    y: Float[Array, "B T D"],
    mix: Float[Array, "B T M M"],
    post: Float[Array, "B T M"],
) -> Float[Array, "B T M D"]:
    wide = x.astype(jnp.float32)
    # Not a matrix product: M × M is too small for one (docs/experiments.md, 2026-11-30).
    mixed = sum(mix[:, :, :, n, None] * wide[:, :, None, n] for n in range(x.shape[2]))
    return (mixed + post[..., None] * y[:, :, None].astype(jnp.float32)).astype(x.dtype)


def _write_forward(*inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    return _mix_and_add(*inputs), inputs


def _write_backward(inputs: tuple[Array, ...], gradient: Array) -> tuple[Array, ...]:
    """The gradients of `_mix_and_add`'s inputs, given that of its result.

    Written by hand, because JAX's transposed sums read `gradient` once for every branch. On a CPU,
    this takes 0.4 of their time (docs/experiments.md, 2026-11-30).
    """
    x, y, mix, post = inputs
    g, wide = gradient.astype(jnp.float32), x.astype(jnp.float32)
    branches, zero = range(x.shape[2]), jnp.float32(0)  # the start of a sum, for its type
    of_x = sum((mix[:, :, m, :, None] * g[:, :, m, None] for m in branches), zero)
    of_y = sum((post[:, :, m, None] * g[:, :, m] for m in branches), zero)
    of_mix = jnp.sum(g[:, :, :, None] * wide[:, :, None], axis=-1)
    of_post = jnp.sum(g * y[:, :, None].astype(jnp.float32), axis=-1)
    # Several products read this one. Fused into them on a CPU, the sum is computed for each.
    of_y = jax.lax.optimization_barrier(of_y.astype(y.dtype))
    return of_x.astype(x.dtype), of_y, of_mix, of_post


_write = jax.custom_vjp(_mix_and_add)
_write.defvjp(_write_forward, _write_backward)


class HyperConnection(nnx.Module):
    """The mappings of one layer.

    Initially H_pre is nearly the mean of the branches, H_post is 1 and H_res is nearly the
    identity. All branches start as copies of the embedding. So the network starts as a plain
    residual network, and at scale 0 it equals one up to rounding.

    Args:
        width: model width D.
        config: sizes.
        rngs: random streams.
    """

    def __init__(self, width: int, config: HyperConnectionsConfig, *, rngs: nnx.Rngs) -> None:
        branches = config.branches
        init = nnx.initializers.normal(0.02)
        outputs = 2 * branches + branches**2  # of H_pre, H_post and H_res, in this order
        weights = (1 + _SPREAD * jnp.linspace(-1, 1, branches)) / branches
        param = partial(nnx.Param, role=Connection())
        self.projection = param(init(rngs.params(), (branches, width, outputs)))
        self.scale = param(jnp.full(3, config.scale, jnp.float32))
        self.pre_bias = param(jax.scipy.special.logit(weights))
        self.post_bias = param(jnp.zeros(branches))
        self.mix_bias = param(_OWN_BRANCH * jnp.eye(branches))
        self.config = config

    def __call__(self, x: Float[Array, "B T M D"]) -> Mappings:
        """The mappings for a residual stream."""
        branches = x.shape[2]
        project = partial(_project, epsilon=self.config.norm_epsilon)
        logits = _keeping_its_inputs(project, x.dtype)(x, self.projection[...])
        pre, post, mix = (
            scale * part
            for scale, part in zip(
                self.scale, jnp.split(logits, (branches, 2 * branches), axis=-1), strict=True
            )
        )
        mix = mix.reshape(*mix.shape[:2], branches, branches) + self.mix_bias[None, None]
        return Mappings(
            pre=jax.nn.sigmoid(pre + self.pre_bias[None, None]),
            post=2 * jax.nn.sigmoid(post + self.post_bias[None, None]),
            mix=sinkhorn(mix, self.config.sinkhorn_iterations),
        )


def _project(
    x: Float[Array, "B T M D"], projection: Float[Array, "M D outputs"], epsilon: float
) -> Float[Array, "B T outputs"]:
    """Projects the branches of every token, after one norm over all of them."""
    wide = x.astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST  # accelerators would round to bfloat16
    projected = jnp.einsum("btmd,mdo->bto", wide, projection, precision=highest)
    mean_square = jnp.sum(jnp.square(wide), axis=(2, 3)) / math.prod(x.shape[2:])
    return jax.lax.rsqrt(mean_square + epsilon)[..., None] * projected  # a factor per token


def sinkhorn(logits: Float[Array, "*batch M M"], iterations: int) -> Float[Array, "*batch M M"]:
    """An approximately doubly stochastic matrix from exp(logits), by Sinkhorn's iterations.

    Each iteration normalizes columns, then rows. So the rows of the result sum to 1, and
    `column_error` measures the error of the columns.
    """

    def normalize_both(matrix: Array, _: None) -> tuple[Array, None]:
        matrix = matrix / jnp.sum(matrix, axis=0, keepdims=True)
        return matrix / jnp.sum(matrix, axis=1, keepdims=True), None

    # Scaling a column or a row does not change the limit of the iterations. So every column is
    # scaled to a largest entry of 1, and a row that would underflow is scaled up. The factors have
    # no gradient: the gradient of a maximum divides by the number of entries equal to it. If
    # recomputation rounds differently, that number can be 0, and the gradient NaN.
    factors = jax.lax.stop_gradient(logits)
    columns = jnp.max(factors, axis=-2, keepdims=True)
    rows = jnp.max(factors - columns, axis=-1, keepdims=True)
    logits -= columns + jnp.minimum(rows - _LEAST_LOGIT, 0)
    # Token axes last. Otherwise a TPU pads every M × M matrix to a tile of 1,024 numbers.
    matrix = jnp.moveaxis(jnp.exp(logits), (-2, -1), (0, 1))
    matrix, _ = jax.lax.scan(normalize_both, matrix, length=iterations)
    return jnp.moveaxis(matrix, (0, 1), (-2, -1))


def column_error(mix: Float[Array, "*batch M M"]) -> Float[Array, ""]:
    """The largest error of a column sum of H_res: max |sum − 1|."""
    return jnp.max(jnp.abs(jnp.sum(mix, axis=-2) - 1))
