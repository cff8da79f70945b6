"""Rotary position embedding (arXiv 2104.09864), and its extension YaRN (arXiv 2309.00071)."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from engram_jax.errors import InputError


@dataclass(frozen=True)
class YarnConfig:
    """YaRN: extends a model to documents longer than those it was trained on.

    Attributes:
        scale: s, by how much the longest document grows.
        trained_length: L, the longest document before the extension.
        slow: α; a frequency with fewer rotations over L than this is divided by s.
        fast: β; a frequency with more rotations over L than this is not changed.
        mscale: DeepSeek's factor on the logarithm in `softmax_factor`; the paper's is 1.
    """

    scale: float = 10.0
    trained_length: int = 4096
    slow: float = 1.0
    fast: float = 32.0
    mscale: float = 0.707

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise InputError(f"yarn.scale {self.scale} must be at least 1.")
        if not 0 < self.slow < self.fast:
            raise InputError(
                f"yarn.slow {self.slow} must be above 0 and below yarn.fast {self.fast}."
            )
        if self.trained_length <= 2 * math.pi * self.slow:
            raise InputError(
                f"Over yarn.trained_length {self.trained_length}, no frequency makes yarn.slow = "
                f"{self.slow} rotations; set it to the length of the documents in training."
            )

    @property
    def softmax_factor(self) -> float:
        """The factor on the scale of the softmax: (0.1·mscale·ln s + 1)²."""
        return (0.1 * self.mscale * math.log(self.scale) + 1) ** 2


def frequencies(
    width: int, theta: float, yarn: YarnConfig | None = None
) -> Float[np.ndarray, " half"]:
    """θ^(−2i/P) for the pairs i < P/2, in float32. YaRN divides the low frequencies by its scale.

    Between the frequencies that YaRN keeps and those that it divides, it interpolates linearly in
    i: from the last pair with `fast` rotations over the trained length to the first pair with
    `slow` rotations. This is DeepSeek-V2's code; the paper interpolates linearly in the rotations.

    Args:
        width: width P of the rotated part.
        theta: base.
        yarn: the extension; None: plain rotary frequencies.
    """
    pairs = np.arange(width // 2)
    trained = theta ** (-2 * pairs / width)
    if yarn is None:
        return trained.astype(np.float32)

    def pair_with(rotations: float) -> float:
        wavelength = yarn.trained_length / rotations
        return width * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_with(yarn.fast)), 0)
    last = min(math.ceil(pair_with(yarn.slow)), width - 1)
    # If both are equal, the ramp is a step. DeepSeek's 0.001 avoids a division by zero.
    divided = np.clip((pairs - first) / max(last - first, 0.001), 0, 1)
    return (trained * (1 - divided + divided / yarn.scale)).astype(np.float32)


def rotate(
    x: Float[Array, "B T heads P"],
    positions: Int32[Array, "B T"],
    theta: float,
    yarn: YarnConfig | None = None,
) -> Float[Array, "B T heads P"]:
    """Rotates the pair (xᵢ, x₍ᵢ₊P/2₎) by the angle position · `frequencies`ᵢ, in float32."""
    half = x.shape[-1] // 2
    speeds = jnp.asarray(frequencies(x.shape[-1], theta, yarn))
    angles = positions[:, :, None, None].astype(jnp.float32) * speeds[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
