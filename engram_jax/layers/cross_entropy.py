"""The output head and the cross-entropy of its logits, without an array of all logits.

In a model of the paper, the logits of a chip's 20,480 tokens are an array of 10.6 GB. So the loss
is computed for a part of the tokens at a time, and so is its gradient, from logits that are
computed again. Logits of at most `LOGIT_BYTES` a device are computed at once, and kept for the
gradient. Both have equal results up to rounding: in parts, the gradient of the logits is rounded to
the head's dtype before it is multiplied, and the head's gradient is summed in float32.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from engram_jax.sharding import spec_axes, split_axes

LOGIT_BYTES = 1 << 30  # of a device's logits that exist at the same time


class TokenLosses(NamedTuple):
    """The loss of every token.

    Attributes:
        cross_entropy: −log p(target) in nats.
        log_normalizer: log Σ exp(logits), which a z-loss keeps small.
    """

    cross_entropy: Float[Array, "B T"]
    log_normalizer: Float[Array, "B T"]


def compute_logits(
    hidden: Float[Array, "*tokens D"], head: Float[Array, "V D"]
) -> Float[Array, "*tokens V"]:
    """The logits in float32."""
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


def count_parts(tokens: int, vocabulary: int) -> int:
    """In how many parts the loss of a device's tokens is computed."""
    return max(1, min(-(-4 * tokens * vocabulary // LOGIT_BYTES), tokens))


def cross_entropy(
    hidden: Float[Array, "B T D"], head: Float[Array, "V D"], targets: Int32[Array, "B T"]
) -> TokenLosses:
    """The losses of tokens.

    Args:
        hidden: the last hidden states, split over devices like the targets.
        head: the output head, complete on every device (see `gather_parameters`).
        targets: ids of the next tokens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    split = jax.P() if mesh.empty else jax.typeof(targets).sharding.spec
    axes = spec_axes(split)
    shards = math.prod(mesh.shape[axis] for axis in axes)
    tokens = targets.size // shards
    parts = count_parts(tokens, len(head))
    if parts == 1:
        logits = compute_logits(hidden, head)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return TokenLosses(losses, jax.nn.logsumexp(logits, axis=-1))
    in_parts = partial(_in_parts, parts, axes)
    if axes:
        # "Reduced": the gradient of the head is summed over devices where it is scattered.
        specs = split, jax.P(reduced=set(split_axes(targets))), split
        in_parts = jax.shard_map(in_parts, in_specs=specs, out_specs=split)
    return in_parts(hidden, head, targets)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_parts(
    parts: int, axes: tuple[str, ...], hidden: Array, head: Array, targets: Array
) -> TokenLosses:
    """The losses of a device's tokens; `axes` are those over which tokens are split."""

    def one(part: tuple[Array, Array]) -> TokenLosses:
        logits = compute_logits(part[0], head)
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
        of_target = jnp.take_along_axis(logits, part[1][..., None], axis=-1)[..., 0]
        return TokenLosses(log_normalizer - of_target, log_normalizer)

    losses = jax.lax.map(one, (_split(hidden, parts), _split(targets, parts)))
    return jax.tree.map(partial(_join, targets.shape), losses)


def _forward(
    parts: int, axes: tuple[str, ...], hidden: Array, head: Array, targets: Array
) -> tuple[TokenLosses, tuple[Array, Array, Array, Array]]:
    losses = _in_parts(parts, axes, hidden, head, targets)
    return losses, (hidden, head, targets, losses.log_normalizer)


def _backward(
    parts: int,
    axes: tuple[str, ...],
    saved: tuple[Array, Array, Array, Array],
    gradient: TokenLosses,
) -> tuple[Array, Array, None]:
    """∂/∂logits = (∂/∂CE + ∂/∂log Z) · softmax − ∂/∂CE · one-hot(target)."""
    hidden, head, targets, log_normalizer = saved

    def one(head_gradient: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
        hidden, target, log_normalizer, of_loss, of_normalizer = part
        softmax = jnp.exp(compute_logits(hidden, head) - log_normalizer[..., None])
        is_target = jnp.arange(len(head))[None] == target[..., None]
        of_logits = (of_loss + of_normalizer)[..., None] * softmax
        of_logits = (of_logits - of_loss[..., None] * is_target).astype(head.dtype)
        head_gradient += jnp.einsum(
            "nv,nd->vd", of_logits, hidden, preferred_element_type=jnp.float32
        )
        return head_gradient, jnp.einsum("nv,vd->nd", of_logits, head)

    zeros = jnp.zeros(head.shape, jnp.float32)  # the sum over parts needs more bits than bfloat16
    if axes:
        zeros = jax.lax.pcast(zeros, axes, to="varying")
    split = [_split(array, parts) for array in (hidden, targets, log_normalizer, *gradient)]
    head_gradient, hidden_gradient = jax.lax.scan(one, zeros, tuple(split))
    head_gradient = head_gradient.astype(head.dtype)
    if axes and jax.lax.axis_size(axes) == 1:  # JAX has no "reduced" arrays on one device
        head_gradient = jax.lax.psum(head_gradient, axes)
    elif axes:
        head_gradient = jax.lax.pcast(head_gradient, axes, to="unreduced")
    hidden_gradient = _join(targets.shape, hidden_gradient).astype(hidden.dtype)
    return hidden_gradient, head_gradient, None


_in_parts.defvjp(_forward, _backward)


def _split(array: Array, parts: int) -> Array:
    """[B, T, …] to [parts, tokens, …]; the last part is filled with zeros, which add nothing."""
    flat = array.reshape(-1, *array.shape[2:])
    missing = -len(flat) % parts
    flat = jnp.pad(flat, [(0, missing), *[(0, 0)] * (flat.ndim - 1)])
    return flat.reshape(parts, -1, *flat.shape[1:])


def _join(shape: tuple[int, ...], array: Array) -> Array:
    """The inverse of `_split`, for B and T."""
    flat = array.reshape(-1, *array.shape[2:])
    return flat[: math.prod(shape)].reshape(*shape, *flat.shape[1:])
