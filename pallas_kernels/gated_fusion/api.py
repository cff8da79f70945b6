"""Dispatch to the implementations of the fusion."""

from importlib import import_module
from typing import Literal, get_args

from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.gated_fusion.form import MOST_TAPS, FusionForm

type FusionImplementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]

IMPLEMENTATIONS: tuple[str, ...] = get_args(FusionImplementation.__value__)


def fuse(
    hidden: Float[Array, "B T M D"],
    key: Float[Array, "B T M D"],
    value: Float[Array, "B T D"],
    gain: Float[Array, "M D"],
    taps: Float[Array, "kernel M D"] | None = None,
    segments: Int32[Array, "B T"] | None = None,
    token_mask: Bool[Array, "B T"] | None = None,
    *,
    form: FusionForm,
    implementation: FusionImplementation | None = None,
) -> tuple[Float[Array, "B T M D"], Float[Array, "B T M"]]:
    """Returns what to add to the residual branches, and the gates in float32.

    Inside `jax.shard_map`, set check_vma=False, because the backward pass returns each device's
    part of a gradient sum.

    Args:
        hidden: the residual branches.
        key: the memory's keys.
        value: the memory's value, shared by the branches.
        gain: the gain of the key norm times the gain of the query norm; only the product matters.
        taps: taps of the convolution, times the gain of its norm; the last tap is for the current
            token. None: no convolution.
        segments: document number of every position; None: each row of the batch is one document. A
            tap reads zero in another document, and before the start of the row.
        token_mask: False at tokens whose gate is 0.
        form: the constants.
        implementation: None is "xla".

    Raises:
        ValueError: the implementation does not exist, or does not support these sizes.
    """
    name = implementation or "xla"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"There is no fusion {name!r}; choose from {', '.join(IMPLEMENTATIONS)}.")
    if taps is not None and len(taps) > MOST_TAPS:
        raise ValueError(f"The convolution has {len(taps)} taps; at most {MOST_TAPS} are possible.")
    if not form.gated and name != "reference":
        raise ValueError(f"The fusion {name!r} has no form without gates; choose reference.")
    # Imported on demand, because the API of Pallas for GPU differs between versions of JAX.
    module = import_module(f"pallas_kernels.gated_fusion.{name}")
    fused: tuple[Array, Array] = module.fuse(
        hidden, key, value, gain, taps, segments, token_mask, form
    )
    return fused
