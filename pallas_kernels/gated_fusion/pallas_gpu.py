"""The fusion on GPU, by Mosaic GPU: two kernels forward, two backward.

Hidden states and keys only make the gate, and the gate, a number a token and branch, is all that
the rest needs of them. So one kernel reads them and sums (`_sums_kernel`), and another reads the
value and mixes (`_mix_kernel`); the backward pass mirrors both (`_unmix_kernel`, `_ungate_kernel`)
and keeps the sums. What has branches and width is so read once in each pass; the value, which has
no branches, once more by XLA for its mean square. Each block of threads walks along a strip of
tokens, with one part of the channels in registers (`_sums_kernel`: with all of them).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.gated_fusion.form import FusionForm, no_gradients, token_flags

type Residuals = tuple[Any, ...]  # the arguments but the form, the gates, and what made them

STRIP = 128  # tokens of a block; a backward pass reads those of one reach of the taps twice
THREADS = 128  # of a warpgroup, each with as many channels


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def fuse(
    hidden: Float[Array, "B T M D"],
    key: Float[Array, "B T M D"],
    value: Float[Array, "B T D"],
    gain: Float[Array, "M D"],
    taps: Float[Array, "kernel M D"] | None,
    segments: Int32[Array, "B T"] | None,
    token_mask: Bool[Array, "B T"] | None,
    form: FusionForm,
) -> tuple[Float[Array, "B T M D"], Float[Array, "B T M"]]:
    """What to add to the residual branches, and the gates.

    Raises:
        ValueError: D is no multiple of 128.
    """
    return _forward(hidden, key, value, gain, taps, segments, token_mask, form)[0]


def _forward(
    hidden: Array,
    key: Array,
    value: Array,
    gain: Array,
    taps: Array | None,
    segments: Array | None,
    token_mask: Array | None,
    form: FusionForm,
) -> tuple[tuple[Array, Array], Residuals]:
    if hidden.shape[3] % THREADS:
        raise ValueError(
            f"The GPU kernel needs a width that {THREADS} divides, not {hidden.shape[3]}; take the "
            "implementation 'xla'."
        )
    flags = _flags(hidden, taps, segments, token_mask, form)
    scores = _score(hidden, key, gain, form)
    gate = jnp.where((flags & 1)[..., None] != 0, jax.nn.sigmoid(form.root(scores[0])), 0)
    scale, _ = _scale(gate, value, form)
    out = _launch(_mix_kernel, hidden, [value, gate, scale, flags], taps, form, [hidden])
    arguments = hidden, key, value, gain, taps, segments, token_mask
    return (out[0], gate), (*arguments, gate, *scores)


def _backward(
    form: FusionForm, residuals: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array | np.ndarray | None, ...]:
    hidden, key, value, gain, taps, segments, token_mask, gate, *scores = residuals
    score, hidden_size, key_size = scores
    d_out, d_gate = cotangents
    batch, length, branches, width = hidden.shape
    strips, parts = pl.cdiv(length, STRIP), width // _part(width)
    flags = _flags(hidden, taps, segments, token_mask, form)
    scale, size = _scale(gate, value, form)
    by_part = jax.ShapeDtypeStruct((batch, length, branches, parts), jnp.float32)
    by_token = jax.ShapeDtypeStruct(value.shape, jnp.float32)
    kernel = 0 if taps is None else len(taps)
    by_strip = jax.ShapeDtypeStruct((batch, strips, kernel, branches, width), jnp.float32)
    d_value, direct, d_scale, *d_taps = _launch(
        _unmix_kernel,
        hidden,
        [d_out, value, gate, scale, flags],
        taps,
        form,
        [by_token, by_part, by_part, *([by_strip] if kernel else [])],
    )
    d_gate += jnp.sum(direct, axis=-1)
    if kernel:
        d_scale = jnp.sum(d_scale, axis=-1)
        d_gate += d_scale * form.convolution_epsilon * size**3
        d_square = -0.5 * jnp.sum(d_scale * scale**3, axis=-1, keepdims=True)
        d_value += 2 / width * d_square * value.astype(jnp.float32)

    d_score = d_gate * gate * (1 - gate) * form.root_slope(score)
    both = d_score * hidden_size * key_size * width**-0.5
    own = d_score * score / width
    gain_by_strip = jax.ShapeDtypeStruct((batch, strips, branches, width), jnp.float32)
    d_hidden, d_key, d_gain = _launch(
        _ungate_kernel,
        hidden,
        [hidden, key, both, own * hidden_size**2, own * key_size**2, gain],
        None,
        form,
        [hidden, key, gain_by_strip],
    )
    return (
        *(d_hidden, d_key, d_value.astype(value.dtype)),
        jnp.sum(d_gain, axis=(0, 1)).astype(gain.dtype),
        None if taps is None else jnp.sum(d_taps[0], axis=(0, 1)).astype(taps.dtype),
        *no_gradients(segments, token_mask),
    )


fuse.defvjp(_forward, _backward)


def _part(width: int) -> int:
    """Channels of a block: up to four a thread."""
    return next(THREADS * n for n in (4, 2, 1) if not width % (THREADS * n))


def _flags(
    hidden: Array,
    taps: Array | None,
    segments: Array | None,
    token_mask: Array | None,
    form: FusionForm,
) -> Int32[Array, "B T"]:
    distances = form.distances(0 if taps is None else len(taps))
    return token_flags(hidden.shape[0], hidden.shape[1], segments, token_mask, distances)


def _scale(
    gate: Float[Array, "B T M"], value: Float[Array, "B T D"], form: FusionForm
) -> tuple[Float[Array, "B T M"], Float[Array, "B T M"]]:
    """c, with RMSNorm(αv) = c·v (see `xla`), and c / α."""
    mean_square = jnp.mean(value.astype(jnp.float32) ** 2, axis=-1)[..., None]
    size = jax.lax.rsqrt(gate**2 * mean_square + form.convolution_epsilon)
    return gate * size, size


def _score(
    hidden: Float[Array, "B T M D"],
    key: Float[Array, "B T M D"],
    gain: Float[Array, "M D"],
    form: FusionForm,
) -> tuple[Float[Array, "B T M"], Float[Array, "B T M"], Float[Array, "B T M"]]:
    """The score, and what normalizes queries and keys."""
    width = hidden.shape[3]
    sums = [jax.ShapeDtypeStruct(hidden.shape[:3], jnp.float32)] * 3
    product, h_square, k_square = _launch(
        _sums_kernel, hidden, [hidden, key, gain], None, form, sums, parts=1
    )
    hidden_size = jax.lax.rsqrt(h_square / width + form.epsilon)
    key_size = jax.lax.rsqrt(k_square / width + form.epsilon)
    return product * hidden_size * key_size * width**-0.5, hidden_size, key_size


def _launch(
    kernel: Any,
    hidden: Array,
    inputs: list[Array],
    taps: Array | None,
    form: FusionForm,
    outputs: list[Any],
    parts: int | None = None,
) -> list[Array]:
    """Runs a kernel on blocks of (row of the batch, strip of tokens, part of the channels)."""
    batch, length, branches, width = hidden.shape
    size = width if parts == 1 else _part(width)
    distances = form.distances(0 if taps is None else len(taps))
    scratch = []
    if kernel is _unmix_kernel and distances:
        ring = max(distances) + 1
        scratch = [
            plgpu.SMEM((branches, ring, size), jnp.float32),
            plgpu.SMEM((len(distances), branches, size), jnp.float32),
        ]
    body = partial(kernel, size=size, length=length, branches=branches, distances=distances)
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        scratch_types=scratch,
        grid=(batch, pl.cdiv(length, STRIP), width // size),
        grid_names=("row", "strip", "part"),
    )(*inputs, *([] if taps is None else [taps]))


class _Block:
    """Where a block stands, and how it reads and writes its channels."""

    def __init__(self, size: int, length: int) -> None:
        self.row, self.strip = jax.lax.axis_index("row"), jax.lax.axis_index("strip")
        self.part = jax.lax.axis_index("part")
        self.channels = pl.ds(self.part * size, size)
        self.first = self.strip * STRIP
        self.last = jnp.minimum(self.first + STRIP, length)
        vector = next(n for n in (4, 2, 1) if not size % (THREADS * n))
        self.layout = plgpu.Layout.WG_STRIDED((size,), vec_size=vector)

    def load(self, ref: Any, *index: Any) -> Float[Array, "channels"]:
        """This block's channels of ref[*index]."""
        found = plgpu.layout_cast(ref[(*index, self.channels)], self.layout)
        return found.astype(jnp.float32)

    def load_all(self, ref: Any, *index: Any) -> Float[Array, "channels"]:
        """ref[*index] of this block's own memory."""
        return plgpu.layout_cast(ref[index], self.layout)

    def only_if(self, there: Bool[Array, ""], x: Float[Array, "channels"]) -> Any:
        """x, or zeros."""
        return jnp.where(jnp.broadcast_to(there, x.shape), x, self.zeros())

    def zeros(self) -> Float[Array, "channels"]:
        """No channels yet."""
        shape = (self.channels.size,)
        return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), self.layout)


