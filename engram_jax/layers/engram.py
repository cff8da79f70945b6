"""The Engram layer: fuses hashed N-gram memory into the residual stream (paper §2.3, eqs. 3–6).

The layer takes the concatenated rows as an argument. It does not depend on where they are stored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from engram_jax.errors import InputError
from engram_jax.layers.norms import RMSNorm
from engram_jax.layers.slots import Slots
from engram_jax.parameters import Matrix
from engram_jax.sharding import in_explicit_mesh, position_axis
from pallas_kernels import gated_fusion
from pallas_kernels.gated_fusion import FusedTokens, FusionForm, FusionImplementation

FLOAT32 = jnp.dtype("float32")


@dataclass(frozen=True)
class EngramConfig:
    """Options that differ between the published versions of the layer.

    Defaults are the demo's, except `cross_documents`. The demo is the code that the paper
    published. DeepSeek-V4.1 uses `EngramConfig(bias=False, convolution=False, norm_epsilon=1e-20,
    signed_root="copysign")` with four branches.

    Attributes:
        bias: key and value projections have a bias.
        norm_epsilon: epsilon of the key and query norms; the demo's is float32's machine epsilon.
        zero_centered_gain: norm gains are 1 + parameter.
        signed_root: the signed root of a zero score: 0 for "sign", ±10⁻³ for "copysign".
        convolution: include the short convolution of eq. 5.
        kernel: number of taps of the convolution.
        dilation: distance between taps in tokens. The paper uses the largest n-gram order N; this
            option does not follow `memory.max_order`.
        convolution_epsilon: epsilon of the convolution's norm.
        cross_documents: the convolution crosses document boundaries in a packed row, as in the
            demo.
        implementation: of `pallas_kernels.gated_fusion`; None is "xla".
        gated: False: the value is added without a gate, so there are no keys (an ablation of the
            paper). It runs by the implementation "reference".
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
    gated: bool = True

    def __post_init__(self) -> None:
        if not self.gated and self.implementation not in (None, "reference"):
            raise InputError(
                f"engram.implementation {self.implementation} has no form without gates; leave it "
                "out, or set engram.gated."
            )
        if min(self.kernel, self.dilation) < 1:
            raise InputError("engram.kernel and engram.dilation must be at least 1.")

    @property
    def reach(self) -> int:
        """How many tokens the convolution looks back."""
        return (self.kernel - 1) * self.dilation if self.convolution else 0


class MemoryHealth(NamedTuple):
    """Statistics that show whether a memory is inert.

    Except for `tokens`, they are means over tokens and branches. Padding and image placeholders do
    not count.

    Attributes:
        tokens: number of tokens.
        open: share of the gates above 0.95.
        closed: share of the gates below 0.05.
        added: mean square of what the layer adds.
        stream: mean square of the residual stream that it is added to.
    """

    tokens: Int32[Array, "*steps"]
    open: Float[Array, "*steps"]
    closed: Float[Array, "*steps"]
    added: Float[Array, "*steps"]
    stream: Float[Array, "*steps"]

    @property
    def strength(self) -> Float[Array, "*steps"]:
        """RMS of what the layer adds, relative to the RMS of the residual stream."""
        return jnp.sqrt(self.added / jnp.maximum(self.stream, 1e-30))


def inspect_health(
    hidden: Float[Array, "B T M D"],
    added: Float[Array, "B T M D"],
    gates: Float[Array, "B T M"],
    token_mask: Bool[Array, "B T"],
) -> MemoryHealth:
    """The health of a layer that adds `added` to `hidden`, over the tokens in the mask."""
    tokens = jnp.sum(token_mask)

    def mean(by_branch: Array) -> Array:
        by_token = jnp.mean(by_branch, axis=2, dtype=jnp.float32)
        return jnp.sum(by_token, where=token_mask) / jnp.maximum(tokens, 1)

    def mean_square(stream: Array) -> Array:
        return mean(jnp.mean(jnp.square(stream.astype(jnp.float32)), axis=3))

    shares = mean(gates > 0.95), mean(gates < 0.05)
    health = MemoryHealth(tokens, *shares, mean_square(added), mean_square(hidden))
    return jax.lax.stop_gradient(health)


class GatedValues(NamedTuple):
    """What a decoder caches of every position, for the convolution, whose input is c·v.

    Attributes:
        value: the memory's value v, which all branches share.
        scale: c = α / √(α²·mean(v²) + ε).
    """

    value: Float[Array, "B slots D"]
    scale: Float[Array, "B slots M"]


