"""The training step: gradients, clipping, and which arrays it changes."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lively import enliven
from tiny_runs import scale_rows, vary, with_backbone

from engram_jax.config import Config
from engram_jax.data.packing import Batch, micro_batches
from engram_jax.layers.cross_entropy import compute_logits
from engram_jax.memory.places import stored_places
from engram_jax.memory.row_adam import RowAdamConfig, RowAdamForm
from engram_jax.run import Run
from engram_jax.train_state import TrainState
from engram_jax.train_step import apply_updates, forward_backward, make_train_step, step_metrics


def first_batch(run: Run) -> Batch:
    with run.batches() as batches:
        return run.program.put(next(batches))


def one_step(run: Run, state: TrainState | None = None) -> tuple[TrainState, dict[str, Any]]:
    with run.program.use_mesh():
        if state is None:
            state = run.program.initial_state()
            # With seed 3, no gate's score is below 4e-3. Closer to zero, the signed root is so
            # steep that the order of summation changes the gradient.
            state = replace(state, params=enliven(state.params, seed=3))
        state, metrics = make_train_step(run.program)(state, first_batch(run), run.program.row_adam)
    return state, {name: array.item() for name, array in metrics.items()}


@pytest.fixture
def smooth(tiny: Config) -> Config:
    """A large epsilon, and no clipping.

    Otherwise Adam's first update of some parameters is the sign of rounding noise.
    """
    adam = RowAdamConfig(form="exact", eps=1e-2)
    return vary(tiny, memory={"adam": adam}, optimizer={"eps": 1e-2, "clip_norm": 1e6})


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("form", ["exact", pytest.param("lazy", marks=pytest.mark.slow)])
def test_micro_batches_give_the_update_of_the_whole_batch(
    smooth: Config, tmp_path: Path, form: RowAdamForm
) -> None:
    adam = replace(smooth.memory.adam, form=form)
    smooth = vary(smooth, memory={"adam": adam})
    whole, parts = (
        one_step(Run.start(vary(smooth, train={"accumulation": count}), tmp_path / str(count)))
        for count in (1, 4)
    )
    for name, value in whole[1].items():
        np.testing.assert_allclose(parts[1][name], value, rtol=1e-5, err_msg=name)
    states = [replace(state, tables=state.tables[1].unpack()) for state in (whole[0], parts[0])]
    for (path, a), b in zip(
        jax.tree.leaves_with_path(states[0]), jax.tree.leaves(states[1]), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.usefixtures("one_device")
def test_experts_are_balanced_by_the_loads_of_all_micro_batches(
    tiny: Config, tmp_path: Path
) -> None:
    """Also the step of all parts of the paper's backbone, with Muon."""
    config = vary(with_backbone(tiny, layers=1), train={"accumulation": 2})
    run = Run.start(config, tmp_path / "run")
    program = run.program

    def take_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any], Any]:
        read = program.read_rows(state.weights, batch.plan, row_adam)
        loss, gradients, report = forward_backward(program, state.weights, read, batch)
        after, norms = apply_updates(program, state, read, batch, gradients, report.loads, row_adam)
        metrics = step_metrics(state, batch, loss, jnp.ones(()), norms, report)
        return after, metrics, report.loads[0]

    with program.use_mesh():
        state, batch, row_adam = program.initial_state(), first_batch(run), program.row_adam
        bias = np.linspace(-0.1, 0.1, 5, dtype=np.float32)
        state = replace(state, expert_bias={0: jax.device_put(bias, state.step.sharding)})
        after, metrics, load = jax.device_get(jax.jit(take_step)(state, batch))
    data, experts = config.data, config.model.experts
    assert load.sum() == data.batch_size * data.sequence_length * experts.active
    step = experts.balance_rate * np.sign(load.mean() - load)
    assert np.any(step > 0) and np.any(step < 0)
    np.testing.assert_allclose(after.expert_bias[0], bias + step, rtol=1e-6)
    for name in ("expert_load_worst", "expert_load_mean"):  # of one layer
        np.testing.assert_allclose(metrics[name], load.max() / load.mean(), rtol=1e-6)
    assert 0 < metrics["mixing_error"] < 1e-3
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(after.params))


@pytest.mark.usefixtures("one_device")
def test_clipping_scales_parameters_and_merged_rows_by_their_common_norm(
    smooth: Config, tmp_path: Path
) -> None:
    """The first moments after one step are the clipped gradient times 1 − b1."""

    def moments(clip_norm: float) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        config = vary(smooth, optimizer={"clip_norm": clip_norm})
        run = Run.start(config, tmp_path / str(clip_norm))
        # Small rows with a large projection, so that gradients of rows and parameters are similar.
        state = run.program.initial_state()
        engram, table = state.params["blocks"][1]["engram"], state.tables[1]
        engram["value"] = engram["value"] * 100
        state.tables[1] = scale_rows(table, 1e-3)
        state, metrics = one_step(run, state)
        mean = {"rows": state.tables[1].unpack().mean, "dense": state.optimizer[0].mu}
        gradients = {
            name: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) / 0.1
            for name, tree in mean.items()
        }
        return gradients, metrics

    free, metrics = moments(1e6)
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in free.values()))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["row_gradient_norm"], np.linalg.norm(free["rows"].astype(np.float64)), rtol=1e-5
    )
    assert 0.05 < metrics["row_gradient_norm"] / norm < 0.95  # both parts matter
    clipped, clipped_metrics = moments(norm / 7)
    assert clipped_metrics["gradient_norm"] == metrics["gradient_norm"]
    for name, gradient in free.items():
        np.testing.assert_allclose(clipped[name], gradient / 7, rtol=1e-4, atol=1e-8)


