"""JAX for all tests: the CPU as eight devices, strict about ranks, with a compilation cache.

And the tiny runs that tests share.
"""

import os
import platform
import sys
from pathlib import Path

# Through the environment as well as the config, for the programs that tests start: those run on one
# CPU device, unless they ask for more.
CACHE = Path(__file__).parent.parent / ".cache" / "xla"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Compiling is most of what tests take, so on a CPU LLVM optimizes little. XLA's own passes run, so
# compiled programs read the same, and take the same memory; their bits may differ: see `optimized`.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import replace  # noqa: E402
from functools import cache  # noqa: E402

import pytest  # noqa: E402
from tiny_runs import (  # noqa: E402
    TrainWhole,
    make_run,
    on_devices,
    place_initial_state,
    share,
    tiny_config,
    vary,
)

from engram_jax import sampling, train_step, trainer  # noqa: E402
from engram_jax.config import Config, TrainConfig  # noqa: E402
from engram_jax.evaluation import held_out, report  # noqa: E402
from engram_jax.memory.row_adam import RowAdamConfig  # noqa: E402
from engram_jax.program import Program  # noqa: E402
from engram_jax.run import Run  # noqa: E402
from engram_jax.train_state import TrainState  # noqa: E402
from engram_jax.trainer import train  # noqa: E402

# What takes most of the time of a test that trains is done once for all runs that are equal.
Program.initial_state = place_initial_state
for name, modules in (
    ("make_train_step", (train_step, trainer)),
    ("make_scorer", (held_out, report, trainer)),
    ("_make_next_token", (sampling,)),
):
    shared = share(getattr(modules[0], name))
    for module in modules:
        setattr(module, name, shared)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file, and those that read the same runs, are for one process.

    And what is slow for some implementations alone is slow.
    """
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        group = next(iter(fixtures & {"untrained", "tiny"}), item.path.stem)
        item.add_marker(pytest.mark.xdist_group(group))
        for mark in item.iter_markers("slow_for"):
            if any((name, False) in item.callspec.params.values() for name in mark.args):
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def optimized() -> Iterator[None]:
    """LLVM optimizes as it does for users: for tests of bits, which share no run with others."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture(scope="session")
def libtpu() -> None:
    """Skips what needs the TPU compiler where it does not exist; elsewhere tests install it."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("libtpu exists for Linux on x86-64 alone")


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Gives the run of `make_run` with this memory, made once; tests only read what it saved."""
    return cache(lambda memory: make_run(tmp_path_factory.mktemp(memory), memory))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A tiny run that logs every step; its corpora are tokenized once.

    Its row Adam is the exact one, of which every reader of a table must know.
    """
    config = tiny_config(tmp_path_factory.mktemp("tiny"))
    config = vary(config, memory={"adam": RowAdamConfig(form="exact")})
    # Seed 0 meets gate scores of 2e-4, where the root is so steep that the order of summation moves
    # the gradient's norm by 5e-4 of itself. Seeds 1 to 7 stay below 3e-5.
    return replace(config, train=TrainConfig(steps=6, seed=1, log_every=1, evaluate_every=0))


@pytest.fixture
def one_device() -> Iterator[None]:
    """Runs start on the first of the eight devices."""
    with on_devices(1):
        yield


@pytest.fixture(scope="session")
def train_whole(tmp_path_factory: pytest.TempPathFactory) -> TrainWhole:
    """Trains a configuration on data × fsdp devices, once; run and state are only to be read."""

    @cache
    def train_once(config: Config, data: int, fsdp: int) -> tuple[Run, TrainState]:
        with on_devices(data, fsdp):
            run = Run.start(config, tmp_path_factory.mktemp("whole") / "run")
        return run, train(run)

    return train_once


@pytest.fixture(scope="session")
def trained(tiny: Config, train_whole: TrainWhole) -> Run:
    """The tiny run on eight devices, at its end; only to be read."""
    return train_whole(tiny, 2, 4)[0]
