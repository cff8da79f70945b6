"""The gather on GPU, by Mosaic GPU: whole lines of 128 words, by all threads of a block together.

XLA decodes the lines, and cuts and pads what fills no line, as in `pallas_tpu`. The backward pass
gives every distinct row to one block, which adds up its gradients in the given order: no atomics,
hence the same sum at every run.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Int32, UInt32

from pallas_kernels.hashed_gather.format import RowFormat
from pallas_kernels.hashed_gather.xla import no_gradient

LANES = 128  # words of a line, one a thread
BLOCK, IN_FLIGHT = 64, 16  # rows of a block; rows it reads before it writes the first


def read(
    table: UInt32[Array, "R words"], numbers: Int32[Array, "n H"], form: RowFormat
) -> Float[Array, "n E"]:
    """Copies lines, then decodes them.

    Raises:
        ValueError: the table's rows are no whole lines.
    """
    if table.shape[1] % LANES:
        raise ValueError(
            f"Rows of {table.shape[1]} words are not read by this kernel: pad them to whole lines "
            f"of {LANES}, or take the implementation 'xla'."
        )
    words = _copy_lines(table, numbers.reshape(-1), -(-form.words // LANES) * LANES)
    rows = form.decode(words[:, : form.words]).reshape(*numbers.shape, -1)
    inside = (numbers >= 0) & (numbers < len(table))
    return jnp.where(inside[..., None], rows, 0).reshape(len(numbers), -1)


@jax.custom_vjp
def expand(
    values: Float[Array, "U F"], slots: Int[Array, "n H"], order: Int[Array, "m"]
) -> Float[Array, "n E"]:
    """values[slots]; `order` sorts the slots stably and serves the backward pass."""
    del order
    width = values.shape[1]
    lines = _pad_lanes(values.astype(jnp.float32))
    rows = _copy_lines(lines, slots.reshape(-1), lines.shape[1])
    return rows[:, :width].reshape(len(slots), -1).astype(values.dtype)


def _forward(
    values: Float[Array, "U F"], slots: Int[Array, "n H"], order: Int[Array, "m"]
) -> tuple[Array, tuple[int, Array, Array]]:
    return expand(values, slots, order), (len(values), slots, order)


def _backward(
    residuals: tuple[int, Array, Array], cotangent: Float[Array, "n E"]
) -> tuple[Array, np.ndarray, np.ndarray]:
    rows, slots, order = residuals
    by_slot = cotangent.reshape(slots.size, -1).astype(jnp.float32)
    width, ascending = by_slot.shape[1], slots.reshape(-1)[order]
    starts = jnp.searchsorted(ascending, jnp.arange(rows + 1, dtype=ascending.dtype))
    lines = _pad_lanes(by_slot)
    sums = plgpu.kernel(
        partial(_sum_kernel, rows=rows),
        out_type=jax.ShapeDtypeStruct((rows, lines.shape[1]), jnp.float32),
        grid=(lines.shape[1] // LANES, pl.cdiv(rows, BLOCK)),
        grid_names=("line", "block"),
    )(lines, order.astype(jnp.int32), starts.astype(jnp.int32))
    return sums[:, :width].astype(cotangent.dtype), no_gradient(slots), no_gradient(order)


expand.defvjp(_forward, _backward)


def _pad_lanes(x: Float[Array, "n F"]) -> Float[Array, "n words"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)))


def _copy_lines(table: Array, numbers: Int[Array, "n"], words: int) -> Array:
    """The first `words` words of rows; numbers outside the table give some row."""
    there = jnp.clip(numbers, 0, len(table) - 1).astype(jnp.int32)
    return plgpu.kernel(
        partial(_copy_kernel, count=len(numbers)),
        out_type=jax.ShapeDtypeStruct((len(numbers), words), table.dtype),
        grid=(words // LANES, pl.cdiv(len(numbers), BLOCK)),
        grid_names=("line", "block"),
    )(table, there)


def _line() -> tuple[Any, Any]:
    """This block's words of a row, and their layout over its threads."""
    layout = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
    return pl.ds(jax.lax.axis_index("line") * LANES, LANES), layout


def _copy_kernel(table: Any, numbers: Any, out: Any, *, count: int) -> None:
    words, layout = _line()
    first = jax.lax.axis_index("block") * BLOCK

    def copy(part: Any, _: None) -> None:
        # The last rows of the last block are copied more than once.
        places = [
            jnp.minimum(first + part * IN_FLIGHT + index, count - 1) for index in range(IN_FLIGHT)
        ]
        lines = [plgpu.layout_cast(table[numbers[place], words], layout) for place in places]
        for place, line in zip(places, lines, strict=True):
            out[place, words] = line

    jax.lax.fori_loop(0, BLOCK // IN_FLIGHT, copy, None)


def _sum_kernel(by_slot: Any, order: Any, starts: Any, out: Any, *, rows: int) -> None:
    words, layout = _line()
    first = jax.lax.axis_index("block") * BLOCK

    def sum_row(row: Any, _: None) -> None:
        def add(index: Any, total: Array) -> Array:
            return total + plgpu.layout_cast(by_slot[order[index], words], layout)

        nothing = plgpu.layout_cast(jnp.zeros((LANES,), jnp.float32), layout)
        out[row, words] = jax.lax.fori_loop(starts[row], starts[row + 1], add, nothing)

    jax.lax.fori_loop(first, jnp.minimum(first + BLOCK, rows), sum_row, None)
