"""Manifold-constrained hyper-connections, mHC (arXiv 2512.24880): M residual streams in one.

A layer F reads a mixture of the M branches and writes to all of them, which mix meanwhile:

    x ← H_res x + H_postᵀ ⊗ F(H_pre x)

The three mappings depend on x. H_res is doubly stochastic, as nearly as Sinkhorn's iterations make
it (`column_error`), so that the branches' mean passes through any number of layers as it is.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from engram_jax.errors import InputError
from engram_jax.parameters import Connection

# Start of the diagonal of H_res's logits: e⁸ to 1, so that each branch keeps to itself.
_OWN_BRANCH = 8.0
# Branches that start alike stay alike up to rounding, and differ from mesh to mesh by that noise;
# so they start as weights of the mean that differ by this much (relative, largest).
_SPREAD = 0.1
# Rows of H_res whose logits all lie below are lifted to it: the gradient divides by the square of
# their sum, and float32 ends at e^−87.
_LEAST_LOGIT = -40.0


@dataclass(frozen=True)
class HyperConnectionsConfig:
    """Sizes of the hyper-connections.

    Attributes:
        branches: residual branches M.
        sinkhorn_iterations: normalizations of columns and rows, each, that make H_res.
        scale: start of the scalars that weigh what depends on x; 0 is the plain residual network.
        norm_epsilon: epsilon of the norm over all branches.
    """

    branches: int = 4
    sinkhorn_iterations: int = 20
    scale: float = 0.01
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.branches < 2:
            raise InputError(
                f"hyper_connections.branches is {self.branches}; a plain residual stream is a "
                "model without hyper-connections, and they need at least 2."
            )
        if self.sinkhorn_iterations < 1:
            raise InputError("hyper_connections.sinkhorn_iterations must be at least 1.")


class Mappings(NamedTuple):
    """What a hyper-connection made of the residual stream, in float32.

    Attributes:
        pre: H_pre, the weights a layer reads the branches with.
        post: H_post, the weights it writes to them with.
        mix: H_res; entry (m, n) is what branch m takes of branch n.
    """

    pre: Float[Array, "B T M"]
    post: Float[Array, "B T M"]
    mix: Float[Array, "B T M M"]


def read(x: Float[Array, "B T M D"], mappings: Mappings | None) -> Float[Array, "B T D"]:
    """H_pre x, what a layer sees of the stream; without mappings, the only branch."""
    if mappings is None:
        return x[:, :, 0]
    weighed = mappings.pre[..., None] * x.astype(jnp.float32)
    return jnp.sum(weighed, axis=2).astype(x.dtype)


def write(
    x: Float[Array, "B T M D"], y: Float[Array, "B T D"], mappings: Mappings | None
) -> Float[Array, "B T M D"]:
    """H_res x + H_postᵀ ⊗ y, the stream after a layer that gave y; without mappings, x + y."""
    if mappings is None:
        return x + y[:, :, None]
    wide = x.astype(jnp.float32)
    # Not as a matrix product: M × M is too small for one, and this becomes a single pass.
    mixed = sum(
        mappings.mix[:, :, :, branch, None] * wide[:, :, None, branch]
        for branch in range(x.shape[2])
    )
    written = mappings.post[..., None] * y[:, :, None].astype(jnp.float32)
    return (mixed + written).astype(x.dtype)


class HyperConnection(nnx.Module):
    """The mappings of one layer.

    At the start H_pre is nearly the mean of the branches, H_post is 1 and H_res the identity, so
    that a network whose branches start as copies of the embedding is an ordinary residual one: to
    rounding at scale 0.

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
        branches, width = x.shape[2:]
        # The norm is over all branches together; it scales what is projected, so it can come last.
        square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(2, 3)) / (branches * width)
        norm = jax.lax.rsqrt(square + self.config.norm_epsilon)
        projected = jnp.einsum(
            "btmd,mdo->bto",
            x.astype(jnp.float32),
            self.projection[...],
            precision=jax.lax.Precision.HIGHEST,  # accelerators would round to bfloat16
        )
        logits = norm[..., None] * projected
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


def sinkhorn(logits: Float[Array, "*batch M M"], iterations: int) -> Float[Array, "*batch M M"]:
    """exp(logits), brought near a doubly stochastic matrix by normalizing columns, then rows.

    Ends on rows, which sum to 1; `column_error` says how far columns are from that.
    """

    def normalize_both(matrix: Array, _: None) -> tuple[Array, None]:
        matrix = matrix / jnp.sum(matrix, axis=0, keepdims=True)
        return matrix / jnp.sum(matrix, axis=1, keepdims=True), None

    # A factor of a column or of a row does not change the matrix that the iterations tend to. So
    # the largest entry of every column becomes 1, and a row that would vanish is lifted. Nor is
    # there a gradient through factors; that of a maximum divides by how many entries equal it,
    # which is 0 where a recomputed entry is rounded otherwise: NaN.
    factors = jax.lax.stop_gradient(logits)
    columns = jnp.max(factors, axis=-2, keepdims=True)
    rows = jnp.max(factors - columns, axis=-1, keepdims=True)
    logits -= columns + jnp.minimum(rows - _LEAST_LOGIT, 0)
    # Tokens last: a TPU would pad every M × M matrix to a tile of 1,024 numbers.
    matrix = jnp.moveaxis(jnp.exp(logits), (-2, -1), (0, 1))
    matrix, _ = jax.lax.scan(normalize_both, matrix, length=iterations)
    return jnp.moveaxis(matrix, (0, 1), (-2, -1))


def column_error(mix: Float[Array, "*batch M M"]) -> Float[Array, ""]:
    """How far a column sum of H_res lies from 1, at most."""
    return jnp.max(jnp.abs(jnp.sum(mix, axis=-2) - 1))
