"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, §2.1) over packed documents.

Keys and values are computed from one narrow latent per position, c = RMSNorm(x·down). So a decoder
caches only c and one rotated key, which all heads share:

    keyₕ = [c·key_upₕ ; rotary key],  valueₕ = c·value_upₕ    (equations 9 to 19)
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from engram_jax.errors import InputError
from engram_jax.layers.context import on_all_positions
from engram_jax.layers.norms import RMSNorm
from engram_jax.layers.positions import YarnConfig, rotate
from engram_jax.layers.scaled_dot_product import Implementation, attend, attend_cached
from engram_jax.layers.slots import Slots
from engram_jax.parameters import Matrix


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Sizes of a latent attention layer.

    Attributes:
        heads: heads Q.
        query_rank: width I of compressed queries; 0: queries are not compressed.
        latent_width: width Y of the latent, from which keys and values are computed.
        head_width: width P of the part of a head's query and key without rotary positions.
        rotary_width: width Z of the part with rotary positions; all heads share its key.
        value_width: width O of a head's value.
        theta: base of the rotary frequencies.
        yarn: extension to longer documents; None: plain rotary frequencies.
        implementation: "xla" on any device, "cudnn" on NVIDIA GPUs in bfloat16, "splash" on TPU;
            None chooses by device (see `attention.attend`).
    """

    heads: int = 32
    query_rank: int = 0
    latent_width: int = 512
    head_width: int = 128
    rotary_width: int = 64
    value_width: int = 128
    theta: float = 10_000.0
    yarn: YarnConfig | None = None
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        widths = (self.latent_width, self.head_width, self.rotary_width, self.value_width)
        if min(self.heads, *widths) < 1:
            raise InputError(
                "heads, latent_width, head_width, rotary_width and value_width must be at least 1."
            )
        if self.query_rank < 0:
            raise InputError(
                f"query_rank {self.query_rank} is negative; 0 means uncompressed queries."
            )
        if self.rotary_width % 2:
            raise InputError(
                f"rotary_width {self.rotary_width} is odd; rotary embedding needs pairs."
            )
        if self.theta <= 1:
            raise InputError(f"theta {self.theta} must be above 1; 10000 is common.")

    @property
    def softmax_scale(self) -> float:
        """The factor on the scores: 1/√(P+Z), times YaRN's factor."""
        factor = self.yarn.softmax_factor if self.yarn else 1.0
        return factor / math.sqrt(self.head_width + self.rotary_width)


class Latent(NamedTuple):
    """What a decoder caches of every position.

    Attributes:
        content: the normalized latent, from which keys and values are computed.
        rotary_key: the rotated key that all heads share.
    """

    content: Float[Array, "B T Y"]
    rotary_key: Float[Array, "B T Z"]


