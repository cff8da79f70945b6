"""The fusion on GPU, with Mosaic GPU: two kernels in each pass.

Hidden states and keys affect the result only through the gate, one number per token and branch. So
one kernel reads them and computes sums over channels (`_sums_kernel`), and another reads the value
and computes the output (`_mix_kernel`). The backward pass has a counterpart of each
(`_unmix_kernel`, `_ungate_kernel`) and reuses the sums. Thus each pass reads arrays with branches
and channels once. XLA reads the value, which has no branches, once more for its mean square.

A block keeps all of its data in registers, so that its warps need no synchronization. A part of the
channels has shape [4, W] over the four warps of a block. A sum over channels gives four numbers,
which XLA adds. The convolution reads every `dilation`-th token, so a block processes only such
tokens, in order, and carries a window of them in registers: in the forward pass the values that
later tokens read, in the backward pass gradients of earlier tokens.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.gated_fusion.form import FusionForm, no_gradients, token_flags

type Residuals = tuple[Any, ...]  # the arguments except the form, gates, scores and their factors
type Place = dict[str, Any]  # coordinates of a block in its grid, by axis name
type Channels = Float[Array, "warps channels"]

WARPS, LANES = 4, 32
THREADS = WARPS * LANES  # threads of a block, each with up to four channels of a part
SUMMED = 8  # tokens of a block of `_sums_kernel`
STRIP = 32  # tokens of a block of `_ungate_kernel`
WALK = 32  # tokens of a block of `_mix_kernel` and `_unmix_kernel`, without those only read by taps


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
    """Returns what to add to the residual branches, and the gates.

    Raises:
        ValueError: D is not a multiple of 128.
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
    batch, length, branches, width = hidden.shape
    if width % THREADS:
        raise ValueError(
            f"The GPU kernel needs a width that {THREADS} divides, not {width}; use the "
            "implementation 'xla'."
        )
    flags = _flags(hidden, taps, segments, token_mask, form)
    scores = _score(hidden, key, gain, form)
    gate = jnp.where((flags & 1)[..., None] != 0, jax.nn.sigmoid(form.root(scores[0])), 0)
    scale, _ = _scale(gate, value, form)
    part, walk = _part(width, 512), _Walk(length, taps, form)
    out = _launch(
        partial(_mix_kernel, walk=walk, branches=branches),
        [_in_parts(value, part), gate, scale, flags, *_in_parts_if(taps, part)],
        [_in_parts(_like(hidden), part)],
        {"row": batch, "walk": walk.blocks, "part": width // part},
    )[0]
    arguments = hidden, key, value, gain, taps, segments, token_mask
    return (out.reshape(hidden.shape), gate), (*arguments, gate, *scores)


def _backward(
    form: FusionForm, residuals: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array | np.ndarray | None, ...]:
    hidden, key, value, gain, taps, segments, token_mask, gate, *scores = residuals
    score, hidden_size, key_size = scores
    d_out, d_gate = cotangents
    batch, length, branches, width = hidden.shape
    flags = _flags(hidden, taps, segments, token_mask, form)
    scale, size = _scale(gate, value, form)
    # Half as many channels as in `_mix_kernel`, because a block carries gradients of all branches
    # and taps in registers.
    part, walk = _part(width, 256), _Walk(length, taps, form)
    parts = width // part
    by_part = _floats(batch, length, branches, parts, WARPS)
    by_walk = _floats(batch, walk.blocks, walk.kernel, branches, width)
    d_value, direct, *convolved = _launch(
        partial(_unmix_kernel, walk=walk, branches=branches),
        [
            *(_in_parts(d_out, part), _in_parts(value, part), gate, scale, flags),
            *_in_parts_if(taps, part),
        ],
        [
            *(_in_parts(_floats(*value.shape), part), by_part),
            *([] if taps is None else [by_part, _in_parts(by_walk, part)]),
        ],
        {"row": batch, "walk": walk.blocks, "part": parts},
    )
    d_value, d_taps = d_value.reshape(value.shape), None
    d_gate += jnp.sum(direct, axis=(-2, -1))
    if taps is not None:
        d_scale = jnp.sum(convolved[0], axis=(-2, -1))
        d_gate += d_scale * form.convolution_epsilon * size**3
        d_square = -0.5 * jnp.sum(d_scale * scale**3, axis=-1, keepdims=True)
        d_value += 2 / width * d_square * value.astype(jnp.float32)
        d_taps = jnp.sum(convolved[1].reshape(by_walk.shape), axis=(0, 1)).astype(taps.dtype)

    d_score = d_gate * gate * (1 - gate) * form.root_slope(score)
    both = d_score * hidden_size * key_size * width**-0.5
    own = d_score * score / width
    part = _part(width, 512)
    strips = pl.cdiv(length, STRIP)
    by_strip = _floats(batch, strips, branches, width)
    owned = [own * hidden_size**2, own * key_size**2]
    d_hidden, d_key, d_gain = _launch(
        partial(_ungate_kernel, length=length),
        [_in_parts(hidden, part), _in_parts(key, part), both, *owned, _in_parts(gain, part)],
        [_in_parts(_like(x), part) for x in (hidden, key, by_strip)],
        {"row": batch, "strip": strips, "part": width // part, "branch": branches},
    )
    return (
        *(d_hidden.reshape(hidden.shape), d_key.reshape(key.shape), d_value.astype(value.dtype)),
        jnp.sum(d_gain.reshape(by_strip.shape), axis=(0, 1)).astype(gain.dtype),
        d_taps,
        *no_gradients(segments, token_mask),
    )


fuse.defvjp(_forward, _backward)


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
    """c such that RMSNorm(αv) = c·v (see `xla`), and c / α."""
    mean_square = jnp.mean(value.astype(jnp.float32) ** 2, axis=-1)[..., None]
    size = jax.lax.rsqrt(gate**2 * mean_square + form.convolution_epsilon)
    return gate * size, size


def _score(
    hidden: Float[Array, "B T M D"],
    key: Float[Array, "B T M D"],
    gain: Float[Array, "M D"],
    form: FusionForm,
) -> tuple[Float[Array, "B T M"], Float[Array, "B T M"], Float[Array, "B T M"]]:
    """The score, and the factors that normalize queries and keys."""
    batch, length, branches, width = hidden.shape
    part = _part(width, 512)
    (sums,) = _launch(
        partial(_sums_kernel, length=length, parts=width // part),
        [_in_parts(x, part) for x in (hidden, key, gain)],
        [_floats(batch, length, branches, 3, WARPS)],
        {"row": batch, "strip": pl.cdiv(length, SUMMED), "branch": branches},
    )
    product, h_square, k_square = jnp.moveaxis(jnp.sum(sums, axis=-1), -1, 0)
    hidden_size = jax.lax.rsqrt(h_square / width + form.epsilon)
    key_size = jax.lax.rsqrt(k_square / width + form.epsilon)
    return product * hidden_size * key_size * width**-0.5, hidden_size, key_size


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _like(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _part(width: int, most: int) -> int:
    """Channels of a block: one, two or four per thread."""
    return next(THREADS * n for n in (4, 2, 1) if THREADS * n <= most and not width % (THREADS * n))


def _in_parts(x: Any, part: int) -> Any:
    """An array (or its shape) with the channels split into parts, and each part over the warps."""
    shape = (*x.shape[:-1], x.shape[-1] // part, WARPS, part // WARPS)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, x.dtype)
    return x.reshape(shape)


def _in_parts_if(x: Array | None, part: int) -> list[Array]:
    return [] if x is None else [_in_parts(x, part)]


def _launch(
    kernel: Any, inputs: list[Array], outputs: list[Any], grid: dict[str, int]
) -> list[Array]:
    """Runs a kernel on a grid of blocks. The kernel gets its block's coordinates by axis name.

    The CUDA grid has only one axis, because CUDA limits the other axes to 65,535 blocks. (Its name
    is unusual, because a mesh axis of the same name would hide it.)
    """

    def run(*refs: Any) -> None:
        block, at = jax.lax.axis_index("block of the fusion"), {}
        for name, size in reversed(grid.items()):
            at[name] = jax.lax.rem(block, jnp.int32(size))
            block = jax.lax.div(block, jnp.int32(size))
        kernel(at, *refs)

    return plgpu.kernel(
        run,
        out_type=outputs,
        grid=(math.prod(grid.values()),),
        grid_names=("block of the fusion",),
        # Barriers are only needed for memory that a block both reads and writes. There is none.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True),
    )(*inputs)


def _load(ref: Any, *index: Any) -> Channels:
    """Loads a part of the channels, in the stored dtype."""
    vector = ref.shape[-1] // LANES
    layout = plgpu.Layout.TILED(
        Tiling(((WARPS, LANES * vector), (vector,))),
        warp_dims=(-3,),
        lane_dims=(-2,),
        vector_dim=-1,
    )
    return plgpu.load(ref.at[index], layout=layout, optimized=False)


def _load_float(ref: Any, *index: Any) -> Channels:
    """Loads a part of the channels as float32."""
    return _load(ref, *index).astype(jnp.float32)


def _store(ref: Any, x: Array, *index: Any) -> None:
    """Stores channels, or one sum per warp."""
    if hasattr(plgpu, "store"):  # from JAX 0.12 on
        plgpu.store(ref.at[index], x, optimized=False)
    else:
        ref[index] = x


def _sums_kernel(
    at: Place, hidden: Any, key: Any, gain: Any, sums: Any, *, length: int, parts: int
) -> None:
    """⟨gain·k, h⟩, ⟨h, h⟩ and ⟨k, k⟩ over each warp's channels."""
    row, strip, branch = at["row"], at["strip"], at["branch"]
    weights = [_load_float(gain, branch, part) for part in range(parts)]

    def visit(token: Any, _: None) -> None:
        place = (row, token, branch)
        h = [_load(hidden, *place, part) for part in range(parts)]
        k = [_load(key, *place, part) for part in range(parts)]
        terms = []
        for part, weight in enumerate(weights):
            own_h, own_k = h[part].astype(jnp.float32), k[part].astype(jnp.float32)
            terms.append((weight * own_k * own_h, own_h * own_h, own_k * own_k))
        for kind, (first, *others) in enumerate(zip(*terms, strict=True)):
            _store(sums, jnp.sum(sum(others, first), axis=1), *place, kind)

    jax.lax.fori_loop(strip * SUMMED, jnp.minimum((strip + 1) * SUMMED, length), visit, None)


class _Walk:
    """The order in which blocks process tokens.

    The convolution connects only tokens whose distance is a multiple of `dilation`. Such tokens
    form a class, and a block processes consecutive tokens of one class.

    Args:
        length: tokens T.
        taps: taps of the convolution; None: no convolution.
        form: the constants.
    """

    def __init__(self, length: int, taps: Array | None, form: FusionForm) -> None:
        self.length = length
        self.kernel = 0 if taps is None else len(taps)
        self.stride = form.dilation if self.kernel else 1
        self.blocks = self.stride * pl.cdiv(pl.cdiv(length, self.stride), WALK)

    def own(self, block: Any) -> tuple[Any, Any, Any, Any]:
        """A block's class and range: the first token of the class; begin and end of the range, as
        indices within the class; the number of tokens of the class.
        """
        stride = jnp.int32(self.stride)
        first = jax.lax.rem(block, stride)
        count = jax.lax.div(self.length - first + stride - 1, stride)
        begin = jax.lax.div(block, stride) * WALK
        return first, begin, jnp.clip(count, begin, begin + WALK), count

    def token(self, first: Any, index: Any) -> Any:
        """The token at an index of a class, clipped to valid tokens."""
        return jnp.clip(first + index * self.stride, 0, self.length - 1)


class _Read(NamedTuple):
    """The convolution's input at a token.

    Attributes:
        value: v.
        scales: c of every branch.
    """

    value: Channels
    scales: list[Any]


def _read(value: Any, scale: Any, row: Any, token: Any, part: Any) -> _Read:
    scales = [scale[row, token, m] for m in range(scale.shape[2])]
    return _Read(_load(value, row, token, part), scales)


def _mix_kernel(
    at: Place,
    value: Any,
    gate: Any,
    scale: Any,
    flags: Any,
    *rest: Any,
    walk: _Walk,
    branches: int,
) -> None:
    """Computes αv + SiLU(Conv(cv)), from the first token to the last."""
    taps, out = rest if walk.kernel else (None, *rest)
    row, part = at["row"], at["part"]
    first, begin, end, _ = walk.own(at["walk"])
    weights = _weights(taps, walk, branches, part)

    def read_gates(index: Any) -> tuple[list[Any], Any]:
        token = walk.token(first, index)
        return [gate[row, token, m] for m in range(branches)], flags[row, token]

    def visit(index: Any, carry: tuple) -> tuple:
        window, (gates, bits) = carry
        # Loads for the next step come before the stores of this one: the compiler does not move a
        # load before a store.
        ahead = _read(value, scale, row, walk.token(first, index + 1), part), read_gates(index + 1)
        v, older, added = window[-1].value.astype(jnp.float32), _older(window, bits, walk), []
        for m in range(branches):
            added.append(gates[m] * v)
            if walk.kernel:
                mixed = _convolve(weights[m], older, m)
                added[m] += mixed * jax.nn.sigmoid(mixed)
        token = walk.token(first, index)
        for m, x in enumerate(added):
            _store(out, x.astype(out.dtype), row, token, m, part)
        return [*window[1:], ahead[0]], ahead[1]

    window = [
        _read(value, scale, row, walk.token(first, begin - back), part)
        for back in reversed(range(max(walk.kernel, 1)))
    ]
    jax.lax.fori_loop(begin, end, visit, (window, read_gates(begin)))


def _unmix_kernel(
    at: Place,
    d_out: Any,
    value: Any,
    gate: Any,
    scale: Any,
    flags: Any,
    *rest: Any,
    walk: _Walk,
    branches: int,
) -> None:
    """The backward pass of `_mix_kernel`, from the last token to the first.

    Each token has gradients for the tokens that its taps read. `pending[m][d]` is their sum so far,
    for branch m and the token d steps before the current one. The loop starts after the block's own
    tokens, at the last token that reads one of them.
    """
    taps, (d_value, direct, *convolved) = (rest[0], rest[1:]) if walk.kernel else (None, rest)
    row, part = at["row"], at["part"]
    first, begin, end, count = walk.own(at["walk"])
    weights, kernel = _weights(taps, walk, branches, part), max(walk.kernel, 1)
    nothing = jnp.zeros_like(_load_float(value, 0, 0, part))

    def read_back(index: Any) -> tuple[list[Channels], list[Any], Any]:
        token, all_branches = walk.token(first, index), range(branches)
        d_added = [_load(d_out, row, token, m, part) for m in all_branches]
        return d_added, [gate[row, token, m] for m in all_branches], flags[row, token]

    def visit(own: bool, last: Any, step: Any, carry: tuple) -> tuple:
        (window, (d_added, gates, bits)), pending, by_tap = carry
        index = last - step
        # Loads before stores, as in `_mix_kernel`.
        oldest = _read(value, scale, row, walk.token(first, index - kernel), part)
        ahead = [oldest, *window[:-1]], read_back(index - 1)
        v, older = window[-1].value.astype(jnp.float32), _older(window, bits, walk)
        d_v, sums, pending_next, by_tap_next = nothing, [], [], []
        for m in range(branches):
            d = d_added[m].astype(jnp.float32)
            d_v += gates[m] * d
            sums.append([jnp.sum(d * v, axis=1)] if own else [])
            if not walk.kernel:
                continue
            mixed = _convolve(weights[m], older, m)
            slope = jax.nn.sigmoid(mixed)
            d_mixed = d * slope * (1 + mixed * (1 - slope))
            sent = [
                _only_if(_reads(bits, tap), weight * d_mixed)
                for tap, weight in enumerate(weights[m])
            ][::-1]
            d_normed, *others = [a + b for a, b in zip(sent, [*pending[m], nothing], strict=True)]
            pending_next.append(others)
            if own:
                d_v += window[-1].scales[m] * d_normed
                sums[m].append(jnp.sum(d_normed * v, axis=1))
                by_tap_next.append(
                    [
                        total + d_mixed * scales[m] * older_v
                        for total, (older_v, scales) in zip(by_tap[m], older, strict=True)
                    ]
                )
        if own:
            token = walk.token(first, index)
            _store(d_value, d_v, row, token, part)
            for m, own_sums in enumerate(sums):
                for ref, x in zip((direct, *convolved[:1]), own_sums, strict=True):
                    _store(ref, x, row, token, m, part)
        return ahead, pending_next, by_tap_next if own else by_tap

    def enter(last: Any) -> tuple:
        window = [
            _read(value, scale, row, walk.token(first, last - back), part)
            for back in reversed(range(kernel))
        ]
        return window, read_back(last)

    convolving = range(branches if walk.kernel else 0)
    pending = [[nothing] * (kernel - 1) for _ in convolving]
    by_tap = [[nothing] * kernel for _ in convolving]
    beyond = jnp.minimum(end + kernel - 1, count)
    carry = enter(beyond - 1), pending, by_tap
    carry = jax.lax.fori_loop(0, beyond - end, partial(visit, False, beyond - 1), carry)
    *_, by_tap = jax.lax.fori_loop(0, end - begin, partial(visit, True, end - 1), carry)
    for m, totals in enumerate(by_tap):
        for tap, total in enumerate(totals):
            _store(convolved[1], total, row, at["walk"], tap, m, part)


def _ungate_kernel(
    at: Place,
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
    length: int,
) -> None:
    """The gradients of hidden states and keys, from numbers per token and branch."""
    row, strip, part, branch = at["row"], at["strip"], at["part"], at["branch"]
    weight = _load_float(gain, branch, part)

    def visit(token: Any, total: Channels) -> Channels:
        place = (row, token, branch)
        h, k = _load_float(hidden, *place, part), _load_float(key, *place, part)
        together = both[place]
        d_h = together * weight * k - own_hidden[place] * h
        d_k = together * weight * h - own_key[place] * k
        _store(d_hidden, d_h.astype(d_hidden.dtype), *place, part)
        _store(d_key, d_k.astype(d_key.dtype), *place, part)
        return total + together * k * h

    last = jnp.minimum((strip + 1) * STRIP, length)
    total = jax.lax.fori_loop(strip * STRIP, last, visit, jnp.zeros_like(weight))
    _store(d_gain, total, row, strip, branch, part)


def _weights(taps: Any, walk: _Walk, branches: int, part: Any) -> list[list[Channels]]:
    """The taps of every branch."""
    kernel, loaded = range(walk.kernel), partial(_load_float, taps)
    return [[loaded(tap, m, part) for tap in kernel] for m in range(branches)]


def _reads(bits: Any, tap: int) -> Any:
    """Whether a token's tap reads a token."""
    return (bits >> (1 + tap) & 1) != 0


def _only_if(there: Bool[Array, ""], x: Channels) -> Channels:
    """x if `there`, otherwise zeros."""
    return jnp.where(jnp.broadcast_to(there, x.shape), x, jnp.zeros_like(x))


def _older(window: list[_Read], bits: Any, walk: _Walk) -> list[_Read]:
    """The inputs that every tap reads, in float32. If it reads none: zero, even if v is NaN."""
    found = []
    for tap, (v, scales) in enumerate(window[: walk.kernel]):
        there = _reads(bits, tap)
        own = [jnp.where(there, scale, 0.0) for scale in scales]
        found.append(_Read(_only_if(there, v.astype(jnp.float32)), own))
    return found


def _convolve(weights: list[Channels], older: list[_Read], m: int) -> Channels:
    """The convolution of c·v at one token and branch."""
    terms = [
        read.scales[m] * read.value * weight for read, weight in zip(older, weights, strict=True)
    ]
    return sum(terms[1:], terms[0])
