"""The door to the fusion's implementations."""

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
    """What to add to the residual branches, and the gates, in float32.

    Inside `jax.shard_map`, take check_vma=False: the backward pass gives a device's share.

    Args:
        hidden: the residual branches.
        key: the memory's keys.
        value: the memory's value, shared by the branches.
        gain: the gain of the key norm times that of the query norm, which only enter together.
        taps: of the convolution, the last for the current token, times the gain of its norm; None:
            there is no convolution.
        segments: document number of every position; None: a row is one document. A tap reads zero
            in another document, and before the row.
        token_mask: False where the gate is closed.
        form: the constants.
        implementation: None is "xla".

    Raises:
        ValueError: an implementation that does not exist, or does not take these sizes.
    """
    name = implementation or "xla"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"There is no fusion {name!r}; there are {', '.join(IMPLEMENTATIONS)}.")
    if taps is not None and len(taps) > MOST_TAPS:
        raise ValueError(f"The convolution has {len(taps)} taps; it may have {MOST_TAPS}.")
    # Imported when asked for: Pallas for GPU changes from one version of JAX to the next.
    module = import_module(f"pallas_kernels.gated_fusion.{name}")
    fused: tuple[Array, Array] = module.fuse(
        hidden, key, value, gain, taps, segments, token_mask, form
    )
    return fused
