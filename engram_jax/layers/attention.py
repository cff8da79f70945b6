"""Grouped-query attention (arXiv 2305.13245) over packed documents."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from engram_jax.errors import InputError
from engram_jax.layers.positions import rotate

type Implementation = Literal["xla", "cudnn", "splash"]


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes of an attention layer.

    Attributes:
        heads: query heads Q.
        kv_heads: key/value heads J; each serves Q/J query heads.
        head_width: width P of a head.
        theta: base of the rotary frequencies.
        implementation: "xla" anywhere, "cudnn" on NVIDIA GPUs in bfloat16, "splash" on TPU; None
            picks by device.
    """

    heads: int = 6
    kv_heads: int = 2
    head_width: int = 32
    theta: float = 10_000.0
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_width) < 1:
            raise InputError("heads, kv_heads and head_width must be at least 1.")
        if self.heads % self.kv_heads:
            raise InputError(
                f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly; "
                "choose kv_heads that divides heads."
            )
        if self.head_width % 2:
            raise InputError(f"head_width {self.head_width} is odd; rotary embedding needs pairs.")


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions; a document sees itself alone.

    Args:
        width: model width D.
        config: sizes.
        dtype: dtype of the computation; parameters are float32.
        rngs: random streams.
    """

    def __init__(
        self, width: int, config: AttentionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        init = nnx.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        heads, kv_heads, head_width = config.heads, config.kv_heads, config.head_width
        self.query = nnx.Param(init(rngs.params(), (width, heads, head_width)))
        self.key = nnx.Param(init(rngs.params(), (width, kv_heads, head_width)))
        self.value = nnx.Param(init(rngs.params(), (width, kv_heads, head_width)))
        # Zero at the start, as every layer's way into the residual stream: see `Decoder`.
        self.out = nnx.Param(jnp.zeros((heads, head_width, width)))
        self.config = config
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segments: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """Attends within documents.

        Args:
            x: normalized hidden states.
            segments: document number of every position.
            positions: position within the document.
        """
        theta, dtype = self.config.theta, self.dtype
        query = rotate(jnp.einsum("btd,dqp->btqp", x, self.query.astype(dtype)), positions, theta)
        key = rotate(jnp.einsum("btd,djp->btjp", x, self.key.astype(dtype)), positions, theta)
        value = jnp.einsum("btd,djp->btjp", x, self.value.astype(dtype))
        mixed = attend(query, key, value, segments, self.config.implementation)
        return jnp.einsum("btqp,qpd->btd", mixed, self.out.astype(dtype))


def attend(
    query: Float[Array, "B T Q P"],
    key: Float[Array, "B T J P"],
    value: Float[Array, "B T J P"],
    segments: Int32[Array, "B T"],
    implementation: Implementation | None = None,
) -> Float[Array, "B T Q P"]:
    """softmax(q·k/√P)·v over the earlier positions of the same document.

    None picks splash attention on TPU and cuDNN on GPU where they support the shapes and dtype,
    XLA elsewhere; a named implementation runs or fails.
    """
    chosen = implementation or _fastest(query)
    attend_own = _attend_splash if chosen == "splash" else partial(_attend_jax, chosen)
    inputs = (query, key, value, segments)
    if not jax.sharding.get_abstract_mesh().empty:
        # Rows of a batch do not meet here: each device attends to its own. (XLA cannot split a
        # kernel by itself, and explicit sharding cannot type JAX's einsums at B = 1.)
        specs = tuple(jax.typeof(array).sharding.spec for array in inputs)
        attend_own = jax.shard_map(
            attend_own, in_specs=specs, out_specs=specs[0], check_vma=chosen == "xla"
        )
    return attend_own(*inputs)


def _attend_jax(
    implementation: Literal["xla", "cudnn"],
    query: Float[Array, "B T Q P"],
    key: Float[Array, "B T J P"],
    value: Float[Array, "B T J P"],
    segments: Int32[Array, "B T"],
) -> Float[Array, "B T Q P"]:
    same_document = segments[:, None, :, None] == segments[:, None, None, :]
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=same_document,
        is_causal=True,
        implementation=implementation,
    )


def _fastest(query: Float[Array, "B T Q P"]) -> Implementation:
    length, width = query.shape[1], query.shape[-1]
    if jax.default_backend() == "tpu" and length % 128 == 0 and width % 128 == 0:
        return "splash"
    if jax.default_backend() == "gpu" and query.dtype == jnp.bfloat16:
        ampere = float(jax.devices()[0].compute_capability) >= 8
        if ampere and width % 8 == 0 and width <= 128:
            return "cudnn"
    return "xla"


def _attend_splash(
    query: Float[Array, "B T Q P"],
    key: Float[Array, "B T J P"],
    value: Float[Array, "B T J P"],
    segments: Int32[Array, "B T"],
) -> Float[Array, "B T Q P"]:
    # Imported here: it loads the whole Pallas TPU stack, which other devices do without.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, width = query.shape[1:]
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    kernel = splash.make_splash_mha_single_device(mask, interpret=jax.default_backend() == "cpu")

    def attend_row(query: Array, key: Array, value: Array, segments: Array) -> Array:
        heads_first = (x.swapaxes(0, 1) for x in (query * width**-0.5, key, value))
        ids = splash.SegmentIds(q=segments, kv=segments)
        return kernel(*heads_first, segment_ids=ids).swapaxes(0, 1)

    return jax.vmap(attend_row)(query, key, value, segments)
