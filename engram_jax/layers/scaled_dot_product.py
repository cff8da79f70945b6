"""Scaled dot-product attention: over packed documents, and over cached positions."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from engram_jax.errors import InputError
from engram_jax.layers.slots import Slots
from engram_jax.sharding import platform_of, position_axis, spec_axes

type Implementation = Literal["xla", "cudnn", "splash"]


def attend(
    query: Float[Array, "B T Q P"],
    key: Float[Array, "copies slots J P"],
    value: Float[Array, "copies slots J O"],
    segments: Int32[Array, "B T"],
    implementation: Implementation | None = None,
    scale: float | None = None,
) -> Float[Array, "B T Q O"]:
    """softmax(scale·q·k)·v over the earlier positions of the same document.

    Implementation None chooses
    - "splash" on TPU if a device's part of T is a multiple of 128,
    - "cudnn" on an NVIDIA GPU (Ampere or later) for bfloat16, even T and head width up to 128 (256
      on Hopper), if T is not split over devices,
    - "xla" otherwise. It stores B·Q·T² scores, and is faster for few heads and T of about 256.

    A named implementation is used or raises; there is no fallback.

    Args:
        query: queries.
        key: keys of all positions, from `on_all_positions`; each serves Q/J query heads. If T is
            not split over devices, [B, T, J, P].
        value: values of all positions.
        segments: document number of every position.
        implementation: see above.
        scale: factor on the scores; None is 1/√P.

    Raises:
        InputError: inside a mesh, an axis other than B and the queries' T is split, or T is split
            and "cudnn" is named.
    """
    along_t = position_axis(query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    chosen = implementation or _fastest(query, value, along_t)
    if chosen == "splash":
        on_cpu = platform_of(jax.sharding.get_abstract_mesh()) == "cpu"
        attend_own = partial(_attend_splash, scale, on_cpu, along_t)
    elif chosen == "xla":
        attend_own = partial(_attend_xla, scale, along_t)
    elif along_t is None:
        attend_own = partial(_attend_cudnn, scale)
    else:
        raise InputError(
            "The attention implementation cudnn needs complete sequences; set mesh.context to 1, "
            "or leave the implementation out."
        )
    inputs, mesh = (query, key, value, segments), jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # Each device computes its own queries. (XLA cannot partition a kernel automatically, and
        # explicit sharding cannot type JAX's einsums at B = 1.)
        specs = tuple(jax.typeof(array).sharding.spec for array in inputs)
        others = spec_axes(jax.P(*specs[0][2:], *specs[1][1:], *specs[2][1:]))
        if any(mesh.shape[name] > 1 for name in others):
            raise InputError(
                f"Attention can be split only along B, and queries along T, not as {specs}."
            )
        attend_own = jax.shard_map(
            attend_own, in_specs=specs, out_specs=specs[0], check_vma=chosen == "xla"
        )
    return attend_own(*inputs)


def attend_cached(
    query: Float[Array, "B T Q P"],
    read: Callable[[Int32[Array, ""] | int], tuple[Array, Array]],
    slots: Slots,
    scale: float,
) -> Float[Array, "B T Q O"]:
    """softmax(scale·q·k)·v over the cached positions that each new position sees.

    It visits blocks of slots up to the longest sequence's, with a running maximum m and a running
    sum of exp(score − m). A block that a sequence does not need leaves its numbers as they are, bit
    for bit. So a sequence's result does not depend on the lengths of the others.

    Args:
        query: queries of the new positions.
        read: gives the keys [B, J, P, block] and values [B, J, block, O] of a block of slots,
            including those of the new positions.
        slots: slots of the new positions.
        scale: factor on the scores.
    """
    key, value = jax.eval_shape(read, 0)
    grouped = query.reshape(*query.shape[:2], key.shape[1], -1, query.shape[3])
    grouped = grouped.transpose(0, 2, 3, 1, 4)  # B J G T P
    multiply = _multiply_few if _is_few(grouped) else _multiply

    def add_block(
        number: Int32[Array, ""] | int, running: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        mixed, largest, total = running
        key, value = read(number)
        scores = scale * multiply(grouped, key)
        scores = jnp.where(slots.seen(number)[:, None, None], scores, -jnp.inf)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - new_largest[..., None])
        kept = jnp.exp(largest - new_largest)
        mixed = kept[..., None] * mixed
        mixed += multiply(weights.astype(value.dtype), value)
        return mixed, new_largest, kept * total + jnp.sum(weights, axis=-1)

    rows = grouped.shape[:4]
    least = jnp.full(rows, jnp.finfo(jnp.float32).min)
    running = (jnp.zeros((*rows, value.shape[3])), least, jnp.zeros(rows))
    if slots.capacity == slots.block:
        mixed, _, total = add_block(0, running)
    else:
        mixed, _, total = jax.lax.fori_loop(0, slots.blocks, add_block, running)
    mixed = (mixed / total[..., None]).astype(value.dtype)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(*query.shape[:3], -1)


def _is_few(grouped: Float[Array, "B J G T P"]) -> bool:
    """Whether so few queries share a key on a CPU that XLA's matrix product is slow.

    For one query of each of 6 heads, 2 key/value heads and 256 slots, it takes 1.4 ms for 64
    sequences, and `_multiply_few` 0.25 ms.
    """
    queries = grouped.shape[2] * grouped.shape[3]
    return queries <= 8 and platform_of(jax.sharding.get_abstract_mesh()) == "cpu"


def _multiply(
    x: Float[Array, "B J G T n"], y: Float[Array, "B J n m"]
) -> Float[Array, "B J G T m"]:
    """x · y for every key/value head, in float32."""
    return jnp.einsum("bjgtn,bjnm->bjgtm", x, y, preferred_element_type=jnp.float32)


def _multiply_few(
    x: Float[Array, "B J G T n"], y: Float[Array, "B J n m"]
) -> Float[Array, "B J G T m"]:
    """`_multiply` as a sum of products, which XLA vectorizes over m."""
    products = x[..., None].astype(jnp.float32) * y[:, :, None, None].astype(jnp.float32)
    return jnp.sum(products, axis=4)


def _of_all_positions(
    segments: Int32[Array, "B T"], along_t: str | None
) -> Int32[Array, "B slots"]:
    """The document numbers of the keys, from those of a device's queries."""
    if along_t is None:
        return segments
    return jax.lax.all_gather(segments, along_t, axis=1, tiled=True)


