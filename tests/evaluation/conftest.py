import jax
import pytest
from tiny_runs import make_run

from engram_jax.run import Run
from engram_jax.train_state import TrainState


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Run:
    return make_run(tmp_path_factory.mktemp("engram"), "engram")


@pytest.fixture(scope="session")
def state(run) -> TrainState:
    return run.initial_state()


@pytest.fixture
def in_mesh(run):
    with jax.set_mesh(run.mesh):
        yield