def _sums_kernel(
    hidden: Any,
    key: Any,
    gain: Any,
    product: Any,
    h_square: Any,
    k_square: Any,
    *,
    size: int,
    length: int,
    branches: int,
    distances: tuple[int, ...],
) -> None:
    """⟨gain·k, h⟩, ⟨h, h⟩ and ⟨k, k⟩."""
    block = _Block(size, length)

    def visit(token: Any, _: None) -> None:
        for m in range(branches):
            place = (block.row, token, m)
            h, k = block.load(hidden, *place), block.load(key, *place)
            product[place] = jnp.sum(block.load(gain, m) * k * h)
            h_square[place] = jnp.sum(h * h)
            k_square[place] = jnp.sum(k * k)

    jax.lax.fori_loop(block.first, block.last, visit, None)


def _mix_kernel(
    value: Any,
    gate: Any,
    scale: Any,
    flags: Any,
    *rest: Any,
    size: int,
    length: int,
    branches: int,
    distances: tuple[int, ...],
) -> None:
    """αv + SiLU(Conv(cv))."""
    taps, out = rest if distances else (None, *rest)
    block = _Block(size, length)

    def visit(token: Any, _: None) -> None:
        v, bits = block.load(value, block.row, token), flags[block.row, token]
        for m in range(branches):
            added = gate[block.row, token, m] * v
            if distances:
                older = _older(block, value, scale, token, bits, m, distances)
                mixed = _convolve(block, taps, older, m)
                added += mixed * jax.nn.sigmoid(mixed)
            out[block.row, token, m, block.channels] = added.astype(out.dtype)

    jax.lax.fori_loop(block.first, block.last, visit, None)