@pytest.mark.usefixtures("one_device")
def test_a_batch_without_targets_has_no_loss_and_no_gradient(tiny: Config, tmp_path: Path) -> None:
    run = Run.start(tiny, tmp_path / "run")
    batch = first_batch(run)
    batch = batch._replace(target_mask=0 * batch.target_mask)
    with run.program.use_mesh():
        state = run.program.initial_state()
        state, metrics = make_train_step(run.program)(state, batch, run.program.row_adam)
    assert metrics["loss"] == metrics["gradient_norm"] == 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


@pytest.mark.usefixtures("one_device")
def test_a_step_writes_only_the_rows_that_its_tokens_hash_to(
    smooth: Config, tmp_path: Path
) -> None:
    run = Run.start(smooth, tmp_path / "run")
    batch = first_batch(run)
    before = run.program.initial_state().tables[1].unpack()
    after = one_step(run)[0].tables[1].unpack()
    tokens, segments = np.asarray(batch.tokens), np.asarray(batch.segments)
    numbers = np.unique(run.program.ngram_hash.hash_tokens(1, tokens, segments))
    touched = np.sort(stored_places(numbers, len(before.clock)))
    idle = np.setdiff1d(np.arange(len(before.clock)), touched)
    for old, new in zip(before, after, strict=True):
        assert np.asarray(old)[idle].tobytes() == np.asarray(new)[idle].tobytes()
    np.testing.assert_array_equal(np.flatnonzero(after.clock), touched)


@pytest.mark.parametrize(
    "mesh", ["one device", pytest.param("eight devices", marks=pytest.mark.slow)]
)
def test_a_step_costs_the_same_whatever_the_tables_size(
    tiny: Config, tmp_path: Path, mesh: str, request: pytest.FixtureRequest
) -> None:
    """Donated tables are updated in place: no temporary grows with their rows."""
    if mesh == "one device":
        request.getfixturevalue("one_device")

    def compile_step(rows: int) -> tuple[int, int, int]:
        memory = {"layers": (0,), "rows_per_head": (rows, rows)}
        run = Run.start(vary(tiny, model={"layers": 1}, memory=memory), tmp_path / str(rows))
        with run.program.use_mesh():
            compiled = (
                make_train_step(run.program)
                .lower(run.program.abstract_state(), first_batch(run), run.program.row_adam)
                .compile()
            )
        found = compiled.memory_analysis()
        table = run.program.ngram_hash.padded_rows[0] * run.config.memory.layout.words * 4
        return found.temp_size_in_bytes, found.alias_size_in_bytes, table // run.program.mesh.size

    small, large = compile_step(500), compile_step(40_000)
    assert large[0] <= small[0] * 1.01
    assert large[1] - small[1] == large[2] - small[2]  # the tables are aliased completely


@pytest.mark.usefixtures("one_device")
def test_the_z_loss_is_minimized_and_not_reported(tiny: Config, tmp_path: Path) -> None:
    """Its gradient is that of the mean of (log Σ exp(logits))² over all targets of the step."""
    config = vary(tiny, memory={"layers": ()}, model={"layers": 1}, train={"accumulation": 2})
    run = Run.start(config, tmp_path)
    program, batch = run.program, first_batch(run)
    assert not np.all(batch.target_mask)

    def mean_square(params: Any) -> jax.Array:
        total = jnp.zeros(())
        for number in range(2):
            micro_batch = jax.tree.map(lambda array: array[number], micro_batches(batch))  # noqa: B023
            hidden, head, _ = program.forward(params, {}, micro_batch, {})
            log_normalizer = jax.nn.logsumexp(compute_logits(hidden, head), axis=-1)
            total += jnp.sum(log_normalizer**2 * micro_batch.batch.target_mask)
        return total / batch.target_mask.sum()

    with program.use_mesh():
        weights = program.initial_state().weights
        weights = replace(weights, params=enliven(weights.params, seed=3))
        found = []
        for weight in (0.0, 0.1):
            changed = replace(program, config=vary(config, optimizer={"z_loss": weight}))
            differentiate = jax.jit(partial(forward_backward, changed))
            found.append(differentiate(weights, {}, batch)[:2])
        expected = jax.jit(jax.grad(mean_square))(weights.params)
    (loss, plain), (other_loss, gradients) = found
    assert loss == other_loss
    for without, change, with_it in zip(
        *(jax.tree.leaves(tree) for tree in (plain.params, expected, gradients.params)), strict=True
    ):
        np.testing.assert_allclose(with_it - without, 0.1 * change, rtol=1e-3, atol=1e-5)
