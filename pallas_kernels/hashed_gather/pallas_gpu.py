"""The gather on GPU, with Mosaic GPU: all threads of a block copy lines of 128 words.

XLA decodes formats other than float32. In `expand` it pads rows to lines (see `pallas_tpu`); `read`
needs rows of whole lines. In the backward pass, one block sums all gradients of a line of a
distinct row, in the given order. There are no atomic additions of floats, so the sums are the same
in every run.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Int32, Num, UInt32

from pallas_kernels.hashed_gather.format import RowFormat
from pallas_kernels.hashed_gather.xla import no_gradient

LINE = 128  # words, one per thread
BLOCK, IN_FLIGHT = 64, 16  # rows of a block; rows that it loads before it stores the first
FEW, MANY = 2, 16  # gradients loaded at once: of every row, and of rows that have more than FEW


def read(
    table: UInt32[Array, "R words"], numbers: Int32[Array, "n H"], form: RowFormat
) -> Num[Array, "n E"]:
    """Copies lines, then decodes them.

    Raises:
        ValueError: the table's rows are not a multiple of a line.
    """
    if table.shape[1] % LINE:
        raise ValueError(
            f"This kernel cannot read rows of {table.shape[1]} words: pad them to whole lines of "
            f"{LINE} words, or use the implementation 'xla'."
        )
    dtype = jnp.float32 if form.precision == "float32" else jnp.uint32
    words = _copy_lines(table, numbers.reshape(-1), -(-form.words // LINE) * LINE, dtype)
    rows = words[:, : form.words]
    if form.precision != "float32":
        rows = form.decode(rows)
    return rows.reshape(len(numbers), -1)


@jax.custom_vjp
def expand(
    values: Float[Array, "U F"], slots: Int[Array, "n H"], order: Int[Array, "m"]
) -> Float[Array, "n E"]:
    """values[slots]; `order` sorts the slots stably, for the backward pass."""
    del order
    width = values.shape[1]
    lines = _pad_line(values.astype(jnp.float32))
    rows = _copy_lines(lines, slots.reshape(-1), lines.shape[1], jnp.float32)
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
    width = by_slot.shape[1]
    # The start of each row's part of the order. (Atomic additions of integers are exact.)
    reads = jnp.zeros(rows, jnp.int32).at[slots.reshape(-1)].add(1, mode="promise_in_bounds")
    starts = jnp.pad(jnp.cumsum(reads, dtype=jnp.int32), (1, 0))
    lines = _pad_line(by_slot)
    sums = _launch(
        partial(_sum_kernel, rows=rows),
        (lines, order.astype(jnp.int32), starts),
        jax.ShapeDtypeStruct((rows, lines.shape[1]), jnp.float32),
    )
    return sums[:, :width].astype(cotangent.dtype), no_gradient(slots), no_gradient(order)


expand.defvjp(_forward, _backward)


def _pad_line(x: Float[Array, "n F"]) -> Float[Array, "n words"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LINE)))


def _copy_lines(table: Array, numbers: Int[Array, "n"], words: int, dtype: Any) -> Array:
    """The first `words` words of rows, bitcast to `dtype`; zero outside the table."""
    return _launch(
        partial(_copy_kernel, count=len(numbers), rows=len(table)),
        (table, numbers.astype(jnp.int32)),
        jax.ShapeDtypeStruct((len(numbers), words), dtype),
    )


def _launch(kernel: Any, inputs: tuple[Array, ...], output: jax.ShapeDtypeStruct) -> Array:
    """Runs a kernel. Each block computes one line of up to BLOCK rows of the result."""
    rows, words = output.shape
    result: Array = plgpu.kernel(
        kernel,
        out_type=output,
        grid=(words // LINE, pl.cdiv(rows, BLOCK)),
        grid_names=("line of the gather", "block of the gather"),
        # Barriers are only needed for memory that a block both reads and writes. There is none.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*inputs)
    return result


def _line() -> tuple[Any, Any]:
    """The words of a row that this block processes, and their layout over its threads."""
    layout = plgpu.Layout.WG_STRIDED((LINE,), vec_size=1)
    return pl.ds(jax.lax.axis_index("line of the gather") * LINE, LINE), layout


def _in_parts(visit: Any, count: int) -> None:
    """Calls `visit` for the rows of a block, IN_FLIGHT rows at a time.

    The last row of the result fills an incomplete part: it is written again with the same value.
    """
    first = jax.lax.axis_index("block of the gather") * BLOCK

    def visit_part(part: Any, _: None) -> None:
        start = first + part * IN_FLIGHT
        visit([jnp.minimum(start + index, count - 1) for index in range(IN_FLIGHT)])

    rows = jnp.minimum(count - first, BLOCK)
    jax.lax.fori_loop(0, jax.lax.div(rows + IN_FLIGHT - 1, jnp.int32(IN_FLIGHT)), visit_part, None)


def _only_if(there: Any, x: Array) -> Array:
    """x if `there`, otherwise zeros."""
    return jnp.where(jnp.broadcast_to(there, x.shape), x, jnp.zeros_like(x))


def _copy_kernel(table: Any, numbers: Any, out: Any, *, count: int, rows: int) -> None:
    words, layout = _line()

    def copy(places: list[Any]) -> None:
        found = [numbers[place] for place in places]
        lines = [
            plgpu.layout_cast(table[jnp.clip(number, 0, rows - 1), words], layout)
            for number in found
        ]
        for place, number, line in zip(places, found, lines, strict=True):
            inside = (number >= 0) & (number < rows)
            numbers_of_line = jax.lax.bitcast_convert_type(line, out.dtype)
            out[place, words] = _only_if(inside, numbers_of_line)

    _in_parts(copy, count)


def _sum_kernel(by_slot: Any, order: Any, starts: Any, out: Any, *, rows: int) -> None:
    """Sums the gradients of the rows of a block.

    Most rows have one or two gradients, which are loaded for many rows at once. Rows with more
    gradients follow, one row after another.
    """
    words, layout = _line()

    def add(total: Array, begin: Any, end: Any, most: int) -> Array:
        indices = [begin + index for index in range(most)]
        last = jnp.maximum(end, 1) - 1  # loaded again instead of indices from `end` on
        places = [order[jnp.minimum(index, last)] for index in indices]
        lines = [plgpu.layout_cast(by_slot[place, words], layout) for place in places]
        for index, line in zip(indices, lines, strict=True):
            total = total + _only_if(index < end, line)
        return total

    def sum_rows(places: list[Any]) -> None:
        zeros = plgpu.layout_cast(jnp.zeros((LINE,), jnp.float32), layout)
        bounds = [(starts[row], starts[row + 1]) for row in places]
        totals = [add(zeros, begin, end, FEW) for begin, end in bounds]
        for row, total in zip(places, totals, strict=True):
            out[row, words] = total

        def sum_row(row: Any, _: None) -> None:
            begin, end = starts[row], starts[row + 1]

            @pl.when(end - begin > FEW)
            def sum_many() -> None:
                parts = jax.lax.div(end - begin + MANY - 1, jnp.int32(MANY))
                out[row, words] = jax.lax.fori_loop(
                    0,
                    parts,
                    lambda part, total: add(total, begin + part * MANY, end, MANY),
                    zeros,
                )

        jax.lax.fori_loop(places[0], places[-1] + 1, sum_row, None)

    _in_parts(sum_rows, rows)