def _unmix_kernel(
    d_out: Any,
    value: Any,
    gate: Any,
    scale: Any,
    flags: Any,
    *rest: Any,
    size: int,
    length: int,
    branches: int,
    distances: tuple[int, ...],
) -> None:
    """From the last token to the first; a ring keeps what later tokens send back."""
    refs = list(rest)
    taps: Any = refs.pop(0) if distances else None
    d_value, direct, d_scale, *refs = refs
    block = _Block(size, length)
    if distances:
        d_taps, later, by_tap = refs
        for m in range(branches):
            for slot in range(later.shape[1]):
                later[m, slot] = block.zeros()
            for tap in range(len(distances)):
                by_tap[tap, m] = block.zeros()
    reach = max(distances, default=0)

    def slot_of(token: Any) -> Any:
        return token % (reach + 1)

    def visit(step: Any, _: None) -> None:
        token = block.last + reach - 1 - step
        pl.when(token < length)(lambda: visit_token(token))

    def visit_token(token: Any) -> None:
        own = token < block.last
        v, bits = block.load(value, block.row, token), flags[block.row, token]
        d_v = block.zeros()
        for m in range(branches):
            place = (block.row, token, m)
            d_added = block.load(d_out, *place)
            d_v += gate[place] * d_added
            if distances:
                older = _older(block, value, scale, token, bits, m, distances)
                mixed = _convolve(block, taps, older, m)
                slope = jax.nn.sigmoid(mixed)
                d_mixed = d_added * slope * (1 + mixed * (1 - slope))
                later[m, slot_of(token)] = d_mixed
                plgpu.commit_smem()

            @pl.when(own)
            def write(m: int = m, place: tuple = place, d_added: Array = d_added) -> None:
                direct[(*place, block.part)] = jnp.sum(d_added * v)

            if distances:
                d_normed = block.zeros()
                for tap, distance in enumerate(distances):
                    ahead = jnp.minimum(token + distance, length - 1)
                    reads = (flags[block.row, ahead] >> (1 + tap) & 1) != 0
                    reads &= token + distance < length
                    sent = block.load_all(later, m, slot_of(ahead))
                    d_normed += block.load(taps, tap, m) * block.only_if(reads, sent)
                d_v += scale[place] * d_normed

                @pl.when(own)
                def write_own(
                    m: int = m,
                    place: tuple = place,
                    d_normed: Array = d_normed,
                    d_mixed: Array = d_mixed,
                    older: list[Array] = older,
                ) -> None:
                    d_scale[(*place, block.part)] = jnp.sum(d_normed * v)
                    for tap in range(len(distances)):
                        total = block.load_all(by_tap, tap, m)
                        by_tap[tap, m] = total + d_mixed * older[tap]

        @pl.when(own)
        def write_value() -> None:
            d_value[block.row, token, block.channels] = d_v

    jax.lax.fori_loop(0, block.last - block.first + reach, visit, None)
    if distances:
        plgpu.commit_smem()
        for m in range(branches):
            for tap in range(len(distances)):
                total = block.load_all(by_tap, tap, m)
                d_taps[block.row, block.strip, tap, m, block.channels] = total


