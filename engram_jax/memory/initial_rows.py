"""The initial rows of a table: a formula of seed, layer, place and element, not a random stream.

A row has the same initial value on every mesh, on the host (NumPy) and on the device (JAX), bit for
bit. So a table of any size exists without being written: a store outside the device
(`memory.store`) only keeps rows that a step has changed.

    h     = mix(mix(place ⊕ k) ⊕ K[element])                    k and K from (seed, layer)
    value = (sum of the four bytes of h − 510) · M · 2^−e       M an integer of at most 15 bits

The sum of four bytes is nearly normal: it is within 3.45 standard deviations, and its excess
kurtosis is −0.30. Its product with M has at most 24 bits, so it is exact, and the value does not
depend on how a compiler fuses the product with later sums.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32, UInt32

BYTE_VARIANCE = (256**2 - 1) / 12
FACTOR_BITS = 14
_ODD = 0x9E3779B9  # 2³² / golden ratio: distant arguments of `mix` for consecutive elements


def initial_values(
    places: Int32[Any, "n"], width: int, *, seed: UInt32[Any, ""] | int, layer: int, scale: float
) -> Float[Any, "n F"]:
    """Initial embeddings of rows, in float32; with NumPy for NumPy places, else with JAX.

    Args:
        places: places of the rows in the complete table (`places.stored_places`).
        width: row width F.
        seed: seed of the table, below 2³².
        layer: layer id.
        scale: standard deviation of every element, to 14 bits; 0: zeros.
    """
    xp: Any = np if isinstance(places, np.ndarray) else jnp
    if not scale:
        return xp.zeros((len(places), width), xp.float32)
    stream = mix(mix(xp.asarray(seed, xp.uint32).reshape(1)) + np.uint32(layer))
    keys = mix(stream + np.arange(width + 1, dtype=np.uint32) * np.uint32(_ODD))
    bits = mix(mix(places.astype(xp.uint32) ^ keys[0])[:, None] ^ keys[None, 1:])
    total = sum((bits >> shift) & np.uint32(255) for shift in (0, 8, 16, 24))
    return (total.astype(xp.int32) - 510).astype(xp.float32) * _factor(scale)


def _factor(scale: float) -> np.float32:
    """M · 2^−e: the scale in standard deviations of the sum of four bytes, with 14 bits."""
    mantissa, exponent = math.frexp(scale / math.sqrt(4 * BYTE_VARIANCE))
    return np.float32(math.ldexp(round(math.ldexp(mantissa, FACTOR_BITS)), exponent - FACTOR_BITS))


def mix[Bits: (np.ndarray, jax.Array)](bits: Bits) -> Bits:
    """Random bits from consecutive uint32: a bijection of 32 bits (C. Wellons's lowbias32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    return bits ^ (bits >> 16)
