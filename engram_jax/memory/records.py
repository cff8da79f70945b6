"""Reads and writes records of a table.

On CPU, each part of a record (embedding, moments, clock) has a separate gather and scatter, without
padding. That takes half the time; but few rows, as in decoding, are copied one by one. On other
platforms, a gather or scatter moves complete records.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from engram_jax.memory.initial_rows import mix
from engram_jax.memory.layout import RowState, Table
from engram_jax.sharding import TOKEN_AXES
from pallas_kernels import hashed_gather
from pallas_kernels.hashed_gather import GatherImplementation

FEW = 1024  # at most so many rows are copied one by one on a CPU; more by one gather


def read_values(
    table: Table, rows: Int32[Array, "n"], gather: GatherImplementation | None = None
) -> Float[Array, "n F"]:
    """Reads the embeddings of rows, without the other words of their records.

    Args:
        table: the table, or a device's part of it.
        rows: places; those beyond the table read as zeros.
        gather: implementation of `hashed_gather`; None is "xla".
    """
    form = table.layout.value
    return hashed_gather.read(table.records, rows[:, None], form, implementation=gather)


def read(
    table: Table, rows: Int32[Array, "n"], gather: GatherImplementation | None = None
) -> RowState:
    """Reads rows with their optimizer state; arguments as for `read_values`."""
    layout = table.layout

    def read_whole(records: Array, rows: Array) -> RowState:
        return layout.unpack(
            hashed_gather.read(records, rows[:, None], layout.record, implementation=gather)
        )

    def read_parts(records: Array, rows: Array) -> RowState:
        inside = (rows < len(records))[:, None]
        if len(rows) <= FEW:
            # XLA divides every gather from a large array among threads. Starting them takes longer.
            used = 1, layout.record.width
            copied = jax.lax.map(lambda row: jax.lax.dynamic_slice(records, (row, 0), used), rows)
            return layout.unpack(jnp.where(inside, copied[:, 0], 0))
        parts = [_gather(records, rows, columns) for columns in layout.columns]
        return layout.decode([jnp.where(inside, part, 0) for part in parts])

    if gather not in (None, "xla"):
        return read_whole(table.records, rows)
    return jax.lax.platform_dependent(table.records, rows, cpu=read_parts, default=read_whole)


def write(table: Table, rows: Int32[Array, "n"], new: RowState, step: Int32[Array, ""]) -> Table:
    """Writes rows, and returns the new table. Row numbers beyond the table are dropped.

    Call it inside `shard_map`.

    Args:
        table: a device's part of the table.
        rows: places in that part, distinct and ascending.
        new: the rows to write.
        step: number of finished optimizer steps; part of the seed of stochastic rounding.
    """
    # The random bits depend on the table, the place in the complete table and the step, so they are
    # the same on every mesh.
    if table.places is None:
        place = rows + jax.lax.axis_index(TOKEN_AXES) * len(table.records)
    else:
        place = table.places.at[rows].get(mode="clip")
    noise = mix(mix(place.astype(jnp.uint32)) + mix(step.astype(jnp.uint32)) + table.layer)
    layout = table.layout

    def write_whole(records: Array, rows: Array, *parts: Array) -> Array:
        return records.at[rows].set(
            layout.pad(parts), mode="drop", indices_are_sorted=True, unique_indices=True
        )

    def write_parts(records: Array, rows: Array, *parts: Array) -> Array:
        for columns, part in zip(layout.columns, parts, strict=True):
            records = _scatter(records, rows, part, columns)
        return records

    parts = layout.encode(new, noise)
    records = jax.lax.platform_dependent(
        table.records, rows, *parts, cpu=write_parts, default=write_whole
    )
    return replace(table, records=records)


def _gather(
    records: UInt32[Array, "R words"], rows: Int32[Array, "n"], columns: slice
) -> UInt32[Array, "n part"]:
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1)
    )
    return jax.lax.gather(
        records,
        _corners(rows, columns),
        numbers,
        slice_sizes=(1, columns.stop - columns.start),
        mode="clip",
    )


def _scatter(
    records: UInt32[Array, "R words"],
    rows: Int32[Array, "n"],
    part: UInt32[Array, "n part"],
    columns: slice,
) -> UInt32[Array, "R words"]:
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
    )
    return jax.lax.scatter(
        records,
        _corners(rows, columns),
        part,
        numbers,
        indices_are_sorted=True,
        unique_indices=True,
        mode="drop",
    )


def _corners(rows: Int32[Array, "n"], columns: slice) -> Int32[Array, "n 2"]:
    """Row and first word of every part to move."""
    return jnp.stack([rows, jnp.full_like(rows, columns.start)], axis=1)
