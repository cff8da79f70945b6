"""The Engram layer: fuses hashed N-gram memory into the residual stream (paper §2.3, eqs. 3–6).

The layer never knows where the memory came from: it takes the concatenated rows as an argument.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from engram_jax.errors import InputError
from engram_jax.layers.norms import RMSNorm

FLOAT32 = jnp.dtype("float32")


@dataclass(frozen=True)
class EngramConfig:
    """What varies between the published forms of the layer; the defaults are the paper's demo.

    DeepSeek-V4.1's form is `EngramConfig(branches=4, bias=False, convolution=False,
    norm_epsilon=1e-20, signed_root="copysign")`.

    Attributes:
        branches: residual branches M, each with its own key, gate and norms; 1 is a plain stream.
        bias: key and value projections have a bias.
        norm_epsilon: epsilon of the key and query norms; the demo's is float32's machine epsilon.
        zero_centered_gain: norm gains are 1 + parameter.
        signed_root: what the signed root of a zero score is: "sign" gives 0, "copysign" ±10⁻³.
        convolution: eq. 5's short convolution is there.
        kernel: taps of the convolution.
        dilation: distance of its taps in tokens; the paper takes the largest n-gram order N.
        convolution_epsilon: epsilon of the convolution's norm.
        cross_documents: the convolution sees packed neighbors, as the demo's does.
    """

    branches: int = 1
    bias: bool = True
    norm_epsilon: float = 2.0**-23
    zero_centered_gain: bool = False
    signed_root: Literal["sign", "copysign"] = "sign"
    convolution: bool = True
    kernel: int = 4
    dilation: int = 3
    convolution_epsilon: float = 1e-5
    cross_documents: bool = False

    def __post_init__(self) -> None:
        if min(self.branches, self.kernel, self.dilation) < 1:
            raise InputError("Engram needs branches, kernel and dilation of at least 1.")


class Engram(nnx.Module):
    """Context-aware gating of the memory, and a short convolution over what passes.

    Args:
        width: model width D.
        memory_width: memory width E.
        config: the form of the layer.
        dtype: dtype of the projections; norms, scores and gates are float32.
        rngs: random streams.
    """

    def __init__(
        self,
        width: int,
        memory_width: int,
        config: EngramConfig,
        *,
        dtype: jnp.dtype = FLOAT32,
        rngs: nnx.Rngs,
    ) -> None:
        branches = config.branches
        per_branch = nnx.initializers.lecun_normal(batch_axis=0)
        shared = nnx.initializers.lecun_normal()
        self.key = nnx.Param(per_branch(rngs.params(), (branches, memory_width, width)))
        self.value = nnx.Param(shared(rngs.params(), (memory_width, width)))
        if config.bias:
            self.key_bias = nnx.Param(jnp.zeros((branches, width)))
            self.value_bias = nnx.Param(jnp.zeros(width))

        def norm(epsilon: float) -> RMSNorm:
            centered = config.zero_centered_gain
            return RMSNorm(branches, width, epsilon=epsilon, zero_centered=centered)

        self.key_norm = norm(config.norm_epsilon)
        self.query_norm = norm(config.norm_epsilon)
        if config.convolution:
            self.convolution_norm = norm(config.convolution_epsilon)
            # Zero at the start: the layer begins as the gated value alone.
            self.convolution = nnx.Param(jnp.zeros((config.kernel, branches, width)))
        self.config = config
        self.dtype = dtype

    def __call__(
        self,
        hidden: Float[Array, "B T M D"],
        memory: Float[Array, "B T E"],
        segments: Int32[Array, "B T"] | None = None,
        token_mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T M D"], Float[Array, "B T M"]]:
        """What to add to the residual branches, and the gates.

        Args:
            hidden: the residual branches h⁽ᵐ⁾.
            memory: e, the H gathered rows of every position.
            segments: document number of every position; None: a row is one document.
            token_mask: False at dead positions, whose gate is 0.
        """
        memory = memory.astype(self.dtype)
        key = jnp.einsum("bte,med->btmd", memory, self.key.astype(self.dtype))
        value = jnp.einsum("bte,ed->btd", memory, self.value.astype(self.dtype))
        if self.config.bias:
            key += self.key_bias.astype(self.dtype)[None, None]
            value += self.value_bias.astype(self.dtype)[None, None]

        gate = self.gate(hidden, key)
        if token_mask is not None:
            gate = jnp.where(token_mask[:, :, None], gate, 0)
        gated = (gate[..., None] * value[:, :, None]).astype(self.dtype)
        if not self.config.convolution:
            return gated, gate
        taps = self.convolution.astype(self.dtype)
        if self.config.cross_documents:
            segments = None
        mixed = convolve(self.convolution_norm(gated), taps, self.config.dilation, segments)
        return gated + jax.nn.silu(mixed), gate

    def gate(
        self, hidden: Float[Array, "B T M D"], key: Float[Array, "B T M D"]
    ) -> Float[Array, "B T M"]:
        """Eq. 4, with the demo's signed root: σ(sign(s)·√|s|), s = ⟨norm(key), norm(h)⟩/√D."""
        query = self.query_norm(hidden.astype(jnp.float32))
        key = self.key_norm(key.astype(jnp.float32))
        score = jnp.sum(key * query, axis=-1) * hidden.shape[-1] ** -0.5
        sign = jnp.sign(score)
        if self.config.signed_root == "copysign":
            sign = jnp.copysign(jnp.ones_like(score), score)
        return jax.nn.sigmoid(sign * jnp.sqrt(jnp.maximum(jnp.abs(score), 1e-6)))


def convolve(
    x: Float[Array, "B T M D"],
    taps: Float[Array, "kernel M D"],
    dilation: int,
    segments: Int32[Array, "B T"] | None,
) -> Float[Array, "B T M D"]:
    """Causal depthwise convolution (inside eq. 5); the last tap weighs the current position.

    A tap that falls before the row, or in another document, reads zero. If T is split over a mesh
    axis, every device takes the positions that its taps reach from the device before it.

    Raises:
        InputError: a device's part of T is shorter than the taps reach.
    """
    spec = jax.typeof(x).sharding.spec
    axes = spec[1] if len(spec) > 1 else None
    if axes is None:
        return _convolve(x, taps, dilation, segments)
    reach = (len(taps) - 1) * dilation
    if segments is None:
        segments = jnp.zeros_like(x[..., 0, 0], jnp.int32)

    def convolve_own(x: Array, segments: Array, taps: Array) -> Float[Array, "B T M D"]:
        if x.shape[1] < reach:
            raise InputError(
                f"A device's part of T has {x.shape[1]} positions and the convolution reaches "
                f"{reach} back; split T over fewer devices."
            )
        shards = jax.lax.axis_size(axes)
        after = [(shard, shard + 1) for shard in range(shards - 1)]
        # The first device receives zeros, which is what a tap before the row reads.
        wide, documents = (
            jnp.concatenate([jax.lax.ppermute(part[:, -reach:], axes, after), part], axis=1)
            for part in (x, segments)
        )
        return _convolve(wide, taps, dilation, documents)[:, reach:]

    whole = jax.P()
    return jax.shard_map(convolve_own, in_specs=(spec, jax.P(*spec[:2]), whole), out_specs=spec)(
        x, segments, taps
    )


def _convolve(
    x: Float[Array, "B T M D"],
    taps: Float[Array, "kernel M D"],
    dilation: int,
    segments: Int32[Array, "B T"] | None,
) -> Float[Array, "B T M D"]:
    """Of whole rows; as shifted products: XLA's grouped convolution is 100 times slower on CPU."""
    total = x * taps[-1][None, None]
    for tap in range(1, len(taps)):
        shift = tap * dilation
        if shift >= x.shape[1]:
            break
        shifted = jnp.pad(x[:, :-shift], ((0, 0), (shift, 0), (0, 0), (0, 0)))
        if segments is not None:
            older = jnp.pad(segments[:, :-shift], ((0, 0), (shift, 0)), constant_values=-1)
            shifted *= (older == segments)[:, :, None, None]
        total += shifted * taps[-1 - tap][None, None]
    return total
