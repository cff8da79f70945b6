"""The hash on the device, for decoding, where the next token is drawn: equal to `hashing.py`.

JAX has no 64-bit integers by default, so 64-bit products are pairs of 32-bit words. A remainder
takes two division steps of Möller and Granlund ("Improved division by invariant integers", IEEE
Transactions on Computers, 2011, algorithm 4). The hash's constants are arguments of the compiled
program, so hashes of equal shape share a program.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Shaped, UInt32

from engram_jax.hashing import DEAD, ROW_MULTIPLE, NgramHash

type Words = tuple[UInt32[Array, "..."], UInt32[Array, "..."]]  # upper and lower half of 64 bits


class HashConstants(NamedTuple):
    """The constants of an `NgramHash`; NumPy arrays, or JAX arrays on the devices.

    Attributes:
        lookup: projected id of every token id.
        pad: projected pad id.
        multipliers: upper and lower halves.
        shift: s, such that the divisor d = prime · 2ˢ has its highest bit set.
        divisor: d of every column.
        reciprocal: v = ⌊(2⁶⁴ − 1) / d⌋ − 2³².
        offset: first row of every column.
        blocks: padded rows of a layer's table / 4,096 (see `memory/places.py`).
        end_of_text: token id after which the look-back stops; −2: none.
    """

    lookup: Int32[Any, "V"]
    pad: Int32[Any, ""]
    multipliers: UInt32[Any, "2 L N"]
    shift: UInt32[Any, "L orders K"]
    divisor: UInt32[Any, "L orders K"]
    reciprocal: UInt32[Any, "L orders K"]
    offset: UInt32[Any, "L orders K"]
    blocks: UInt32[Any, "L"]
    end_of_text: Int32[Any, ""]

    @classmethod
    def of(cls, ngram_hash: NgramHash) -> "HashConstants":
        """The constants of a hash, as NumPy arrays."""
        shift = np.array(
            [32 - int(prime).bit_length() for prime in ngram_hash.primes.flat], np.uint64
        ).reshape(ngram_hash.primes.shape)
        divisor = ngram_hash.primes.astype(np.uint64) << shift
        multipliers = ngram_hash.multipliers.astype(np.uint64)
        return cls(
            lookup=ngram_hash.projection.lookup,
            pad=np.int32(ngram_hash.pad),
            multipliers=_low_word(np.stack([multipliers >> np.uint64(32), multipliers])),
            shift=_low_word(shift),
            divisor=_low_word(divisor),
            reciprocal=_low_word(np.uint64(2**64 - 1) // divisor),
            offset=_low_word(ngram_hash.offsets),
            blocks=_low_word(np.array(ngram_hash.padded_rows) // ROW_MULTIPLE),
            end_of_text=np.int32(-2 if ngram_hash.end_of_text is None else ngram_hash.end_of_text),
        )


def _low_word(numbers: np.ndarray) -> np.ndarray:
    return (numbers.astype(np.uint64) & np.uint64(2**32 - 1)).astype(np.uint32)


def hash_tokens(
    constants: HashConstants, tokens: Int32[Array, "B T"], segments: Int32[Array, "B T"]
) -> Int32[Array, "L B T H"]:
    """Table rows of every position, of all layers: bit-equal to `NgramHash.hash_tokens`.

    Args:
        constants: of the hash.
        tokens: token ids inside the vocabulary; `DEAD` (−1) marks image placeholders.
        segments: document number of every position, at least 0, different for all documents of
            a row.
    """
    before = ((0, 0), (constants.multipliers.shape[2] - 1, 0))
    return hash_after(
        constants, jnp.pad(tokens, before), jnp.pad(segments, before, constant_values=-1)
    )


def hash_after(
    constants: HashConstants,
    tokens: Int32[Array, "B n"],
    segments: Int32[Array, "B n"],
) -> Int32[Array, "L B T H"]:
    """`hash_tokens` of T positions, given the N − 1 positions before them.

    Args:
        constants: of the hash.
        tokens: token ids of all positions; any id where there is no token.
        segments: document numbers; −1 where there is no token.
    """
    mix = _mixes(constants.multipliers, _look_back(constants, tokens, segments))
    axes = (slice(None), None, None)  # B and T, after L
    shift, divisor, reciprocal, offset = (part[*axes] for part in constants[3:7])
    upper, lower = (word[..., None] for word in mix)
    # mix · 2ˢ in three words. A prime is from 1 (of a head of one row) to 2³⁰, so s is
    # from 2 to 31. A product is below 2⁶³.
    back = 32 - shift
    rest = _divide(upper >> back, upper << shift | lower >> back, divisor, reciprocal)
    rest = _divide(rest, lower << shift, divisor, reciprocal)
    rows = (rest >> shift) + offset
    return jax.lax.collapse(rows.astype(jnp.int32), 3)  # orders and heads


def stored_places(
    constants: HashConstants, rows: Int32[Array, "L B T H"]
) -> Int32[Array, "L B T H"]:
    """The places of rows in their layer's table: equal to `places.stored_places`."""
    blocks = constants.blocks.astype(jnp.int32)[:, None, None, None]
    return rows % ROW_MULTIPLE * blocks + rows // ROW_MULTIPLE


