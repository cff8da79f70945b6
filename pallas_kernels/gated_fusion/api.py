"""The door to the fusion's implementations."""

from collections.abc import Callable
from typing import Literal

from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.gated_fusion import pallas_tpu, reference, xla
from pallas_kernels.gated_fusion.form import FusionForm

type FusionImplementation = Literal["reference", "xla", "pallas_tpu"]

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "reference": reference.fuse,
    "xla": xla.fuse,
    "pallas_tpu": pallas_tpu.fuse,
}


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
        implementation: None picks "xla", for no other has been measured on its device.

    Raises:
        ValueError: an implementation that does not exist.
    """
    name = implementation or "xla"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"There is no fusion {name!r}; there are {', '.join(IMPLEMENTATIONS)}.")
    return IMPLEMENTATIONS[name](hidden, key, value, gain, taps, segments, token_mask, form)
