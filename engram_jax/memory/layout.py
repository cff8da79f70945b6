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

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from pallas_kernels.hashed_gather import RowFormat
from pallas_kernels.hashed_gather.format import pack_planes

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


class RowState(NamedTuple):
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
    def value(self) -> RowFormat:
        """Of the embedding, which comes first."""
        return RowFormat(self.width, self.storage.value)

    @property
    def record(self) -> RowFormat:
        """Of all that a record holds, as words; what fills its lines is not among them."""
        return RowFormat(self._clock + 1, "uint32")

    @property
    def _parts(self) -> list[RowFormat]:
        """Value, mean and square."""
        moment = RowFormat(self.width, self.storage.moments)
        alone = RowFormat(1)  # in its word
        return [self.value, moment, alone if self.storage.second_moment == "row" else moment]

    @property
    def _clock(self) -> int:
        """Which word is the clock."""
        return sum(part.words for part in self._parts)

    @property
    def padding(self) -> float:
        """The share of a record's words that holds nothing."""
        return 1 - self.record.words / self.words

    def better_widths(self) -> tuple[int, int]:
        """The nearest narrower and wider row widths that fill their lines best."""

        def fills(width: int) -> bool:
            return replace(self, width=width + 1).words > replace(self, width=width).words

        narrower = next((width for width in range(self.width - 1, 0, -1) if fills(width)), 1)
        wider = next(width for width in range(self.width, self.width + LANES) if fills(width))
        return narrower, wider

    @property
    def columns(self) -> list[slice]:
        """The words of the parts of a record: value, mean, square and clock."""
        words = [*(part.words for part in self._parts), 1]
        return [slice(end - size, end) for size, end in zip(words, accumulate(words), strict=True)]

    def pack(
        self, rows: RowState, noise: UInt32[Array, "n"] | None = None
    ) -> UInt32[Array, "n words"]:
        """Records of rows; arguments as for `encode`."""
        return self.pad(self.encode(rows, noise))

    def encode(
        self, rows: RowState, noise: UInt32[Array, "n"] | None = None
    ) -> list[UInt32[Array, "n _"]]:
        """The parts of records of rows.

        Args:
            rows: the rows.
            noise: random bits of every row, for stochastic rounding; None rounds to the nearest.
        """
        parts = []
        for index, (part, form) in enumerate(zip(rows[:3], self._parts, strict=True)):
            if form.precision == "bfloat16" and noise is not None:
                parts.append(pack_planes(_round(part, mix(noise + index)), 2))
            else:
                parts.append(form.encode(part))
        parts.append(jax.lax.bitcast_convert_type(rows.clock[:, None], jnp.uint32))
        return parts

    def pad(self, parts: Sequence[UInt32[Array, "n _"]]) -> UInt32[Array, "n words"]:
        """Whole records of their parts; what fills their lines is zero."""
        padding = jnp.zeros((len(parts[0]), self.words - self.record.words), jnp.uint32)
        return jnp.concatenate([*parts, padding], axis=1)

    def unpack(self, records: UInt32[Array, "n words"]) -> RowState:
        """Rows of records, whole or without what fills their lines."""
        return self.decode([records[:, columns] for columns in self.columns])

    def decode(self, parts: Sequence[UInt32[Array, "n _"]]) -> RowState:
        """Rows of the parts of their records."""
        value, mean, square = (
            form.decode(part) for form, part in zip(self._parts, parts[:3], strict=True)
        )
        clock = jax.lax.bitcast_convert_type(parts[3][:, 0], jnp.int32)
        return RowState(value, mean, square, clock)

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

    def unpack(self) -> RowState:
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
    records = layout.pack(RowState(value, nothing, square, jnp.zeros(rows, jnp.int32)))
    return Table(records, layout, layer)


def mix(bits: UInt32[Array, "*n"]) -> UInt32[Array, "*n"]:
    """Random bits from consecutive numbers: a bijection of 32 bits (C. Wellons's lowbias32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


def _round(part: Float[Array, "n F"], noise: UInt32[Array, "n"]) -> UInt32[Array, "n F"]:
    """bfloat16 numbers, rounded stochastically: up as often as what is cut off is large."""
    element = jnp.arange(part.shape[1], dtype=jnp.uint32)
    random = mix(noise[:, None] + element[None]) >> 16
    bits = jax.lax.bitcast_convert_type(part, jnp.uint32)
    nearest = jax.lax.bitcast_convert_type(part.astype(jnp.bfloat16), jnp.uint16)
    return jnp.where(jnp.isfinite(part), (bits + random) >> 16, nearest.astype(jnp.uint32))