def _look_back(
    constants: HashConstants, tokens: Int32[Array, "B n"], segments: Int32[Array, "B n"]
) -> list[UInt32[Array, "B T"]]:
    """Projected ids x, x₋₁, … x₋₍ₙ₋₁₎ of the last T positions, as in `NgramHash.look_back`."""
    dead, ends = tokens == DEAD, tokens == constants.end_of_text
    ids = jnp.where(dead, constants.pad, constants.lookup[jnp.where(dead, 0, tokens)])
    orders = constants.multipliers.shape[2] - 1

    def older(x: Shaped[Array, "B n"], back: int) -> Shaped[Array, "B T"]:
        return x[:, orders - back : x.shape[1] - back]

    window, alive = [older(ids, 0)], ~older(dead, 0)
    for back in range(1, orders + 1):
        # A position sees an older one only if none after it, up to and including itself, is dead,
        # and no text ends between them.
        alive &= ~older(dead, back) & ~older(ends, back)
        visible = alive & (older(segments, back) == older(segments, 0))
        window.append(jnp.where(visible, older(ids, back), constants.pad))
    return [ids.astype(jnp.uint32) for ids in window]


def _mixes(multipliers: UInt32[Array, "2 L N"], window: Sequence[UInt32[Array, "B T"]]) -> Words:
    """mixₙ of equation 1 for n = 2…N, as [L, B, T, orders]: the upper and the lower words."""
    upper, lower = multipliers[:, :, None, None]
    mix, mixes = (jnp.uint32(0), jnp.uint32(0)), []
    for back, ids in enumerate(window):
        product = _multiply(ids[None], upper[..., back], lower[..., back])
        mix = mix[0] ^ product[0], mix[1] ^ product[1]
        mixes.append(mix)
    uppers, lowers = zip(*mixes[1:], strict=True)
    return jnp.stack(uppers, axis=-1), jnp.stack(lowers, axis=-1)


def _multiply(
    x: UInt32[Array, "..."], upper: UInt32[Array, "..."], lower: UInt32[Array, "..."]
) -> Words:
    """x · (upper · 2³² + lower), modulo 2⁶⁴."""
    return _upper_product(x, lower) + x * upper, x * lower


def _upper_product(x: UInt32[Array, "..."], y: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The upper word of x · y, from 16-bit halves. (`lax.mulhi` is slower on CPU.)"""
    x_high, x_low, y_high, y_low = x >> 16, x & 0xFFFF, y >> 16, y & 0xFFFF
    middle = x_high * y_low + (x_low * y_low >> 16)
    other = x_low * y_high + (middle & 0xFFFF)
    return x_high * y_high + (middle >> 16) + (other >> 16)


def _divide(
    upper: UInt32[Array, "..."],
    lower: UInt32[Array, "..."],
    divisor: UInt32[Array, "..."],
    reciprocal: UInt32[Array, "..."],
) -> UInt32[Array, "..."]:
    """The remainder of (upper · 2³² + lower) / divisor, for upper < divisor (algorithm 4)."""
    quotient_lower = reciprocal * upper + lower
    carry = (quotient_lower < lower).astype(jnp.uint32)
    quotient = _upper_product(reciprocal, upper) + upper + carry + 1
    rest = lower - quotient * divisor
    rest = jnp.where(rest > quotient_lower, rest + divisor, rest)
    return jnp.where(rest >= divisor, rest - divisor, rest)
