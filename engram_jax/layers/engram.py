"""The Engram layer: fuses hashed N-gram memory into the residual stream (paper §2.3, eqs. 3–6).

The layer never knows where the memory came from: it takes the concatenated rows as an argument.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Float, Int32

from engram_jax.errors import InputError
from engram_jax.layers.norms import RMSNorm
from engram_jax.parameters import Matrix
from pallas_kernels import gated_fusion
from pallas_kernels.gated_fusion import FusionForm, FusionImplementation

FLOAT32 = jnp.dtype("float32")


@dataclass(frozen=True)
class EngramConfig:
    """What varies between the published forms of the layer; the defaults are the paper's demo.

    DeepSeek-V4.1's form is `EngramConfig(bias=False, convolution=False, norm_epsilon=1e-20,
    signed_root="copysign")`, with four branches.

    Attributes:
        bias: key and value projections have a bias.
        norm_epsilon: epsilon of the key and query norms; the demo's is float32's machine epsilon.
        zero_centered_gain: norm gains are 1 + parameter.
        signed_root: what the signed root of a zero score is: "sign" gives 0, "copysign" ±10⁻³.
        convolution: eq. 5's short convolution is there.
        kernel: taps of the convolution.
        dilation: distance of its taps in tokens; the paper takes the largest n-gram order N.
        convolution_epsilon: epsilon of the convolution's norm.
        cross_documents: the convolution sees packed neighbors, as the demo's does.
        implementation: of `pallas_kernels.gated_fusion`; None is "xla".
    """

    bias: bool = True
    norm_epsilon: float = 2.0**-23
    zero_centered_gain: bool = False
    signed_root: Literal["sign", "copysign"] = "sign"
    convolution: bool = True
    kernel: int = 4
    dilation: int = 3
    convolution_epsilon: float = 1e-5
    cross_documents: bool = False
    implementation: FusionImplementation | None = None

    def __post_init__(self) -> None:
        if min(self.kernel, self.dilation) < 1:
            raise InputError("Engram needs a kernel and a dilation of at least 1.")


class Engram(nnx.Module):
    """Context-aware gating of the memory, and a short convolution over what passes.

    Args:
        width: model width D.
        memory_width: memory width E.
        config: the form of the layer.
        branches: residual branches M, each with its own key, gate and norms; 1 is a plain stream.
        dtype: dtype of the projections; everything after them is float32.
        rngs: random streams.
    """

    def __init__(
        self,
        width: int,
        memory_width: int,
        config: EngramConfig,
        *,
        branches: int = 1,
        dtype: jnp.dtype = FLOAT32,
        rngs: nnx.Rngs,
    ) -> None:
        per_branch = nnx.initializers.lecun_normal(batch_axis=0)
        shared = nnx.initializers.lecun_normal()
        self.key = nnx.Param(
            per_branch(rngs.params(), (branches, memory_width, width)), role=Matrix(stacked=1)
        )
        self.value = nnx.Param(shared(rngs.params(), (memory_width, width)), role=Matrix())
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
        return self.fuse(hidden, key, value, segments, token_mask)

    def fuse(
        self,
        hidden: Float[Array, "B T M D"],
        key: Float[Array, "B T M D"],
        value: Float[Array, "B T D"],
        segments: Int32[Array, "B T"] | None = None,
        token_mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T M D"], Float[Array, "B T M"]]:
        """Eqs. 4–5, with the demo's signed root.

        α = σ(sign(s)·√|s|) with s = ⟨RMSNorm(key), RMSNorm(h)⟩/√D; u = α·value; what is added is
        u + SiLU(Conv(RMSNorm(u))). `pallas_kernels.gated_fusion.reference` is the definition.
        """
        config, taps = self.config, None
        gain = self.key_norm.scale() * self.query_norm.scale()
        if config.convolution:
            taps = self.convolution * self.convolution_norm.scale()[None]
        if config.cross_documents:
            segments = None
        form = FusionForm(
            config.norm_epsilon, config.signed_root, config.dilation, config.convolution_epsilon
        )
        fuse = partial(gated_fusion.fuse, form=form, implementation=config.implementation)
        reach = (config.kernel - 1) * config.dilation if config.convolution else 0
        tokens = (hidden, key, value, segments, token_mask)
        return _fuse_own_tokens(fuse, reach, tokens, (gain, taps))


def _fuse_own_tokens(
    fuse: Callable[..., tuple[Array, Array]],
    reach: int,
    tokens: tuple[Any, ...],
    parameters: tuple[Any, ...],
) -> tuple[Float[Array, "B T M D"], Float[Array, "B T M"]]:
    """Every device fuses its own tokens; XLA cannot split a kernel by itself.

    If T is split over a mesh axis, a device also takes the tokens that the convolution reaches from
    the device before it, at the price of a copy of its own with these in front.

    Args:
        fuse: `gated_fusion.fuse`.
        reach: tokens that the convolution reaches back.
        tokens: hidden, key, value [B, T, …], segments and token mask [B, T] or None.
        parameters: gain and taps.

    Raises:
        InputError: a device's part of T is shorter than the convolution reaches; an axis that is
            neither B nor T is split.
    """

    def fuse_own(
        tokens: tuple[Any, ...], parameters: tuple[Any, ...], along_t: str | None = None
    ) -> tuple[Array, Array]:
        halo = reach if along_t else 0
        if halo:
            length = tokens[0].shape[1]
            if length < halo:
                raise InputError(
                    f"A device's part of T has {length} positions and the convolution reaches "
                    f"{halo} back; split T over fewer devices."
                )
            after = [(shard, shard + 1) for shard in range(jax.lax.axis_size(along_t) - 1)]
            # The first device receives zeros, and a value of zero adds nothing.
            tokens = jax.tree.map(
                lambda part: jnp.concatenate(
                    [jax.lax.ppermute(part[:, -halo:], along_t, after), part], axis=1
                ),
                tokens,
            )
        hidden, key, value, segments, token_mask = tokens
        added, gate = fuse(hidden, key, value, *parameters, segments, token_mask)
        return added[:, halo:], gate[:, halo:]

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind is not AxisType.Explicit for kind in mesh.axis_types):
        return fuse_own(tokens, parameters)
    specs = jax.tree.map(lambda part: jax.typeof(part).sharding.spec, tokens)
    if any(axis is not None for axis in specs[0][2:]):
        raise InputError(
            f"The residual stream lies as {specs[0]}; Engram takes it split over B and T alone."
        )
    return jax.shard_map(
        partial(fuse_own, along_t=specs[0][1]),
        in_specs=(specs, jax.P()),
        out_specs=(specs[0], jax.P(*specs[0][:3])),
        check_vma=False,  # the hand-written backward pass gives each device's share of a gradient
    )(tokens, parameters)
