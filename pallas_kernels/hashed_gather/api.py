"""Dispatch to the implementations of the gather."""

from importlib import import_module
from typing import Any, Literal, get_args

from jaxtyping import Array, Float, Int, Int32, Num, UInt32

from pallas_kernels.hashed_gather.format import RowFormat

type GatherImplementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]

IMPLEMENTATIONS: tuple[str, ...] = get_args(GatherImplementation.__value__)


def read(
    table: UInt32[Array, "R words"],
    numbers: Int32[Array, "*n H"],
    form: RowFormat,
    *,
    implementation: GatherImplementation | None = None,
) -> Num[Array, "*n E"]:
    """Reads rows of a stored table and decodes them: E = H·F numbers for each of n.

    It has no gradient, because tables are not parameters.

    Args:
        table: rows of words; only the first `form.words` of a row are read.
        numbers: row numbers, H for each of n; those outside the table read as zeros.
        form: format of the numbers of a row in its words.
        implementation: None is "xla".

    Raises:
        ValueError: the implementation does not exist, or does not support such rows.
    """
    flat = numbers.reshape(-1, numbers.shape[-1])
    rows = _module(implementation).read(table, flat, form)
    return rows.reshape(*numbers.shape[:-1], -1)


def expand(
    values: Float[Array, "U F"],
    slots: Int[Array, "*n H"],
    order: Int[Array, "m"],
    *,
    implementation: GatherImplementation | None = None,
) -> Float[Array, "*n E"]:
    """values[slots]: E = H·F numbers for each of n. The gradient sums duplicates in a given order.

    Sums are in float32.

    Args:
        values: distinct rows.
        slots: indices of the rows to read, H for each of n; all must be in range.
        order: stable order that sorts the flattened slots; the backward pass adds in this order.
        implementation: None is "xla".

    Raises:
        ValueError: the implementation does not exist.
    """
    flat = slots.reshape(-1, slots.shape[-1])
    return _module(implementation).expand(values, flat, order).reshape(*slots.shape[:-1], -1)


def _module(implementation: GatherImplementation | None) -> Any:
    name = implementation or "xla"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"There is no gather {name!r}; choose from {', '.join(IMPLEMENTATIONS)}.")
    # Imported on demand, because the API of Pallas for GPU differs between versions of JAX.
    return import_module(f"pallas_kernels.hashed_gather.{name}")