def _attend_xla(
    scale: float,
    along_t: str | None,
    query: Float[Array, "B T Q P"],
    key: Float[Array, "B slots J P"],
    value: Float[Array, "B slots J O"],
    segments: Int32[Array, "B T"],
) -> Float[Array, "B T Q O"]:
    # jax.nn.dot_product_attention requires values to be as wide as keys.
    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    scores = jnp.einsum("btjgp,bsjp->bjgts", grouped, key, preferred_element_type=jnp.float32)
    seen = segments[:, :, None] == _of_all_positions(segments, along_t)[:, None]
    slot = jnp.arange(query.shape[1])
    if along_t is not None:
        slot += len(slot) * jax.lax.axis_index(along_t)
    seen &= (slot[:, None] >= jnp.arange(key.shape[1])[None])[None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scale * scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bjgts,bsjo->btjgo", weights.astype(value.dtype), value)
    return mixed.reshape(*query.shape[:3], value.shape[3])


def _attend_cudnn(
    scale: float,
    query: Float[Array, "B T Q P"],
    key: Float[Array, "B T J P"],
    value: Float[Array, "B T J O"],
    segments: Int32[Array, "B T"],
) -> Float[Array, "B T Q O"]:
    width = max(query.shape[-1], value.shape[-1])
    wide = [
        jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1]))) for x in (query, key, value)
    ]
    mixed = jax.nn.dot_product_attention(
        *(wide[0], wide[1], wide[2]),
        mask=segments[:, None, :, None] == segments[:, None, None, :],
        scale=scale,
        is_causal=True,
        implementation="cudnn",
    )
    return mixed[..., : value.shape[-1]]


def _fastest(
    query: Float[Array, "B T Q P"],
    value: Float[Array, "copies slots J O"],
    along_t: str | None,
) -> Implementation:
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if along_t is None else mesh.shape[along_t]
    length, width = query.shape[1] // parts, max(query.shape[-1], value.shape[-1])
    platform = platform_of(mesh)
    if platform == "tpu" and length % 128 == 0:
        return "splash"
    if platform == "gpu" and query.dtype == jnp.bfloat16 and length % 2 == 0 and parts == 1:
        # An AMD GPU reports no such number. A GPU that is only compiled for reports nothing.
        capability = getattr(jax.devices()[0], "compute_capability", "")
        generation = float(capability) if re.match(r"\d+\.", capability) else 0
        # For heads wider than 128, cuDNN has a backward pass on Hopper but not on all later GPUs.
        widest = 0 if generation < 8 else 256 if 9 <= generation < 10 else 128
        if width % 8 == 0 and width <= widest:
            return "cudnn"
    return "xla"


def _attend_splash(
    scale: float,
    interpret: bool,
    along_t: str | None,
    query: Float[Array, "B T Q P"],
    key: Float[Array, "B slots J P"],
    value: Float[Array, "B slots J O"],
    segments: Int32[Array, "B T"],
) -> Float[Array, "B T Q O"]:
    # Imported here because it loads all of Pallas for TPU, which other devices do not need.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, slots = *query.shape[1:3], key.shape[1]
    mask = splash.MultiHeadMask([splash.CausalMask((slots, slots))] * heads)
    # The default block of 128 takes about 15 times as many steps. At 1024, float32 exceeds v5p's
    # VMEM.
    block = math.gcd(length, 512)
    sizes, parts = splash.BlockSizes(*(block,) * 8), slots // length
    kernel = splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=parts, interpret=interpret
    )
    if along_t is not None:
        # The kernel has the blocks that the queries of each device visit, [heads, blocks, …], and
        # the queries' positions, [T].
        own = jax.lax.axis_index(along_t)

        def take_own(leaf: Array) -> Array:
            axis = max(leaf.ndim - 2, 0)
            size = leaf.shape[axis] // parts
            return jax.lax.dynamic_slice_in_dim(leaf, own * size, size, axis)

        kernel = jax.tree.map(take_own, kernel)
    # In float32, since bfloat16 would round the scale by up to 0.4 %.
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)

    def attend_row(query: Array, key: Array, value: Array, *segments: Array) -> Array:
        heads_first = (x.swapaxes(0, 1) for x in (query, key, value))
        return kernel(*heads_first, segment_ids=splash.SegmentIds(*segments)).swapaxes(0, 1)

    return jax.vmap(attend_row)(query, key, value, segments, _of_all_positions(segments, along_t))