class LatentAttention(nnx.Module):
    """Causal multi-head latent attention, within documents.

    Args:
        width: model width D.
        config: sizes.
        norm_epsilon: epsilon of the norms of the latent and of the compressed query.
        dtype: dtype of the computation; parameters are float32.
        rngs: random streams.
    """

    def __init__(
        self,
        width: int,
        config: LatentAttentionConfig,
        *,
        norm_epsilon: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        def draw(*shape: int) -> nnx.Param[Array]:
            init = nnx.initializers.lecun_normal(in_axis=0, out_axis=range(1, len(shape)))
            return nnx.Param(init(rngs.params(), shape), role=Matrix())

        heads, rotary_width, latent_width = config.heads, config.rotary_width, config.latent_width
        if config.query_rank:
            self.query_down = draw(width, config.query_rank)
            self.query_norm = RMSNorm(config.query_rank, epsilon=norm_epsilon)
        self.query = draw(config.query_rank or width, heads, config.head_width + rotary_width)
        self.down = draw(width, latent_width + rotary_width)
        self.latent_norm = RMSNorm(latent_width, epsilon=norm_epsilon)
        self.key_up = draw(latent_width, heads, config.head_width)
        self.value_up = draw(latent_width, heads, config.value_width)
        # Output matrices of attention and feed-forward start at zero: see `Decoder`.
        out = jnp.zeros((heads, config.value_width, width))
        self.out = nnx.Param(out, role=Matrix(inputs=2))
        self.config = config
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segments: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """Attends to earlier positions of the same document.

        Args:
            x: normalized hidden states.
            segments: document number of every position.
            positions: position within the document.
        """
        query = jnp.concatenate(self._queries(x, positions), axis=-1)
        latent = self.compress(x, positions)
        key, value = on_all_positions(self._keys_and_values, latent, self._ups())
        config = self.config
        mixed = attend(query, key, value, segments, config.implementation, config.softmax_scale)
        return self._combine(mixed)

    def extend(
        self,
        x: Float[Array, "B T D"],
        positions: Int32[Array, "B T"],
        cache: Latent,
        slots: Slots,
    ) -> tuple[Float[Array, "B T D"], Latent]:
        """Like a call, for positions that follow cached ones; also returns the new cache.

        For few new positions, the keys and values of cached positions are not computed. Instead,
        queries are multiplied by key_up, and the weighted sum of latents by value_up: then the
        latent with the rotary key is the key of the only key/value head, and the latent its value.

        Args:
            x: normalized hidden states of the new positions.
            positions: their positions within their documents.
            cache: latents of the positions before them.
            slots: their slots.
        """
        dtype = self.dtype
        cache = Latent(*map(slots.write, cache, self.compress(x, positions)))
        query, rotary_query = self._queries(x, positions)
        absorbs = self._absorbs(x.shape[1])
        if absorbs:
            query = jnp.einsum("btqp,yqp->btqy", query, self.key_up.astype(dtype))

        def read(number: Int32[Array, ""] | int) -> tuple[Array, Array]:
            latent = Latent(*(slots.block_of(part, number) for part in cache))
            if not absorbs:
                key, value = self._keys_and_values(*latent, *self._ups())
                return key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)
            key = jnp.concatenate(latent, axis=-1)
            return key.swapaxes(1, 2)[:, None], latent.content[:, None]

        query = jnp.concatenate([query, rotary_query], axis=-1)
        mixed = attend_cached(query, read, slots, self.config.softmax_scale)
        if absorbs:
            mixed = jnp.einsum("btqy,yqo->btqo", mixed, self.value_up.astype(dtype))
        return self._combine(mixed), cache

    def _absorbs(self, length: int) -> bool:
        """Whether T new positions need fewer products with latents than with keys and values.

        Per head and cached position, these are T·(2Y + Z) and T·(P + Z + O) + Y·(P + O).
        """
        config = self.config
        head = config.head_width + config.value_width
        return length * (2 * config.latent_width - head) <= config.latent_width * head

    def empty_cache(self, batch: int, capacity: int) -> Latent:
        """A cache of this many slots for every sequence."""
        widths = self.config.latent_width, self.config.rotary_width
        return Latent(*(jnp.zeros((batch, capacity, width), self.dtype) for width in widths))

    def compress(self, x: Float[Array, "B T D"], positions: Int32[Array, "B T"]) -> Latent:
        """The latents of hidden states.

        Args:
            x: normalized hidden states.
            positions: position within the document.
        """
        both = x @ self.down.astype(self.dtype)
        content, rotary_key = jnp.split(both, [self.config.latent_width], axis=-1)
        rotated = rotate(rotary_key[:, :, None], positions, self.config.theta, self.config.yarn)
        return Latent(self.latent_norm(content), rotated[:, :, 0])

    def _combine(self, mixed: Float[Array, "B T Q O"]) -> Float[Array, "B T D"]:
        """The output of all heads. (An einsum over two axes would transpose the matrix.)"""
        out = self.out.astype(self.dtype)
        return mixed.reshape(*mixed.shape[:2], -1) @ out.reshape(-1, out.shape[-1])

    def _ups(self) -> tuple[Float[Array, "Y Q P"], Float[Array, "Y Q O"]]:
        """The matrices from latents to keys and values."""
        return self.key_up.astype(self.dtype), self.value_up.astype(self.dtype)

    def _keys_and_values(
        self,
        content: Float[Array, "B T Y"],
        rotary_key: Float[Array, "B T Z"],
        key_up: Float[Array, "Y Q P"],
        value_up: Float[Array, "Y Q O"],
    ) -> tuple[Float[Array, "B T Q key"], Float[Array, "B T Q O"]]:
        """Every head's key and value of latents."""
        key = jnp.einsum("bty,yqp->btqp", content, key_up)
        shared = (*key.shape[:-1], self.config.rotary_width)
        rotary_key = jnp.broadcast_to(rotary_key[:, :, None], shared)
        value = jnp.einsum("bty,yqo->btqo", content, value_up)
        return jnp.concatenate([key, rotary_key], axis=-1), value

    def _queries(
        self, x: Float[Array, "B T D"], positions: Int32[Array, "B T"]
    ) -> tuple[Float[Array, "B T Q P"], Float[Array, "B T Q Z"]]:
        """Every head's query: the part without rotary positions, and the rotated part."""
        config = self.config
        if config.query_rank:
            x = self.query_norm(x @ self.query_down.astype(self.dtype))
        both = jnp.einsum("btd,dqp->btqp", x, self.query.astype(self.dtype))
        query, rotary_query = jnp.split(both, [config.head_width], axis=-1)
        return query, rotate(rotary_query, positions, config.theta, config.yarn)
