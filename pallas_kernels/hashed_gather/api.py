"""The door to the gather's implementations."""

from collections.abc import Callable
from typing import Literal

from jaxtyping import Array, Float, Int

from pallas_kernels.hashed_gather import reference, xla

type Implementation = Literal["reference", "xla"]

_IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "reference": reference.gather,
    "xla": xla.gather,
}


def gather(
    values: Float[Array, "n F"],
    indices: Int[Array, "m"],
    order: Int[Array, "m"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "m F"]:
    """Reads values[indices]; the gradient sums the duplicates in the prepared order.

    Args:
        values: rows to read.
        indices: row numbers, all in range.
        order: stable order that sorts `indices`; deterministic backward passes walk along it.
        implementation: None picks the fastest for the device, which is "xla" so far.

    Raises:
        ValueError: an implementation that does not exist.
    """
    name = implementation or "xla"
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f"There is no gather {name!r}; there are {', '.join(_IMPLEMENTATIONS)}.")
    return _IMPLEMENTATIONS[name](values, indices, order)
