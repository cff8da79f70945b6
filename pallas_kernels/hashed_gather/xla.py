"""The gather in XLA. Its backward pass is a sorted segment sum.

JAX's own backward pass is an unsorted scatter-add. It is slow on TPU, and on GPU its atomic
additions have no fixed order. A sorted segment sum has a fixed order on CPU and TPU. On GPU, XLA
still uses atomic additions, unless it runs with --xla_gpu_deterministic_ops.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Num, UInt32

from pallas_kernels.hashed_gather.format import RowFormat


def read(
    table: UInt32[Array, "R words"], numbers: Int32[Array, "n H"], form: RowFormat
) -> Num[Array, "n E"]:
    """Gathers words, then decodes them."""
    numbers = jnp.where(numbers < 0, len(table), numbers)  # otherwise they count from the end
    words = table.at[numbers, : form.words].get(mode="fill", fill_value=0)
    return form.decode(words).reshape(len(numbers), -1)


@jax.custom_vjp
def expand(
    values: Float[Array, "U F"], slots: Int[Array, "n H"], order: Int[Array, "m"]
) -> Float[Array, "n E"]:
    """values[slots]; `order` sorts the slots stably, for the backward pass."""
    del order
    return values.at[slots].get(mode="promise_in_bounds").reshape(len(slots), -1)


def _forward(
    values: Float[Array, "U F"], slots: Int[Array, "n H"], order: Int[Array, "m"]
) -> tuple[Array, tuple[int, Array, Array]]:
    return expand(values, slots, order), (len(values), slots, order)


def _backward(
    residuals: tuple[int, Array, Array], cotangent: Float[Array, "n E"]
) -> tuple[Array, np.ndarray, np.ndarray]:
    rows, slots, order = residuals
    by_slot = cotangent.reshape(slots.size, -1)
    sums = jax.ops.segment_sum(
        by_slot.at[order].get(mode="promise_in_bounds", unique_indices=True).astype(jnp.float32),
        slots.reshape(-1).at[order].get(mode="promise_in_bounds", unique_indices=True),
        num_segments=rows,
        indices_are_sorted=True,
        mode="promise_in_bounds",
    )
    return sums.astype(cotangent.dtype), no_gradient(slots), no_gradient(order)


def no_gradient(x: Int[Array, "*n"]) -> np.ndarray:
    """The cotangent of an integer argument."""
    return np.zeros(x.shape, jax.dtypes.float0)


expand.defvjp(_forward, _backward)
