"""How a table is stored: one record a row.

A record holds everything about a row side by side: embedding, both moments, clock. A step then
reads and writes one stretch of memory a row instead of four, and nothing of the table's size is
ever copied. (With a clock column of its own, XLA copied that column at every step, since its new
values do not depend on what was read.) Records are 32-bit words, which gathers and scatters move
whatever they mean.

A record of more than 64 words fills whole lines of 128, the lanes of a TPU, so that XLA stores
tables row by row there as everywhere; for the paper's rows of 80 that is 256 words for 241, where
three arrays of rows of 80 would each be padded to 128. Rows of 42, 85, 127, 170, 213 and 255 fill
their lines best. A shorter record fills whole cache lines of 16 words, and is not for TPUs: XLA
would store such a table transposed and copy all of it at every step.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

CACHE_LINE, LANES = 16, 128  # 32-bit words


class Rows(NamedTuple):
    """Rows with their state in Adam, unpacked.

    Attributes:
        value: the embeddings.
        mean: first moment of the gradient.
        square: second moment.
        clock: exact Adam: the step that last wrote the row; lazy Adam: its number of updates.
    """

    value: Float[Array, "n F"]
    mean: Float[Array, "n F"]
    square: Float[Array, "n F"]
    clock: Int32[Array, "n"]


@no_type_check  # at run time: as a pytree it also holds shapes and shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Table:
    """One layer's table.

    Attributes:
        records: one a row, in the order of `places.stored_places`.
        width: row width F.
    """

    records: UInt32[Array, "R words"]
    width: int = field(metadata={"static": True})

    def unpack(self) -> Rows:
        """All rows; on the device, a copy of the table."""
        return unpack(self.records, self.width)


def record_words(width: int) -> int:
    """Words of a record of rows of F floats."""
    words = 3 * width + 1
    line = LANES if words > LANES // 2 else CACHE_LINE
    return -(-words // line) * line


def pack(rows: Rows) -> UInt32[Array, "n words"]:
    """Records of rows."""
    count, width = rows.value.shape
    parts = [rows.value, rows.mean, rows.square, rows.clock[:, None]]
    words = [jax.lax.bitcast_convert_type(part, jnp.uint32) for part in parts]
    padding = jnp.zeros((count, record_words(width) - 3 * width - 1), jnp.uint32)
    return jnp.concatenate([*words, padding], axis=1)


def unpack(records: UInt32[Array, "n words"], width: int) -> Rows:
    """Rows of records."""
    value, mean, square = (
        jax.lax.bitcast_convert_type(records[:, start : start + width], jnp.float32)
        for start in (0, width, 2 * width)
    )
    clock = jax.lax.bitcast_convert_type(records[:, 3 * width], jnp.int32)
    return Rows(value, mean, square, clock)


def init_table(key: Array, rows: int, width: int, scale: float) -> Table:
    """A table of normally distributed rows with standard deviation `scale`; 0 starts at zero.

    Args:
        key: JAX random key.
        rows: padded number of rows R.
        width: row width F.
        scale: standard deviation of every element.
    """
    if not scale:
        return Table(jnp.zeros((rows, record_words(width)), jnp.uint32), width)
    value = scale * jax.random.normal(key, (rows, width))
    nothing = jnp.zeros_like(value)
    return Table(pack(Rows(value, nothing, nothing, jnp.zeros(rows, jnp.int32))), width)
