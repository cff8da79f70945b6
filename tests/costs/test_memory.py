"""The memory that a training step needs at least, and the estimate of all of it."""

from dataclasses import replace
from typing import Any

import pytest
from tiny_runs import vary

from engram_jax.command_line import load_named_config
from engram_jax.config import Config
from engram_jax.costs import memory
from engram_jax.costs.ahead_of_time import abstract_step, compile_cost, topology_mesh
from engram_jax.costs.memory import check_memory, estimate_bytes, least_bytes
from engram_jax.errors import InputError
from engram_jax.program import Program
from engram_jax.sharding import MeshConfig, make_abstract_mesh
from engram_jax.train_state import TrainState
from engram_jax.train_step import make_train_step

CONFIG = vary(load_named_config("engram_2m"), model={"layers": 2})  # 4 branches, width 128


def shapes(config: Config) -> tuple[TrainState, int]:
    """The abstract state, and the number of devices."""
    mesh = make_abstract_mesh(config.mesh)
    return Program.of_sizes(config, mesh).abstract_state(), mesh.size


def least(config: Config, mesh: MeshConfig, **data: Any) -> dict[str, int]:
    config = replace(vary(config, data={"batch_size": 8} | data), mesh=mesh)
    return least_bytes(config, *shapes(config))


def test_what_a_step_needs_at_least_follows_the_mesh() -> None:
    config = CONFIG
    one, split, replicated = (
        least(config, MeshConfig(*sizes)) for sizes in ((1, 1, 1), (1, 4, 1), (4, 1, 1))
    )
    state, rows = "parameters and optimizer", "inputs of the blocks"
    assert one[rows] == 8 * 256 * 128 * 4 * 2 * 4 and one["logits"] == 8 * 256 * 8192 * 4
    assert split[rows] == replicated[rows] == one[rows] // 4
    assert split["tables"] == replicated["tables"] == one["tables"] // 4
    assert replicated[state] == one[state]
    assert one[state] / 4 <= split[state] < 1.05 * one[state] / 4  # gains are replicated
    accumulated = vary(config, train={"accumulation": 2})
    twice = least(accumulated, MeshConfig(1, 1, 1))
    assert twice[rows] == one[rows] // 2 and twice["gradients"] > 0 and "gradients" not in one
    short = least(config, MeshConfig(1, 1, 1), sequence_length=8)
    assert rows not in short and short["gradients"] == twice["gradients"]


@pytest.mark.parametrize(
    ("section", "change", "named", "remedy"),
    [
        ("model", {"feed_forward": 10**6}, "parameters and optimizer", "raise mesh.fsdp"),
        ("memory", {"rows_per_head": (10**6,) * 2}, "tables", "memory.placement to host"),
        (
            "data",
            {"batch_size": 1024, "sequence_length": 1024},
            "inputs of the blocks",
            "raise train.accumulation",
        ),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch, section: str, change: dict[str, Any], named: str, remedy: str
) -> None:
    config = replace(CONFIG, mesh=MeshConfig(1, 2, 1))
    monkeypatch.setattr(memory, "_memory", lambda _: (1e12, 5e8))
    check_memory(config, *shapes(config))
    config = vary(config, **{section: change})
    found = rf"engram_2m needs at least .* GB on each device of a mesh of 2 \(.*{named} [1-9\d]"
    with pytest.raises(InputError, match=rf"{found}.*there are 0\.5 GB of memory; .*{remedy}"):
        check_memory(config, *shapes(config))


@pytest.mark.slow
@pytest.mark.parametrize("remat", [None, "nothing_saveable"])
def test_the_estimate_is_near_a_compiled_step(libtpu: None, remat: str | None) -> None:
    config = vary(
        load_named_config("dense_2m"),
        model={"dtype": "bfloat16", "remat": remat, "vocabulary": 32_768},
        data={"sequence_length": 2048, "batch_size": 16},
        mesh={"data": 1, "fsdp": 4},
    )
    program = Program.of_sizes(config, topology_mesh("v5p:2x2x1", config.mesh))
    state, batch = abstract_step(program)
    with program.use_mesh():
        cost = compile_cost(make_train_step(program), state, batch, program.abstract_row_adam())
    needed = cost.arguments + cost.temporaries
    assert sum(least_bytes(config, state, 4).values()) < needed
    estimate = sum(estimate_bytes(config).values())
    # With remat the compiler needs one array of logits here, and the estimate has two.
    assert 0.75 * needed < estimate < (1.25 if remat is None else 1.75) * needed
