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
    """Where a kernel for this implementation's device runs on the CPU; `races` are errors if asked.

    (Those of blocks; what the warps of a GPU's block do to one another, it does not see.) On a GPU
    its own kernels run as they are.
    """
    if implementation == "pallas_tpu":
        return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=races))
    if implementation == "pallas_gpu" and jax.default_backend() != "gpu":
        if jax.__version_info__ < (0, 12):
            pytest.skip("JAX simulates GPU kernels with layouts from 0.12 on")
        return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=races))
    return nullcontext()


def also_with_races(*implementations: str) -> list[Any]:
    """Parameters (implementation, races): each as it is, and those simulated with a look for races.

    That takes several times as long.
    """
    slow = [
        pytest.param((name, True), marks=pytest.mark.slow, id=f"{name}-races")
        for name in implementations
        if name.startswith("pallas")
    ]
    return [pytest.param((name, False), id=name) for name in implementations] + slow


@contextmanager
def simulation_by_xla() -> Iterator[None]:
    """Where TPU kernels run on the CPU as XLA's own operations, without looking for races.

    JAX differentiates remat and scan around these, but not around the other simulation's effects.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
        yield
    jax.clear_caches()
