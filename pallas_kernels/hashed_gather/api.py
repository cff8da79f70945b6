"""The door to the gather's implementations."""

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
    """Reads rows of a table as it is stored, and decodes them: E = H·F numbers side by side.

    There is no gradient: tables are no parameters. To read through distinct rows, give
    `rows[slots]` for `numbers`.

    Args:
        table: rows in words; what follows the first `form.words` is not read.
        numbers: row numbers, H for each of n; those outside the table read as zeros.
        form: how the numbers of a row lie in its words.
        implementation: None is "xla".

    Raises:
        ValueError: an implementation that does not exist, or cannot read such rows.
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
    """values[slots], E = H·F numbers side by side; the gradient sums duplicates in a given order.

    Sums are taken in float32.

    Args:
        values: distinct rows.
        slots: which of them to read, H for each of n; all in range.
        order: stable order that sorts the flattened slots; the backward pass walks along it.
        implementation: None is "xla".

    Raises:
        ValueError: an implementation that does not exist.
    """
    flat = slots.reshape(-1, slots.shape[-1])
    return _module(implementation).expand(values, flat, order).reshape(*slots.shape[:-1], -1)


def _module(implementation: GatherImplementation | None) -> Any:
    name = implementation or "xla"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"There is no gather {name!r}; there are {', '.join(IMPLEMENTATIONS)}.")
    # Imported when asked for: Pallas for GPU changes from one version of JAX to the next.
    return import_module(f"pallas_kernels.hashed_gather.{name}")
