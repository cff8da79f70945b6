"""The fusion on TPU: one pass over tiles of tokens, with all intermediate values in VMEM.

A tile has t tokens of one row of the batch, with all branches. The convolution of RMSNorm(αv) = c·v
(see `xla`) also reads tokens of the tile before. So the last tokens of v and c stay in scratch
memory for the next tile, and every input is read once. The backward pass goes from the last tile to
the first. It keeps in scratch memory the gradients that a later tile's convolution has for earlier
tokens, and reads v and the gates of the few tokens before the tile a second time. The kernel writes
one gradient of the parameters per row of the batch; XLA sums them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.gated_fusion.form import FusionForm, no_gradients, token_flags

type Residuals = tuple[Any, ...]  # the arguments except the form, and the gates

VMEM = 32 * 2**20  # bytes that a kernel may use; v5e, v5p, v6e and v7x have 64 MiB or more
PACKED = 16  # tokens in a hardware tile of bfloat16
MOST_TOKENS = 512  # maximum tokens of a tile


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
        ValueError: the taps look so far back that no tile fits in VMEM.
    """
    tiles = _Tiles.of(hidden, taps, form, arrays=3)
    batch, length, branches, width = hidden.shape
    parameters = [gain] if taps is None else [gain, taps]
    extended = tiles.halo + tiles.size
    scratch = [
        pltpu.VMEM((extended, width), jnp.float32),
        pltpu.VMEM((extended, branches), jnp.float32),
    ]
    run = pl.pallas_call(
        partial(_forward_kernel, tiles=tiles, form=form),
        grid=(batch, tiles.count),
        in_specs=[
            tiles.spec(1),
            tiles.spec(branches, width),
            tiles.spec(branches, width),
            tiles.spec(width),
            *map(_whole, parameters),
        ],
        out_specs=[tiles.spec(branches, width), tiles.spec(branches)],
        out_shape=[
            jax.ShapeDtypeStruct(hidden.shape, hidden.dtype),
            jax.ShapeDtypeStruct((batch, length, branches), jnp.float32),
        ],
        scratch_shapes=[] if taps is None else scratch,
        compiler_params=_COMPILER_PARAMS,
        name="gated_fusion",
    )
    flags = token_flags(batch, tiles.length, segments, token_mask, tiles.distances)[..., None]
    return _one_by_one(run)(flags, hidden, key, value, *parameters)


def _forward(*arguments: Any) -> tuple[tuple[Array, Array], Residuals]:
    out, gate = fuse(*arguments)
    return (out, gate), (*arguments[:7], gate)


def _backward(
    form: FusionForm, residuals: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array | np.ndarray | None, ...]:
    hidden, key, value, gain, taps, segments, token_mask, gate = residuals
    d_out, d_gate = cotangents
    tiles = _Tiles.of(hidden, taps, form, arrays=5)
    batch, _, branches, width = hidden.shape
    parameters = [gain] if taps is None else [gain, taps]
    before, scratch = [], []
    if taps is not None:
        extended = tiles.halo + tiles.size
        scratch = [
            pltpu.VMEM((extended, 1), jnp.int32),
            pltpu.VMEM((extended, width), jnp.float32),
            pltpu.VMEM((extended, branches), jnp.float32),
            pltpu.VMEM((branches, extended, width), jnp.float32),
        ]
        if tiles.count > 1:
            before = [value, gate]
    by_row = [jax.ShapeDtypeStruct((batch, *x.shape), jnp.float32) for x in parameters]
    run = pl.pallas_call(
        partial(_backward_kernel, tiles=tiles, form=form),
        grid=(batch, tiles.count),
        in_specs=[
            tiles.spec(1, backward=True),
            *[tiles.spec(branches, width, backward=True)] * 3,
            tiles.spec(width, backward=True),
            *[tiles.spec(branches, backward=True)] * 2,
            *[tiles.halo_spec(x.shape[-1]) for x in before],
            *map(_whole, parameters),
        ],
        out_specs=[
            *[tiles.spec(branches, width, backward=True)] * 2,
            tiles.spec(width, backward=True),
            *[_row_of_batch(x) for x in by_row],
        ],
        out_shape=[
            *[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (hidden, key, value)],
            *by_row,
        ],
        scratch_shapes=scratch,
        compiler_params=_COMPILER_PARAMS,
        name="gated_fusion_backward",
    )
    d_hidden, d_key, d_value, *d_parameters = _one_by_one(run)(
        token_flags(batch, tiles.length, segments, token_mask, tiles.distances)[..., None],
        *(hidden, key, d_out, value, gate, d_gate),
        *before,
        *parameters,
    )
    summed = [
        jnp.sum(x, axis=0).astype(own.dtype)
        for x, own in zip(d_parameters, parameters, strict=True)
    ]
    return (
        *(d_hidden, d_key, d_value),
        *(summed if taps is not None else [*summed, None]),
        *no_gradients(segments, token_mask),
    )


