"""The gather on TPU: asynchronous copies of rows from HBM, many at the same time.

Rows consist of 32-bit words in lines of 128, because Mosaic can copy such a row by its number.
(Rows of bfloat16 or bytes would share words with other rows.) So a row of 80 float32 numbers takes
as long as one of 128, a row of 160 bfloat16 numbers as long as one of 256, and a row of 256 float8
numbers as long as one of 512. `expand` first pads distinct rows to lines.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int32, Num, UInt32

from pallas_kernels.hashed_gather.format import RowFormat
from pallas_kernels.hashed_gather.xla import no_gradient

LANES = 128  # 32-bit words of a line
IN_FLIGHT = 512  # rows of a block in the forward pass; the next block is copied at the same time
SUMS, CHUNK = 256, 128  # rows of a block in the backward pass; gradients copied at once

_one_by_one = jax.custom_batching.sequential_vmap  # vmap becomes a loop over calls


def read(
    table: UInt32[Array, "R words"], numbers: Int32[Array, "n H"], form: RowFormat
) -> Num[Array, "n E"]:
    """Copies rows, and decodes them in the kernel.

    Raises:
        ValueError: the table's rows are not a multiple of a line.
    """
    if table.shape[1] % LANES:
        raise ValueError(
            f"A TPU cannot copy single rows of {table.shape[1]} words: pad them to whole lines of "
            f"{LANES} words, or use the implementation 'xla'."
        )
    return _one_by_one(partial(_read, form=form))(table, numbers)


@jax.custom_vjp
def expand(
    values: Float[Array, "U F"], slots: Int[Array, "n H"], order: Int[Array, "m"]
) -> Float[Array, "n E"]:
    """values[slots]; `order` sorts the slots stably, for the backward pass."""
    del order
    form = RowFormat(values.shape[1])
    lines = form.encode(_pad_lanes(values.astype(jnp.float32)))
    return _one_by_one(partial(_read, form=form))(lines, slots).astype(values.dtype)


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
    sums = _one_by_one(partial(_sum_rows, rows=rows))(_pad_lanes(by_slot), slots.reshape(-1), order)
    return sums[:, :width].astype(cotangent.dtype), no_gradient(slots), no_gradient(order)


expand.defvjp(_forward, _backward)


def _pad_lanes(x: Float[Array, "n F"]) -> Float[Array, "n words"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)))


def _read(
    table: UInt32[Array, "R words"], numbers: Int32[Array, "n H"], form: RowFormat
) -> Num[Array, "n E"]:
    """The decoded rows, H rows next to each other."""
    count, columns = numbers.shape
    tokens = min(max(IN_FLIGHT // columns // 8, 1) * 8, count)
    blocks = pl.cdiv(count, tokens)
    lines = -(-form.words // LANES) * LANES
    there = jnp.clip(numbers, 0, len(table) - 1)
    there = jnp.pad(there, ((0, blocks * tokens - count), (0, 0)))
    there = there.reshape(blocks, 1, tokens * columns)

    def numbers_of(ahead: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, 1, tokens * columns),
            lambda i: (jnp.minimum(i + ahead, blocks - 1), 0, 0),
            memory_space=pltpu.SMEM,
        )

    return pl.pallas_call(
        partial(_read_kernel, form=form),
        grid=(blocks,),
        in_specs=[
            numbers_of(0),
            numbers_of(1),
            pl.BlockSpec((tokens, columns), lambda i: (i, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((tokens, columns * form.width), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((count, columns * form.width), form.dtype),
        scratch_shapes=[
            pltpu.VMEM((2, columns, tokens, lines), jnp.uint32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        name="hashed_gather",
    )(there, there, numbers, table)


def _read_kernel(
    now: Any,
    ahead: Any,
    numbers: Any,
    table: Any,
    out: Any,
    buffer: Any,
    arrived: Any,
    *,
    form: RowFormat,
) -> None:
    """Decodes one block while the rows of the next block are copied."""
    step, (_, columns, tokens, lines) = pl.program_id(0), buffer.shape

    def start(there: Any, half: Any) -> None:
        def copy_token(token: Any, _: None) -> None:
            for column in range(columns):
                number = there[0, 0, token * columns + column]
                pltpu.make_async_copy(
                    table.at[pl.ds(number, 1), pl.ds(0, lines)],
                    buffer.at[half, column, pl.ds(token, 1), :],
                    arrived.at[half],
                ).start()

        jax.lax.fori_loop(0, tokens, copy_token, None)

    pl.when(step == 0)(lambda: start(now, 0))
    pl.when(step + 1 < pl.num_programs(0))(lambda: start(ahead, (step + 1) % 2))

    half = step % 2
    # This waits once, for all copies of the block.
    pltpu.make_async_copy(buffer.at[half], buffer.at[half], arrived.at[half]).wait()
    parts = []
    for column in range(columns):
        rows = form.decode(buffer[half, column][:, : form.words])
        number = numbers[:, column : column + 1]
        inside = (number >= 0) & (number < table.shape[0])
        parts.append(jnp.where(inside, rows, 0))
    out[...] = jnp.concatenate(parts, axis=1)


def _sum_rows(
    by_slot: Float[Array, "m words"], slots: Int[Array, "m"], order: Int[Array, "m"], *, rows: int
) -> Float[Array, "U words"]:
    """Sums the rows of equal slots, one after another, in the given order."""
    blocks, chunks = pl.cdiv(rows, SUMS), pl.cdiv(len(order), CHUNK)
    padding = chunks * CHUNK - len(order)
    ascending = slots.at[order].get(mode="promise_in_bounds", unique_indices=True)
    edges = jnp.arange(blocks + 1, dtype=ascending.dtype) * SUMS
    starts = jnp.searchsorted(ascending, edges).astype(jnp.int32)
    walk = jnp.pad(order, (0, padding)).reshape(chunks, 1, CHUNK)
    # The padding of the last chunk belongs to no block.
    owners = jnp.pad(ascending, (0, padding), constant_values=blocks * SUMS).reshape(walk.shape)
    words = by_slot.shape[1]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(blocks,),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 3,
        out_specs=pl.BlockSpec((SUMS, words), lambda i, starts: (i, 0)),
        scratch_shapes=[
            pltpu.SMEM((2, 1, CHUNK), jnp.int32),
            pltpu.SMEM((2, 1, CHUNK), jnp.int32),
            pltpu.VMEM((2, CHUNK, words), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
    )
    return pl.pallas_call(
        _sum_kernel,
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((rows, words), jnp.float32),
        name="hashed_gather_backward",
    )(starts, walk.astype(jnp.int32), owners.astype(jnp.int32), by_slot)


def _sum_kernel(
    starts: Any,
    walk: Any,
    owners: Any,
    by_slot: Any,
    out: Any,
    positions: Any,
    slots: Any,
    buffer: Any,
    read: Any,
    arrived: Any,
) -> None:
    """Sums one block of rows, from the chunks of the sorted order that contain its slots."""
    block, size = pl.program_id(0), out.shape[0]
    first, last = starts[block] // CHUNK, pl.cdiv(starts[block + 1], CHUNK)
    out[...] = jnp.zeros_like(out)

    def start(chunk: Any) -> None:
        half = chunk % 2
        numbers = [
            pltpu.make_async_copy(source.at[chunk], target.at[half], read.at[half])
            for source, target in ((walk, positions), (owners, slots))
        ]
        for copy in numbers:
            copy.start()
        for copy in numbers:
            copy.wait()

        def copy_row(index: Any, _: None) -> None:
            pltpu.make_async_copy(
                by_slot.at[pl.ds(positions[half, 0, index], 1), :],
                buffer.at[half, pl.ds(index, 1), :],
                arrived.at[half],
            ).start()

        jax.lax.fori_loop(0, CHUNK, copy_row, None)

    def add(chunk: Any, _: None) -> None:
        half = chunk % 2

        pl.when(chunk + 1 < last)(lambda: start(chunk + 1))
        pltpu.make_async_copy(buffer.at[half], buffer.at[half], arrived.at[half]).wait()

        def add_row(index: Any, _: None) -> None:
            row = slots[half, 0, index] - block * size

            @pl.when((row >= 0) & (row < size))
            def add_one() -> None:
                out[pl.ds(row, 1), :] += buffer[half, pl.ds(index, 1), :]

        jax.lax.fori_loop(0, CHUNK, add_row, None)

    pl.when(first < last)(lambda: start(first))
    jax.lax.fori_loop(first, last, add, None)