def _ungate_kernel(
    hidden: Any,
    key: Any,
    both: Any,
    own_hidden: Any,
    own_key: Any,
    gain: Any,
    d_hidden: Any,
    d_key: Any,
    d_gain: Any,
    *,
    size: int,
    length: int,
    branches: int,
    distances: tuple[int, ...],
) -> None:
    """The gradients of hidden states and keys, from numbers a token and branch."""
    block = _Block(size, length)
    for m in range(branches):
        weights = block.load(gain, m)

        def visit(token: Any, total: Array, m: int = m, weights: Array = weights) -> Array:
            place = (block.row, token, m)
            h, k, together = block.load(hidden, *place), block.load(key, *place), both[place]
            d_h = together * weights * k - own_hidden[place] * h
            d_k = together * weights * h - own_key[place] * k
            d_hidden[(*place, block.channels)] = d_h.astype(d_hidden.dtype)
            d_key[(*place, block.channels)] = d_k.astype(d_key.dtype)
            return total + together * k * h

        total = jax.lax.fori_loop(block.first, block.last, visit, block.zeros())
        d_gain[block.row, block.strip, m, block.channels] = total


def _older(
    block: _Block, value: Any, scale: Any, token: Any, bits: Any, m: int, distances: tuple[int, ...]
) -> list[Float[Array, "channels"]]:
    """c·v as every tap reads it at one token and branch."""
    found = []
    for tap, distance in enumerate(distances):
        there = jnp.maximum(token - distance, 0)
        normed = scale[block.row, there, m] * block.load(value, block.row, there)
        # Zero where the tap reads nothing, even if another document has NaN.
        found.append(block.only_if((bits >> (1 + tap) & 1) != 0, normed))
    return found


def _convolve(block: _Block, taps: Any, older: list[Array], m: int) -> Float[Array, "channels"]:
    """The convolution of c·v at one token and branch."""
    mixed = block.zeros()
    for tap, normed in enumerate(older):
        mixed += block.load(taps, tap, m) * normed
    return mixed