fuse.defvjp(_forward, _backward)

# For vmap: the order of the grid's two axes matters, so vmap must not add an axis to the grid.
_one_by_one = jax.custom_batching.sequential_vmap
_COMPILER_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
)


@dataclass(frozen=True)
class _Tiles:
    """The split of T into tiles.

    Attributes:
        size: tokens t of a tile.
        length: tokens T of a row of the batch.
        distances: how many tokens back each tap reads; () without convolution.
        halo: tokens that a tile keeps of its neighbor; at least the largest distance.
    """

    size: int
    length: int
    distances: tuple[int, ...]
    halo: int

    @staticmethod
    def of(hidden: Array, taps: Array | None, form: FusionForm, arrays: int) -> "_Tiles":
        """The largest tiles with which `arrays` double-buffered arrays like `hidden` fit in VMEM.

        Raises:
            ValueError: not even the smallest tile fits.
        """
        _, length, branches, width = hidden.shape
        distances = form.distances(0 if taps is None else len(taps))
        halo = -(-max((1, *distances)) // PACKED) * PACKED
        lanes = -(-width // 128) * 128
        branch = -(-branches // 4) * 4 * lanes
        # Bytes per token: blocks in two buffers, and float32 values of one branch at a time. `kept`
        # is for the halo and the parameters.
        token = 2 * arrays * branch * hidden.dtype.itemsize + 4 * branch + 16 * 4 * lanes
        kept = halo * (4 * branch + 16 * lanes) + 16 * (1 + len(distances)) * branch
        fit = (VMEM * 2 // 3 - kept) // token // halo * halo
        if fit < min(halo, length):
            raise ValueError(
                f"Taps that look {max(distances)} tokens back, with {branches} branches of "
                f"{width} channels, do not fit in the VMEM of a TPU; use the implementation 'xla'."
            )
        size = min(fit, MOST_TOKENS // halo * halo or halo)
        return _Tiles(min(size, length), length, distances, halo)

    @property
    def count(self) -> int:
        """Number of tiles of a row."""
        return pl.cdiv(self.length, self.size)

    def place(self, step: Any, backward: bool) -> Any:
        """The tile of a step of the grid."""
        return self.count - 1 - step if backward else step

    def spec(self, *shape: int, backward: bool = False) -> pl.BlockSpec:
        """The block spec for tiles of an array [B, T, *shape]."""
        rest = (0,) * len(shape)
        return pl.BlockSpec(
            (1, self.size, *shape), lambda b, i: (b, self.place(i, backward), *rest)
        )

    def halo_spec(self, width: int) -> pl.BlockSpec:
        """The block spec for the tokens before the tile, of an array [B, T, width].

        Before the first tile, the block has values that must not be used.
        """
        ratio = self.size // self.halo

        def index(b: Any, i: Any) -> tuple[Any, Any, int]:
            return b, jnp.maximum(self.place(i, True) * ratio - 1, 0), 0

        return pl.BlockSpec((1, self.halo, width), index)


def _whole(x: Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda b, i: (0,) * x.ndim)


def _row_of_batch(x: jax.ShapeDtypeStruct) -> pl.BlockSpec:
    return pl.BlockSpec((1, *x.shape[1:]), lambda b, i: (b,) + (0,) * (x.ndim - 1))


def _forward_kernel(
    flags: Any,
    hidden: Any,
    key: Any,
    value: Any,
    gain: Any,
    *rest: Any,
    tiles: _Tiles,
    form: FusionForm,
) -> None:
    """Forward pass of one tile. Arguments are refs: inputs, outputs, scratch memory."""
    taps, out, gates, old_value, old_scale = rest if tiles.distances else (None, *rest, None, None)
    size, halo = tiles.size, tiles.halo
    v = value[0].astype(jnp.float32)
    if tiles.distances:
        _carry(old_value, to=0, start=size, halo=halo)
        _carry(old_scale, to=0, start=size, halo=halo)
        old_value[halo:, :] = v
        square = _mean_square(v)
    for m in range(hidden.shape[2]):
        score, _, _ = _score(_branch(hidden, m), _branch(key, m), gain[m : m + 1, :], form)
        gate = jax.nn.sigmoid(form.root(score))
        gate = jnp.where(_bit(flags[0], 0), gate, 0)
        gates[0, :, m : m + 1] = gate
        added = gate * v
        if tiles.distances:
            scale = gate * jax.lax.rsqrt(gate * gate * square + form.convolution_epsilon)
            old_scale[halo:, m : m + 1] = scale
            mixed = jnp.zeros_like(v)
            for tap, older in enumerate(_older(flags[0], old_value, old_scale, m, tiles)):
                mixed += taps[tap, m : m + 1, :] * older
            added += mixed * jax.nn.sigmoid(mixed)
        out[0, :, m, :] = added.astype(out.dtype)


def _backward_kernel(
    flags: Any,
    hidden: Any,
    key: Any,
    d_out: Any,
    value: Any,
    gates: Any,
    d_gates: Any,
    *rest: Any,
    tiles: _Tiles,
    form: FusionForm,
) -> None:
    """Backward pass of one tile. Arguments are refs: inputs, outputs, scratch memory."""
    size, halo, width = tiles.size, tiles.halo, value.shape[-1]
    halo_value: Any
    halo_gates: Any
    taps: Any
    convolve, before = bool(tiles.distances), tiles.distances and tiles.count > 1
    refs = list(rest)
    halo_value, halo_gates = (refs.pop(0), refs.pop(0)) if before else (None, None)
    gain, taps = refs.pop(0), refs.pop(0) if convolve else None
    d_hidden, d_key, d_value, d_gain, *refs = refs

    v = _valid(value[0].astype(jnp.float32), tiles)
    new_flags = _valid(flags[0], tiles)
    outputs = [d_gain]
    if convolve:
        d_taps, old_flags, old_value, old_scale, later = refs
        outputs.append(d_taps)
        _carry(old_flags, to=size, start=0, halo=halo)
        _carry(later, to=size, start=0, halo=halo)
        old_flags[:size, :] = new_flags
        old_value[halo:, :] = v
        square = _mean_square(v)
        if before:
            old_value[:halo, :] = halo_value[0].astype(jnp.float32)
            older_square = _mean_square(old_value[:halo, :])
        else:
            old_value[:halo, :] = jnp.zeros((halo, width), jnp.float32)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for output in outputs:
            output[...] = jnp.zeros_like(output)

    d_v = jnp.zeros_like(v)
    d_square = jnp.zeros((size, 1), jnp.float32)
    for m in range(hidden.shape[2]):
        one = slice(m, m + 1)
        gate = _valid(gates[0, :, one], tiles)
        d_added = _valid(_branch(d_out, m), tiles)
        d_gate = _valid(d_gates[0, :, one], tiles) + jnp.sum(d_added * v, axis=1, keepdims=True)
        d_v += gate * d_added
        if convolve:
            inverse = jax.lax.rsqrt(gate * gate * square + form.convolution_epsilon)
            scale = gate * inverse
            old_scale[halo:, one] = scale
            if before:
                g = halo_gates[0, :, one]
                old_scale[:halo, one] = g * jax.lax.rsqrt(
                    g * g * older_square + form.convolution_epsilon
                )
            else:
                old_scale[:halo, one] = jnp.zeros((halo, 1), jnp.float32)
            mixed = jnp.zeros_like(v)
            for tap, older in enumerate(_older(new_flags, old_value, old_scale, m, tiles)):
                mixed += taps[tap, one, :] * older
            slope = jax.nn.sigmoid(mixed)
            d_mixed = d_added * slope * (1 + mixed * (1 - slope))
            later[m, :size, :] = d_mixed
            d_normed = jnp.zeros_like(v)
            for tap, older in enumerate(_older(new_flags, old_value, old_scale, m, tiles)):
                d_taps[0, tap, one, :] += jnp.sum(d_mixed * older, axis=0, keepdims=True)
                ahead = pl.ds(tiles.distances[tap], size)
                sent = jnp.where(_bit(old_flags[ahead, :], 1 + tap), later[m, ahead, :], 0)
                d_normed += taps[tap, one, :] * sent
            d_v += scale * d_normed
            d_scale = jnp.sum(d_normed * v, axis=1, keepdims=True)
            d_gate += d_scale * form.convolution_epsilon * (inverse * inverse * inverse)
            d_square -= 0.5 * d_scale * (scale * scale * scale)

        h, k = _valid(_branch(hidden, m), tiles), _valid(_branch(key, m), tiles)
        weights = gain[one, :]
        score, hidden_size, key_size = _score(h, k, weights, form)
        d_score = d_gate * gate * (1 - gate) * form.root_slope(score)
        both = d_score * hidden_size * key_size * width**-0.5
        own = d_score * score / width
        d_h = both * weights * k - own * (hidden_size * hidden_size) * h
        d_k = both * weights * h - own * (key_size * key_size) * k
        d_hidden[0, :, m, :] = d_h.astype(d_hidden.dtype)
        d_key[0, :, m, :] = d_k.astype(d_key.dtype)
        d_gain[0, one, :] += jnp.sum(both * k * h, axis=0, keepdims=True)
    d_value[0] = (d_v + 2 / width * d_square * v).astype(d_value.dtype)


def _carry(ref: Any, to: int, start: int, halo: int) -> None:
    """Copies the halo of the previously visited tile from `start` to `to`; zeros for the first."""
    first = pl.program_id(1) == 0
    lead = (slice(None),) * (len(ref.shape) - 2)

    @pl.when(first)
    def _() -> None:
        ref[*lead, to : to + halo, :] = jnp.zeros((*ref.shape[:-2], halo, ref.shape[-1]), ref.dtype)

    @pl.when(~first)
    def _() -> None:
        ref[*lead, to : to + halo, :] = ref[*lead, start : start + halo, :]


def _branch(tile: Any, m: int) -> Float[Array, "t D"]:
    """One branch of a tile."""
    return tile[0, :, m, :].astype(jnp.float32)


def _score(
    h: Float[Array, "t D"], k: Float[Array, "t D"], gain: Float[Array, "1 D"], form: FusionForm
) -> tuple[Float[Array, "t 1"], Float[Array, "t 1"], Float[Array, "t 1"]]:
    """The score, and the factors that normalize queries and keys."""
    hidden_size = jax.lax.rsqrt(_mean_square(h) + form.epsilon)
    key_size = jax.lax.rsqrt(_mean_square(k) + form.epsilon)
    product = jnp.sum(gain * k * h, axis=1, keepdims=True)
    return product * hidden_size * key_size * h.shape[1] ** -0.5, hidden_size, key_size


def _older(
    flags: Int32[Array, "t 1"], old_value: Any, old_scale: Any, m: int, tiles: _Tiles
) -> list[Float[Array, "t D"]]:
    """c·v of the tokens that every tap reads."""
    found = []
    for tap, distance in enumerate(tiles.distances):
        there = pl.ds(tiles.halo - distance, tiles.size)
        normed = old_scale[there, m : m + 1] * old_value[there, :]
        # Zero if the tap reads no token, even if other documents have NaN.
        found.append(jnp.where(_bit(flags, 1 + tap), normed, 0))
    return found


def _bit(flags: Int32[Array, "t 1"], bit: int) -> Bool[Array, "t 1"]:
    return (flags >> bit & 1) != 0


def _mean_square(x: Float[Array, "t D"]) -> Float[Array, "t 1"]:
    return jnp.mean(x * x, axis=1, keepdims=True)


def _valid(x: Array, tiles: _Tiles) -> Array:
    """x with zeros at the tokens of the last tile that are outside T."""
    if not tiles.length % tiles.size:
        return x
    token = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    token += tiles.place(pl.program_id(1), True) * tiles.size
    return jnp.where(token < tiles.length, x, jnp.zeros_like(x))
