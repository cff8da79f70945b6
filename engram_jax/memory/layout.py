"""The storage format of a table: one record per row.

A record has all data of a row: embedding, both moments, clock. So a step reads and writes one
contiguous part of memory per row instead of four (except on CPU: see `records`), and no array of
the table's size is copied. (When
clocks were a separate array, XLA copied that array at every step, because the new clocks do not
depend on the old ones.) Records consist of 32-bit words, which gathers and scatters move without
interpreting them. Two bfloat16 numbers share a word.

A record of more than 64 words is padded to lines of 128 words, the lanes of a TPU. Then XLA stores
tables row by row on all platforms. Examples: the paper's rows of 80 need 241 words, padded to 256
(three separate arrays of 80 would each be padded to 128); with bfloat16 and one second moment per
row they need 82 words, padded to 128. In float32, rows of 42, 85, 127, 170, 213 and 255 waste the
least space. Records of at most 64 words are padded to cache lines of 16 words. Do not use them on a
TPU: XLA would store such a table transposed there, and copy all of it at every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from engram_jax.memory.initial_rows import initial_values, mix
from engram_jax.sharding import TOKEN_AXES
from pallas_kernels.hashed_gather import RowFormat
from pallas_kernels.hashed_gather.format import pack_planes

CACHE_LINE, LANES = 16, 128  # 32-bit words

type Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class StorageConfig:
    """The storage of rows and their optimizer state. Writes to bfloat16 round stochastically.

    Attributes:
        value: dtype of the embeddings.
        moments: dtype of the moments.
        second_moment: one for every "element", or one for every "row" (of the mean square).
    """

    value: Precision = "float32"
    moments: Precision = "float32"
    second_moment: Literal["element", "row"] = "element"


class RowState(NamedTuple):
    """Rows with their Adam state, unpacked.

    Attributes:
        value: the embeddings.
        mean: first moment of the gradient.
        square: second moment, of every element or of the row.
        clock: with exact Adam, the step that last wrote the row; with lazy Adam, the number of its
            updates.
    """

    value: Float[Array, "n F"]
    mean: Float[Array, "n F"]
    square: Float[Array, "n #F"]
    clock: Int32[Array, "n"]


@dataclass(frozen=True)
class RecordLayout:
    """The layout of a record.

    Attributes:
        width: row width F.
        storage: precision of embeddings and moments.
    """

    width: int
    storage: StorageConfig = StorageConfig()

    @property
    def words(self) -> int:
        """Words of a record, with padding."""
        words = self._clock + 1
        line = LANES if words > LANES // 2 else CACHE_LINE
        return -(-words // line) * line

    @property
    def value(self) -> RowFormat:
        """Format of the embedding, which is the first part."""
        return RowFormat(self.width, self.storage.value)

    @property
    def record(self) -> RowFormat:
        """Format of the complete record as words, without padding."""
        return RowFormat(self._clock + 1, "uint32")

    @property
    def _parts(self) -> list[RowFormat]:
        """Formats of value, mean and square."""
        moment = RowFormat(self.width, self.storage.moments)
        single = RowFormat(1)
        return [self.value, moment, single if self.storage.second_moment == "row" else moment]

    @property
    def _clock(self) -> int:
        """Index of the clock's word."""
        return sum(part.words for part in self._parts)

    @property
    def padding(self) -> float:
        """The share of padding in a record."""
        return 1 - self.record.words / self.words

    def better_widths(self) -> tuple[int, int]:
        """The next smaller and larger row widths that waste the least space."""

        def fills(width: int) -> bool:
            return replace(self, width=width + 1).words > replace(self, width=width).words

        narrower = next((width for width in range(self.width - 1, 0, -1) if fills(width)), 1)
        wider = next(width for width in range(self.width, self.width + LANES) if fills(width))
        return narrower, wider

    @property
    def columns(self) -> list[slice]:
        """The word ranges of value, mean, square and clock in a record."""
        words = [*(part.words for part in self._parts), 1]
        return [slice(end - size, end) for size, end in zip(words, accumulate(words), strict=True)]

    def pack(
        self, rows: RowState, noise: UInt32[Array, "n"] | None = None
    ) -> UInt32[Array, "n words"]:
        """Encodes rows to records; arguments as for `encode`."""
        return self.pad(self.encode(rows, noise))

    def encode(
        self, rows: RowState, noise: UInt32[Array, "n"] | None = None
    ) -> list[UInt32[Array, "n _"]]:
        """Encodes rows to the parts of their records.

        Args:
            rows: the rows.
            noise: random bits of every row, for stochastic rounding; None: round to nearest.
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
        """Concatenates the parts of records, with zeros as padding."""
        padding = jnp.zeros((len(parts[0]), self.words - self.record.words), jnp.uint32)
        return jnp.concatenate([*parts, padding], axis=1)

    def unpack(self, records: UInt32[Array, "n words"]) -> RowState:
        """Decodes records, with or without padding, to rows."""
        return self.decode([records[:, columns] for columns in self.columns])

    def decode(self, parts: Sequence[UInt32[Array, "n _"]]) -> RowState:
        """Decodes the parts of records to rows."""
        value, mean, square = (
            form.decode(part) for form, part in zip(self._parts, parts[:3], strict=True)
        )
        clock = jax.lax.bitcast_convert_type(parts[3][:, 0], jnp.int32)
        return RowState(value, mean, square, clock)

    def clocks(self, records: UInt32[Array, "n words"]) -> Int32[Array, "n"]:
        """The clocks of records. Only these words are read."""
        return jax.lax.bitcast_convert_type(records[:, self._clock], jnp.int32)


@no_type_check  # no checks at run time: as a pytree it may also hold shapes or shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Table:
    """One layer's table; or a buffer with the rows of one step, if the table is not on the device.

    Attributes:
        records: one per row, in the order of `places.stored_places`.
        layout: layout of a record.
        layer: layer id; part of the seed of stochastic rounding.
        places: of a buffer, the places of its records in the complete table, by owner; None: record
            i of a table is that of place i.
        buffered_rows: of a buffer, the rows R of the complete table.
    """

    records: UInt32[Array, "R words"]
    layout: RecordLayout = field(metadata={"static": True})
    layer: int = field(metadata={"static": True})
    places: Int32[Array, "R"] | None = None
    buffered_rows: int | None = field(default=None, metadata={"static": True})

    @property
    def rows(self) -> int:
        """Rows R of the complete table. (Inside `shard_map`, use `owned_rows`.)"""
        return len(self.records) if self.buffered_rows is None else self.buffered_rows

    @property
    def owned_rows(self) -> int:
        """Rows that each device owns, R / S, inside `shard_map`."""
        if self.buffered_rows is None:
            return len(self.records)
        return self.buffered_rows // jax.lax.axis_size(TOKEN_AXES)

    def unpack(self) -> RowState:
        """Decodes all rows. On the device, this is a copy of the table."""
        return self.layout.unpack(self.records)

    def clocks(self) -> Int32[Array, "R"]:
        """The clock of every row: one word per record, which is small compared with the table."""
        return self.layout.clocks(self.records)


def init_table(
    seed: UInt32[Any, ""] | int, rows: int, layout: RecordLayout, layer: int, scale: float
) -> Table:
    """A table of initial rows (see `initial_rows`); moments and clocks are zero.

    Args:
        seed: seed of the table, below 2³².
        rows: padded number of rows R.
        layout: layout of a record.
        layer: layer id.
        scale: standard deviation of every element; 0: zeros.
    """
    if not scale:
        return Table(jnp.zeros((rows, layout.words), jnp.uint32), layout, layer)
    places = jnp.arange(rows, dtype=jnp.int32)
    return Table(initial_records(places, seed, layout, layer, scale), layout, layer)


def initial_records(
    places: Int32[Array, "n"],
    seed: UInt32[Any, ""] | int,
    layout: RecordLayout,
    layer: int,
    scale: float,
) -> UInt32[Array, "n words"]:
    """The records of rows that were never written; other arguments as for `init_table`."""
    value = initial_values(places, layout.width, seed=seed, layer=layer, scale=scale)
    zeros = jnp.zeros_like(value)
    square = zeros[:, :1] if layout.storage.second_moment == "row" else zeros
    return layout.pack(RowState(value, zeros, square, jnp.zeros(len(places), jnp.int32)))


def _round(part: Float[Array, "n F"], noise: UInt32[Array, "n"]) -> UInt32[Array, "n F"]:
    """Rounds to bfloat16 stochastically: up with a probability equal to the part cut off."""
    element = jnp.arange(part.shape[1], dtype=jnp.uint32)
    random = mix(noise[:, None] + element[None]) >> 16
    bits = jax.lax.bitcast_convert_type(part, jnp.uint32)
    nearest = jax.lax.bitcast_convert_type(part.astype(jnp.bfloat16), jnp.uint16)
    return jnp.where(jnp.isfinite(part), (bits + random) >> 16, nearest.astype(jnp.uint32))
