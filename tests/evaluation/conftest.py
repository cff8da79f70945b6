import pytest

from engram_jax.run import Run
from engram_jax.train_state import Weights


@pytest.fixture(scope="session")
def run(untrained) -> Run:
    return untrained("engram")


@pytest.fixture(scope="session")
def weights(run) -> Weights:
    return run.restore_weights()


@pytest.fixture
def in_mesh(run):
    with run.program.use_mesh():
        yield
