"""The format of the numbers of a row in 32-bit words, as tables store them and gathers decode them.

16-bit and 8-bit numbers are planar: a word has one number of each half (or quarter) of the row. So
decoding only shifts words, and does not move numbers between lanes.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num, UInt8, UInt32

type Precision = Literal["float32", "bfloat16", "float8", "uint32"]

SCALED = 32  # numbers of float8 that share a scale


@dataclass(frozen=True)
class RowFormat:
    """A row of F numbers in words.

    Attributes:
        width: numbers F.
        precision: "float32"; "bfloat16", two per word; "float8" (e4m3), four per word, followed by
            one power of two (e8m0: 2^(byte − 127)) per 32 numbers, as in DeepSeek-V4.1's release;
            or "uint32", words that are not decoded.
    """

    width: int
    precision: Precision = "float32"

    @property
    def words(self) -> int:
        """Words of a row."""
        if self.precision in ("float32", "uint32"):
            return self.width
        if self.precision == "bfloat16":
            return -(-self.width // 2)
        return self._plane + -(-self._scales // 4)

    @property
    def dtype(self) -> DTypeLike:
        """The dtype of a decoded row."""
        return jnp.uint32 if self.precision == "uint32" else jnp.float32

    @property
    def _plane(self) -> int:
        """Words of the numbers in float8, without scales."""
        return -(-self.width // 4)

    @property
    def _scales(self) -> int:
        return -(-self.width // SCALED)

    def encode(self, rows: Num[Array, "*n F"]) -> UInt32[Array, "*n words"]:
        """Encodes rows, rounding to nearest. A float8 scale is large enough to avoid overflow."""
        if self.precision == "uint32":
            return rows
        if self.precision == "float32":
            return jax.lax.bitcast_convert_type(rows.astype(jnp.float32), jnp.uint32)
        if self.precision == "bfloat16":
            halves = jax.lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16)
            return pack_planes(halves.astype(jnp.uint32), 2)
        rows = rows.astype(jnp.float32)
        blocks = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -self.width % SCALED)])
        blocks = blocks.reshape(*rows.shape[:-1], self._scales, SCALED)
        largest = jnp.max(jnp.abs(blocks), axis=-1)
        greatest = float(jnp.finfo(jnp.float8_e4m3fn).max)
        # frexp: largest / 448 = fraction · 2^exponent with a fraction in [½, 1).
        exponent = jnp.clip(jnp.frexp(largest / greatest)[1], -126, 127)
        fitted = jnp.ldexp(blocks, -exponent[..., None]).reshape(*rows.shape[:-1], -1)
        values = fitted[..., : self.width].astype(jnp.float8_e4m3fn)
        scales = (exponent + 127).astype(jnp.uint8)
        return self.from_bytes(jax.lax.bitcast_convert_type(values, jnp.uint8), scales)

    def from_bytes(
        self, values: UInt8[Array, "*n F"], scales: UInt8[Array, "*n scales"]
    ) -> UInt32[Array, "*n words"]:
        """Encodes rows of float8 from the bytes of a released checkpoint.

        Args:
            values: bytes of the numbers (e4m3).
            scales: bytes of their scales (e8m0), one per 32 numbers.
        """
        parts = [pack_planes(part.astype(jnp.uint32), 4) for part in (values, scales)]
        return jnp.concatenate(parts, axis=-1)

    def decode(self, words: UInt32[Array, "*n words"]) -> Num[Array, "*n F"]:
        """Decodes words to rows in float32 (or in uint32, unchanged)."""
        if self.precision == "uint32":
            return words
        if self.precision == "float32":
            return jax.lax.bitcast_convert_type(words, jnp.float32)
        if self.precision == "bfloat16":
            halves = [words << 16, words & jnp.uint32(0xFFFF0000)]
            both = jax.lax.bitcast_convert_type(jnp.concatenate(halves, axis=-1), jnp.float32)
            return both[..., : self.width]
        scales = words[..., self._plane :]
        planes = []
        for quarter in range(4):
            numbers = words[..., : self._plane] >> 8 * quarter & 0xFF
            planes.append(_scale(_decode_e4m3(numbers), self._exponents(quarter, scales)))
        return jnp.concatenate(planes, axis=-1)[..., : self.width]

    def _exponents(
        self, quarter: int, scales: UInt32[Array, "*n scales"]
    ) -> UInt32[Array, "*n plane"]:
        """The byte of the scale, for every number of a quarter of the row."""
        lane = jax.lax.broadcasted_iota(
            jnp.int32, (*scales.shape[:-1], self._plane), scales.ndim - 1
        )
        block = (lane + quarter * self._plane) // SCALED
        columns = scales.shape[-1]
        exponent = jnp.zeros(block.shape, jnp.uint32)
        first, last = quarter * self._plane // SCALED, ((quarter + 1) * self._plane - 1) // SCALED
        for index in range(first, min(last, self._scales - 1) + 1):
            word = scales[..., index % columns : index % columns + 1]
            byte = word >> 8 * (index // columns) & 0xFF
            exponent = jnp.where(block == index, byte, exponent)
        return exponent


def pack_planes(numbers: UInt32[Array, "*n F"], planes: int) -> UInt32[Array, "*n words"]:
    """Packs `planes` numbers into each word, one of each part of the row, the first part lowest."""
    missing = -numbers.shape[-1] % planes
    numbers = jnp.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, missing)])
    packed, *others = jnp.split(numbers, planes, axis=-1)
    for index, part in enumerate(others, 1):
        packed |= part << (32 // planes * index)
    return packed


def _decode_e4m3(byte: UInt32[Array, "*n"]) -> Float[Array, "*n"]:
    """float8 e4m3fn to float32, by integer arithmetic, because not every TPU can convert it."""
    size = byte & 0x7F
    subnormal = size.astype(jnp.int32).astype(jnp.float32) * 2.0**-9
    normal = jax.lax.bitcast_convert_type((size << 20) + jnp.uint32(120 << 23), jnp.float32)
    value = jnp.where(size < 8, subnormal, normal)
    value = jnp.where(size == 0x7F, jnp.nan, value)
    return jnp.where(byte >= 0x80, -value, value)


def _scale(value: Float[Array, "*n"], exponent: UInt32[Array, "*n"]) -> Float[Array, "*n"]:
    """value · 2^(exponent − 127); the exponent 255 gives NaN."""
    # Byte 0 means 2^−127, which is not a normal number of float32.
    power = jax.lax.bitcast_convert_type(jnp.where(exponent == 0, 1, exponent) << 23, jnp.float32)
    scaled = value * jnp.where(exponent == 255, jnp.nan, power)
    return jnp.where(exponent == 0, 0.5 * scaled, scaled)
