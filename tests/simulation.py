"""Kernels on the CPU."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import jax
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu


def simulation(implementation: str, *, races: bool = False) -> AbstractContextManager:
    """A context in which kernels of this implementation run on the CPU; races can be errors.

    (It detects races of blocks, but not of the warps of a GPU's block.) On a GPU, GPU kernels are
    not simulated.
    """
    if implementation == "pallas_tpu":
        return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=races))
    if implementation == "pallas_gpu" and jax.default_backend() != "gpu":
        if jax.__version_info__ < (0, 12):
            pytest.skip("JAX simulates GPU kernels with layouts from 0.12 on")
        return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=races))
    return nullcontext()


def also_with_races(*implementations: str) -> list[Any]:
    """Parameters (implementation, races): each without, and simulated ones also with race checks.

    Race checks take several times as long.
    """
    slow = [
        pytest.param((name, True), marks=pytest.mark.slow, id=f"{name}-races")
        for name in implementations
        if name.startswith("pallas")
    ]
    return [pytest.param((name, False), id=name) for name in implementations] + slow


@contextmanager
def simulation_by_xla() -> Iterator[None]:
    """A context in which TPU kernels run on the CPU as XLA operations, without race checks.

    JAX can differentiate remat and scan around these, but not around the effects of the other
    simulation.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
        yield
    jax.clear_caches()