class Engram(nnx.Module):
    """Context-aware gating of the memory, and a short convolution over the gated value.

    Args:
        width: model width D.
        memory_width: memory width E.
        config: options of the layer.
        branches: residual branches M, each with its own key, gate and norms; 1 is a plain residual
            stream.
        dtype: dtype of the projections; the computation after them is float32.
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
        key_seed, value_seed = rngs.params(), rngs.params()
        self.value = nnx.Param(shared(value_seed, (memory_width, width)), role=Matrix())
        if config.bias:
            self.value_bias = nnx.Param(jnp.zeros(width))

        def norm(epsilon: float) -> RMSNorm:
            centered = config.zero_centered_gain
            return RMSNorm(branches, width, epsilon=epsilon, zero_centered=centered)

        if config.gated:
            stacked = (branches, memory_width, width)
            self.key = nnx.Param(per_branch(key_seed, stacked), role=Matrix(stacked=1))
            if config.bias:
                self.key_bias = nnx.Param(jnp.zeros((branches, width)))
            self.key_norm = norm(config.norm_epsilon)
            self.query_norm = norm(config.norm_epsilon)
        if config.convolution:
            self.convolution_norm = norm(config.convolution_epsilon)
            # Zero initialization: at the start the layer adds only the gated value.
            self.convolution = nnx.Param(jnp.zeros((config.kernel, branches, width)))
        self.config = config
        self.shape = branches, width
        self.dtype = dtype

    def __call__(
        self,
        hidden: Float[Array, "B T M D"],
        memory: Float[Array, "B T E"],
        segments: Int32[Array, "B T"] | None = None,
        token_mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T M D"], Float[Array, "B T M"]]:
        """Returns what to add to the residual branches, and the gates.

        Args:
            hidden: the residual branches h⁽ᵐ⁾.
            memory: e, the H gathered rows of every position.
            segments: document number of every position; None: each row of the batch is one
                document.
            token_mask: False at image placeholders. There the gate is 0, and the layer adds only
                the convolution of earlier tokens.
        """
        return self.fuse(hidden, *self._project(memory), segments, token_mask)

    def extend(
        self,
        hidden: Float[Array, "B T M D"],
        memory: Float[Array, "B T E"],
        cache: GatedValues | None,
        slots: Slots,
        token_mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T M D"], Float[Array, "B T M"], GatedValues | None]:
        """Like a call, for positions that follow cached ones; also returns the new cache.

        Args:
            hidden: the residual branches of the new positions.
            memory: their memory vectors.
            cache: of the positions before them; None without a convolution.
            slots: their slots.
            token_mask: as in a call.
        """
        key, value = self._project(memory)
        if cache is None:
            return *self.fuse(hidden, key, value, None, token_mask), None
        gain, taps, form = self._fusion()
        assert taps is not None
        key = hidden if key is None else key  # without gates it is not used
        gate, scale = gated_fusion.gate_new(hidden, key, value, gain, token_mask, form)
        # Reading what was just written lets XLA write in place. Otherwise it copies the cache.
        cache = GatedValues(*map(slots.write, cache, (value, scale)))
        values, scales = (slots.window(part, self.config.reach) for part in cache)
        segments = slots.segments_of_window(self.config.reach)
        if self.config.cross_documents:
            segments = jnp.minimum(segments, 0)  # one document; −1 is still no token
        added = gated_fusion.fuse_new(gate, taps, FusedTokens(values, scales, segments), form)
        return added.astype(hidden.dtype), gate, cache

    def empty_cache(self, batch: int, capacity: int) -> GatedValues | None:
        """A cache of this many slots for every sequence; None without a convolution."""
        if not self.config.convolution:
            return None
        branches, width = self.shape
        values = jnp.zeros((batch, capacity, width), self.dtype)
        return GatedValues(values, jnp.zeros((batch, capacity, branches)))

    def _project(
        self, memory: Float[Array, "B T E"]
    ) -> tuple[Float[Array, "B T M D"] | None, Float[Array, "B T D"]]:
        """Equation 3: one key per branch, one value for all branches; no keys without gates."""
        memory = memory.astype(self.dtype)
        value = jnp.einsum("bte,ed->btd", memory, self.value.astype(self.dtype))
        if self.config.bias:
            value += self.value_bias.astype(self.dtype)[None, None]
        if not self.config.gated:
            return None, value
        key = jnp.einsum("bte,med->btmd", memory, self.key.astype(self.dtype))
        if self.config.bias:
            key += self.key_bias.astype(self.dtype)[None, None]
        return key, value

    def fuse(
        self,
        hidden: Float[Array, "B T M D"],
        key: Float[Array, "B T M D"] | None,
        value: Float[Array, "B T D"],
        segments: Int32[Array, "B T"] | None = None,
        token_mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T M D"], Float[Array, "B T M"]]:
        """Equations 4 to 6 (eq. 6 is eq. 4 for each branch), with the demo's signed root.

        α = σ(sign(s)·√max(|s|, 10⁻⁶)) with s = ⟨RMSNorm(key), RMSNorm(h)⟩/√D, and u = α·value. The
        layer adds u + SiLU(Conv(RMSNorm(u))), with a causal, depthwise convolution whose taps are
        initialized to zero (only u without a convolution). The definition is
        `pallas_kernels.gated_fusion.reference`.
        """
        config = self.config
        gain, taps, form = self._fusion()
        if config.cross_documents:
            segments = None
        implementation = config.implementation if config.gated else "reference"
        fuse = partial(gated_fusion.fuse, form=form, implementation=implementation)
        key = hidden if key is None else key  # without gates it is not used
        tokens = (hidden, key, value, segments, token_mask)
        return _fuse_own_tokens(fuse, self.config.reach, tokens, (gain, taps))

    def _fusion(
        self,
    ) -> tuple[Float[Array, "M D"], Float[Array, "kernel M D"] | None, FusionForm]:
        """Arguments of the fusion: gains of the key norm times those of the query norm, taps times
        gains of the convolution's norm (None without a convolution), and constants.
        """
        config, gain, taps = self.config, jnp.ones(self.shape), None
        if config.gated:  # only the product of the two norms' gains has an effect
            gain = self.key_norm.scale() * self.query_norm.scale()
        if config.convolution:
            taps = self.convolution * self.convolution_norm.scale()[None]
        form = FusionForm(
            *(config.norm_epsilon, config.signed_root, config.dilation),
            *(config.convolution_epsilon, config.gated),
        )
        return gain, taps, form


def _fuse_own_tokens(
    fuse: Callable[..., tuple[Array, Array]],
    reach: int,
    tokens: tuple[Any, ...],
    parameters: tuple[Any, ...],
) -> tuple[Float[Array, "B T M D"], Float[Array, "B T M"]]:
    """Each device fuses its own tokens, because XLA cannot partition a kernel automatically.

    If T is split over a mesh axis, each device receives hidden, key, value, segment and mask of the
    last `reach` positions of the device before it, puts them before its own, fuses all, and drops
    the results of the received positions.

    Args:
        fuse: `gated_fusion.fuse`.
        reach: how many tokens the convolution looks back.
        tokens: hidden, key, value [B, T, …], segments and token mask [B, T] or None.
        parameters: gain and taps.

    Raises:
        InputError: a device's part of T is shorter than `reach`, or an axis other than B and T is
            split.
    """

    def fuse_own(
        tokens: tuple[Any, ...], parameters: tuple[Any, ...], along_t: str | None = None
    ) -> tuple[Array, Array]:
        halo = reach if along_t else 0
        if halo:
            length = tokens[0].shape[1]
            if length < halo:
                raise InputError(
                    f"A device's part of T has {length} positions, but the convolution looks "
                    f"{halo} back; split T over fewer devices."
                )
            after = [(shard, shard + 1) for shard in range(jax.lax.axis_size(along_t) - 1)]
            # The first device receives zeros. Tokens with value zero add nothing.
            tokens = jax.tree.map(
                lambda part: jnp.concatenate(
                    [jax.lax.ppermute(part[:, -halo:], along_t, after), part], axis=1
                ),
                tokens,
            )
        hidden, key, value, segments, token_mask = tokens
        added, gate = fuse(hidden, key, value, *parameters, segments, token_mask)
        return added[:, halo:], gate[:, halo:]

    if not in_explicit_mesh():
        return fuse_own(tokens, parameters)
    specs = jax.tree.map(lambda part: jax.typeof(part).sharding.spec, tokens)
    if any(axis is not None for axis in specs[0][2:]):
        raise InputError(
            f"The residual stream is sharded as {specs[0]}; Engram supports splits of B and T only."
        )
    return jax.shard_map(
        partial(fuse_own, along_t=position_axis(tokens[0])),
        in_specs=(specs, jax.P()),
        out_specs=(specs[0], jax.P(*specs[0][:3])),
        check_vma=False,  # the custom backward pass returns parts, which shard_map sums
    )(tokens, parameters)
