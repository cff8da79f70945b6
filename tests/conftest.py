"""JAX settings of all tests (eight CPU devices, no rank promotion, a compilation cache).

Also the tiny runs that tests share.
"""

import gc
import os
import platform
import sys
from pathlib import Path

# Also in the environment, for the programs that tests start. They use one CPU device, unless they
# set more.
CACHE = Path(__file__).parent.parent / ".cache" / "xla"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Most of the time of tests is compiling, so LLVM optimizes less on a CPU. XLA's own passes still
# run, so compiled programs have the same text and memory. Their results can differ in the last
# bits: see `optimized`.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # A device may wait for the others for longer than XLA's 40 s: eight share the cores of other
    # test processes, and a process may still compile.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
        " --xla_cpu_collective_timeout_seconds=600"
    )
# Most objects of a traced program live as long as it does.
gc.set_threshold(50_000, 50, 50)

import jax  # noqa: E402

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import replace  # noqa: E402
from functools import cache  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402
from numpy_draws import draw_with_numpy  # noqa: E402
from programs import ROOT  # noqa: E402
from tiny_runs import (  # noqa: E402
    TrainWhole,
    forget_programs,
    make_run,
    on_devices,
    place_initial_state,
    share_programs,
    tiny_config,
    vary,
)

from engram_jax.config import Config, TrainConfig  # noqa: E402
from engram_jax.memory.row_adam import RowAdamConfig  # noqa: E402
from engram_jax.program import Program  # noqa: E402
from engram_jax.run import Run  # noqa: E402
from engram_jax.train_state import TrainState  # noqa: E402
from engram_jax.trainer import train  # noqa: E402

MOST_MAPS = 25_000
LONGEST = (  # files, by seconds in the slow and in the fast set
    *("test_processes.py", "test_experiments.py", "test_memory.py", "test_backbone.py"),
    *("test_notebook.py", "test_training.py"),
    *("test_ahead_of_time.py", "test_generate.py", "test_placement.py", "test_model.py"),
    *("test_resuming.py", "test_run.py", "test_lookup.py", "test_extend.py", "test_train_step.py"),
)

# Times of single examples say nothing on a machine that others use, too.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

# The slow parts of tests that train are done once for all equal runs.
Program.initial_state = place_initial_state
share_programs()
if os.environ["JAX_PLATFORMS"] == "cpu":
    draw_with_numpy()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks tests as slow that are slow only for some implementations."""
    for mark in item.iter_markers("slow_for"):
        if any((name, False) in item.callspec.params.values() for name in mark.args):
            item.add_marker(pytest.mark.slow)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Frees compiled programs between files before their mappings are too many.

    A program has some ten mappings, and Linux allows a process 65,530; then LLVM crashes.
    """
    maps = Path("/proc/self/maps")
    is_last = nextitem is not None and nextitem.path != item.path
    if is_last and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        forget_programs()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts files, those that take longest first, so that all workers are busy until the end.

    Tests that clear JAX's caches run last in their files, so that the others share programs.
    """
    files = list(dict.fromkeys(item.path for item in items))
    places = {name: place for place, name in enumerate(LONGEST)}
    files.sort(key=lambda path: places.get(path.name, len(LONGEST)))
    ranks = {path: rank for rank, path in enumerate(files)}
    items.sort(
        key=lambda item: (ranks[item.path], "optimized" in getattr(item, "fixturenames", ()))
    )


@pytest.fixture
def optimized() -> Iterator[None]:
    """Normal LLVM optimization, for tests that compare bits. They share no run with other tests."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture(scope="session")
def libtpu() -> None:
    """Skips a test if the TPU compiler does not exist for this platform."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("libtpu exists for Linux on x86-64 alone")


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A function that gives the run of `make_run`, created once. Tests must only read it."""
    return cache(lambda form: make_run(tmp_path_factory.mktemp(form), form))


@pytest.fixture(scope="session")
def eval_program() -> Iterator[Callable[[list[str]], None]]:
    """The main function of eval.py."""
    sys.path.insert(0, str(ROOT))
    import eval

    yield lambda words: eval.main(eval.parse_options(words))
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A tiny run that logs every step; its corpora are tokenized once.

    It uses exact row Adam, so every read of a table must apply pending updates.
    """
    config = tiny_config(tmp_path_factory.mktemp("tiny"))
    config = vary(config, memory={"adam": RowAdamConfig(form="exact")})
    # With some seeds there are gate scores near 0, where the root is so steep that the order of
    # summation changes the gradient's norm: in 20 steps by 4e-2 (relative) with seed 1, by 2e-4
    # with seed 5, and by less than 4e-5 with seeds 2, 3, 4, 6 and 7. Without gates it is 7e-8.
    return replace(config, train=TrainConfig(steps=6, seed=1, log_every=1, evaluate_every=0))


@pytest.fixture
def one_device() -> Iterator[None]:
    """Runs start on the first of the eight devices."""
    with on_devices(1):
        yield


@pytest.fixture(scope="session")
def train_whole(tmp_path_factory: pytest.TempPathFactory) -> TrainWhole:
    """Trains a configuration on data × fsdp devices, once. Tests must only read run and state."""

    @cache
    def train_once(config: Config, data: int, fsdp: int) -> tuple[Run, TrainState]:
        with on_devices(data, fsdp):
            run = Run.start(config, tmp_path_factory.mktemp("whole") / "run")
        return run, train(run)

    return train_once


@pytest.fixture(scope="session")
def trained(tiny: Config, train_whole: TrainWhole) -> Run:
    """The finished tiny run on eight devices. Tests must only read it."""
    return train_whole(tiny, 2, 4)[0]
