"""How a table is stored: one record a row.

A record holds everything about a row side by side: embedding, both moments, clock. A step then
reads and writes one stretch of memory a row instead of four, and nothing of the table's size is
ever copied. (With a clock column of its own, XLA copied that column at every step, since its new
values do not depend on what was read.) Records are 32-bit words, which gathers and scatters move
whatever they mean; two bfloat16 numbers share a word.

A record of more than 64 words fills whole lines of 128, the lanes of a TPU, so that XLA stores
tables row by row there as everywhere; for the paper's rows of 80 that is 256 words for 241, where
three arrays of rows of 80 would each be padded to 128, and with bfloat16 and one second moment a
row it is 128 for 82. In float32, rows of 42, 85, 127, 170, 213 and 255 fill their lines best. A
shorter record fills whole cache lines of 16 words, and is not for TPUs: XLA would store such a
table transposed and copy all of it at every step.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

CACHE_LINE, LANES = 16, 128  # 32-bit words

type Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class StorageConfig:
    """How rows and their state are stored; bfloat16 is rounded stochastically when written.

    Attributes:
        value: dtype of the embeddings.
        moments: dtype of the moments.
        second_moment: one for each "element", or one for the whole "row", of the mean square.
    """

    value: Precision = "float32"
    moments: Precision = "float32"
    second_moment: Literal["element", "row"] = "element"


class Rows(NamedTuple):
    """Rows with their state in Adam, unpacked.

    Attributes:
        value: the embeddings.
        mean: first moment of the gradient.
        square: second moment, of every element or of the row.
        clock: exact Adam: the step that last wrote the row; lazy Adam: its number of updates.
    """

    value: Float[Array, "n F"]
    mean: Float[Array, "n F"]
    square: Float[Array, "n #F"]
    clock: Int32[Array, "n"]


@dataclass(frozen=True)
class RecordLayout:
    """Where things lie in a record.

    Attributes:
        width: row width F.
        storage: what is stored of a row, in which precision.
    """

    width: int
    storage: StorageConfig = StorageConfig()

    @property
    def words(self) -> int:
        """Words of a record."""
        words = self._clock + 1
        line = LANES if words > LANES // 2 else CACHE_LINE
        return -(-words // line) * line

    @property
    def _parts(self) -> list[tuple[int, Precision]]:
        """Numbers and precision of value, mean and square."""
        storage, width = self.storage, self.width
        if storage.second_moment == "row":  # alone in its word
            return [(width, storage.value), (width, storage.moments), (1, "float32")]
        return [(width, storage.value), (width, storage.moments), (width, storage.moments)]

    @property
    def _clock(self) -> int:
        """Which word is the clock."""
        return sum(_words_of(count, kind) for count, kind in self._parts)

    def pack(self, rows: Rows, noise: UInt32[Array, "n"] | None = None) -> UInt32[Array, "n words"]:
        """Records of rows.

        Args:
            rows: the rows.
            noise: random bits of every row, for stochastic rounding; None rounds to the nearest.
        """
        words = []
        for index, (part, (_, kind)) in enumerate(zip(rows[:3], self._parts, strict=True)):
            if kind == "float32":
                words.append(jax.lax.bitcast_convert_type(part, jnp.uint32))
            else:
                words.append(_pack_halves(part, None if noise is None else mix(noise + index)))
        words.append(jax.lax.bitcast_convert_type(rows.clock[:, None], jnp.uint32))
        used = sum(part.shape[1] for part in words)
        padding = jnp.zeros((len(rows.clock), self.words - used), jnp.uint32)
        return jnp.concatenate([*words, padding], axis=1)

    def unpack(self, records: UInt32[Array, "n words"]) -> Rows:
        """Rows of records."""
        start, parts = 0, []
        for count, kind in self._parts:
            words = records[:, start : start + _words_of(count, kind)]
            start += words.shape[1]
            if kind == "float32":
                parts.append(jax.lax.bitcast_convert_type(words, jnp.float32))
            else:
                parts.append(_unpack_halves(words, count))
        value, mean, square = parts
        return Rows(value, mean, square, self.clocks(records))

    def clocks(self, records: UInt32[Array, "n words"]) -> Int32[Array, "n"]:
        """Clocks of records; nothing else of them is read."""
        return jax.lax.bitcast_convert_type(records[:, self._clock], jnp.int32)


@no_type_check  # at run time: as a pytree it also holds shapes and shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Table:
    """One layer's table.

    Attributes:
        records: one a row, in the order of `places.stored_places`.
        layout: what a record holds.
        layer: layer id; part of the seed of stochastic rounding.
    """

    records: UInt32[Array, "R words"]
    layout: RecordLayout = field(metadata={"static": True})
    layer: int = field(metadata={"static": True})

    def unpack(self) -> Rows:
        """All rows; on the device, a copy of the table."""
        return self.layout.unpack(self.records)

    def clocks(self) -> Int32[Array, "R"]:
        """The clock of every row: one word of each record, hence little beside the table."""
        return self.layout.clocks(self.records)


def init_table(key: Array, rows: int, layout: RecordLayout, layer: int, scale: float) -> Table:
    """A table of normally distributed rows with standard deviation `scale`; 0 starts at zero.

    Args:
        key: JAX random key.
        rows: padded number of rows R.
        layout: what a record holds.
        layer: layer id.
        scale: standard deviation of every element.
    """
    if not scale:
        return Table(jnp.zeros((rows, layout.words), jnp.uint32), layout, layer)
    value = scale * jax.random.normal(key, (rows, layout.width))
    nothing = jnp.zeros_like(value)
    square = nothing[:, :1] if layout.storage.second_moment == "row" else nothing
    records = layout.pack(Rows(value, nothing, square, jnp.zeros(rows, jnp.int32)))
    return Table(records, layout, layer)


def mix(bits: UInt32[Array, "*n"]) -> UInt32[Array, "*n"]:
    """Random bits from consecutive numbers: a bijection of 32 bits (C. Wellons's lowbias32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


def _words_of(count: int, kind: Precision) -> int:
    return count if kind == "float32" else -(-count // 2)


def _pack_halves(
    part: Float[Array, "n F"], noise: UInt32[Array, "n"] | None
) -> UInt32[Array, "n words"]:
    """Two bfloat16 numbers a word: the first half of the row low, the second half high."""
    count, width = part.shape
    nearest = jax.lax.bitcast_convert_type(part.astype(jnp.bfloat16), jnp.uint16)
    halves = nearest.astype(jnp.uint32)
    if noise is not None:
        element = jnp.arange(width, dtype=jnp.uint32)
        random = mix(noise[:, None] + element[None]) >> 16
        bits = jax.lax.bitcast_convert_type(part, jnp.uint32)
        halves = jnp.where(jnp.isfinite(part), (bits + random) >> 16, halves)
    halves = jnp.concatenate([halves, jnp.zeros((count, width % 2), jnp.uint32)], axis=1)
    low, high = jnp.split(halves, 2, axis=1)
    return low | high << 16


def _unpack_halves(words: UInt32[Array, "n words"], width: int) -> Float[Array, "n F"]:
    bits = jnp.concatenate([words << 16, words & jnp.uint32(0xFFFF0000)], axis=1)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)[:, :width]
