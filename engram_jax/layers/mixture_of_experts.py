"""DeepSeekMoE: each token uses a few of many small experts, and all shared experts.

y_t = Shared(x_t) + Σ_{e chosen by t} w_te · Expert_e(x_t)   (arXiv 2401.06066, without residual)

Affinities are s_te = σ(x_t · router_e), and w_te is s_te divided by the sum over the chosen experts
(DeepSeek-V3, arXiv 2412.19437). A token chooses the experts with the largest s_te + bias_e. The
bias is not a trained parameter. After every step it is raised for experts with a low load and
lowered for others, which replaces an auxiliary loss (arXiv 2408.15664).

Every chosen expert is computed. No token is dropped at any load.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from engram_jax.errors import InputError
from engram_jax.layers.expert_rounds import count, mix_experts, rank_pairs, sum_rounds
from engram_jax.layers.feed_forward import FeedForward
from engram_jax.layers.grouped_matmul import GroupedImplementation, block_size
from engram_jax.parameters import Matrix
from engram_jax.sharding import in_explicit_mesh, spec_axes, split_axes

# Capacity of one round, relative to a device's number of pairs when all experts have equal load.
CAPACITY_FACTOR = 1.25


@dataclass(frozen=True)
class ExpertsConfig:
    """Sizes of a mixture of experts.

    Attributes:
        routed: experts X that tokens choose from.
        shared: additional experts that every token uses.
        active: routed experts that each token chooses.
        width: inner width W of one expert.
        leading_dense: number of first blocks that have a dense feed-forward layer instead.
        multiple: the number of stored experts is rounded up to a multiple of this, so that a mesh
            axis can divide it; the added experts are never chosen.
        balance_rate: how much a step changes the bias of an expert (see `balance`).
        implementation: "ragged" or "blocks" (see `block_size`); None chooses by device.
    """

    routed: int = 72
    shared: int = 2
    active: int = 6
    width: int = 1536
    leading_dense: int = 1
    multiple: int = 1
    balance_rate: float = 1e-3
    implementation: GroupedImplementation | None = None

    def __post_init__(self) -> None:
        if min(self.routed, self.shared, self.active, self.width, self.multiple) < 1:
            raise InputError("routed, shared, active, width and multiple must be at least 1.")
        if self.active > self.routed:
            raise InputError(
                f"A token cannot choose {self.active} of {self.routed} experts; active must be at "
                "most routed."
            )
        if self.leading_dense < 0 or self.balance_rate < 0:
            raise InputError("leading_dense and balance_rate must not be negative.")

    @property
    def stored(self) -> int:
        """Number of experts that have parameters, including those never chosen."""
        return -(-self.routed // self.multiple) * self.multiple


class MixtureOfExperts(nnx.Module):
    """Routed SwiGLU experts and a shared feed-forward layer.

    Args:
        width: model width D.
        config: sizes.
        dtype: dtype of the computation; parameters are float32, and so is the routing.
        rngs: random streams.
    """

    def __init__(
        self, width: int, config: ExpertsConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        init = nnx.initializers.lecun_normal(batch_axis=0)
        role = Matrix(stacked=1, experts=True)
        into, out = (config.stored, width, config.width), (config.stored, config.width, width)
        self.router = nnx.Param(
            nnx.initializers.lecun_normal()(rngs.params(), (width, config.routed))
        )
        self.gate = nnx.Param(init(rngs.params(), into), role=role)
        self.up = nnx.Param(init(rngs.params(), into), role=role)
        # Output matrices of attention and feed-forward start at zero: see `Decoder`.
        self.down = nnx.Param(jnp.zeros(out), role=role)
        self.shared = FeedForward(width, config.shared * config.width, dtype=dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "B T D"], bias: Float[Array, "X"]
    ) -> tuple[Float[Array, "B T D"], Int32[Array, "X"]]:
        """Runs every position through the experts that are chosen for it.

        Args:
            x: normalized hidden states.
            bias: of every routed expert; added to the affinities for the choice only (see
                `balance`).

        Returns:
            The output, and the load of every expert: how many tokens of all devices chose it.

        Raises:
            InputError: the mesh axis "expert" does not divide the number of stored experts.
        """
        mesh, is_split = jax.sharding.get_abstract_mesh(), in_explicit_mesh()
        shards = mesh.shape.get("expert", 1) if is_split else 1
        if self.config.stored % shards:
            raise InputError(
                f"{self.config.stored} stored experts cannot be split evenly over {shards} "
                f"devices; set experts.multiple to {shards} or a multiple of it."
            )
        stacks = tuple(w[...].astype(self.dtype) for w in (self.gate, self.up, self.down))
        apply = partial(_apply, config=self.config)
        if is_split:
            spec = jax.typeof(x).sharding.spec
            name = "expert" if "expert" in mesh.shape else None
            stack_spec = jax.P(name, reduced=set(split_axes(x)) - {name})
            stacks = jax.sharding.reshard(stacks, stack_spec)
            apply = jax.shard_map(
                partial(apply, shards=shards, axes=spec_axes(spec)),
                in_specs=(spec, jax.P(), jax.P(), stack_spec),
                out_specs=(spec, jax.P()),
            )
        y, load = apply(x, self.router[...], bias, stacks)
        return checkpoint_name(y, "experts") + self.shared(x), load


def balance(bias: Float[Array, "X"], load: Int32[Array, "X"], rate: float) -> Float[Array, "X"]:
    """The next bias: plus `rate` for a load below the mean, minus `rate` for a load above it.

    Algorithm 1 of arXiv 2408.15664.
    """
    load = load.astype(bias.dtype)
    return bias + rate * jnp.sign(jnp.mean(load) - load)


def route(
    x: Float[Array, "tokens D"],
    router: Float[Array, "D X"],
    bias: Float[Array, "X"],
    active: int,
) -> tuple[Int32[Array, "tokens active"], Float[Array, "tokens active"]]:
    """The experts that every token chooses, and their weights, which sum to 1.

    If `active` is 1, the weight is the affinity itself. A constant weight of 1 would give the
    router no gradient.

    Args:
        x: hidden states; affinities are computed in float32.
        router: one column per expert.
        bias: affects only which experts are chosen, not the weights. It has no gradient.
        active: experts per token.
    """
    logits = jnp.dot(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(jax.nn.sigmoid(logits) + bias[None]), active)
    # As a product, whose gradient is also a product. The gradient of a gather would be a scatter.
    is_chosen = jax.nn.one_hot(chosen, router.shape[1])
    log_affinity = jax.nn.log_sigmoid(jnp.sum(is_chosen * logits[:, None], axis=2))
    # Affinities divided by their sum, from logarithms, which also works where affinities underflow.
    return chosen, jnp.exp(log_affinity) if active == 1 else jax.nn.softmax(log_affinity, axis=1)


def _apply(
    x: Float[Array, "B T D"],
    router: Float[Array, "D X"],
    bias: Float[Array, "X"],
    stacks: tuple[Array, ...],
    *,
    config: ExpertsConfig,
    shards: int = 1,
    axes: tuple[str, ...] = (),
) -> tuple[Float[Array, "B T D"], Int32[Array, "X"]]:
    """The routed experts on one device, which stores 1/`shards` of them.

    `axes` are the mesh axes over which x is split.
    """
    tokens = x.reshape(-1, x.shape[2])
    chosen, weights = route(tokens, router, bias, config.active)
    load = count(chosen.reshape(-1), config.routed)
    if axes:
        load = jax.lax.psum(load, axes)
    others = tuple(name for name in axes if name != "expert")
    stacks = jax.lax.pcast(stacks, others, to="varying")
    implementation, pairs, experts = config.implementation, chosen.size, len(stacks[0])
    if shards == 1:
        ranking = rank_pairs(chosen, experts)
        block = block_size(pairs, experts, implementation)
        y = mix_experts(ranking, (tokens, weights, stacks), capacity=pairs, block=block)
        return y.astype(x.dtype).reshape(x.shape), load

    # Every device receives all tokens of its expert-parallel group of S devices: S−1 times as many
    # as its own. Sending a copy of each token to each of its k experts would transfer about
    # k·(S−1)/S times as many. That is not less for S ≤ k, and needs buffers that can overflow. (One
    # copy per device would be fewer.)
    if split := "expert" in axes:
        gather = partial(jax.lax.all_gather, axis_name="expert", tiled=True)
        tokens, chosen, weights = gather(tokens), gather(chosen), gather(weights)
    else:
        tokens, chosen, weights = jax.lax.pcast((tokens, chosen, weights), "expert", to="varying")
    own = chosen - experts * jax.lax.axis_index("expert")
    ranking = rank_pairs(jnp.where((own >= 0) & (own < experts), own, experts), experts)

    most = len(tokens) * min(config.active, experts)
    capacity = min(most, math.ceil(CAPACITY_FACTOR * chosen.size / shards))
    mix = partial(
        mix_experts, capacity=capacity, block=block_size(capacity, experts, implementation)
    )
    # Each device sums in float32. The sum over devices, at most k of which have a token's experts,
    # is in the dtype of x: in bfloat16 that halves the bytes sent.
    y = sum_rounds(mix, ranking, (tokens, weights, stacks), capacity).astype(x.dtype)
    y = jax.lax.psum_scatter(y, "expert", tiled=True) if split else jax.lax.psum(y, "expert")
    return y.reshape(x.shape), load
