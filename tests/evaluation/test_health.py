"""The health of a memory: shares of gates, and the size of what it adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.evaluation.health import HealthStudy, format_health, warn_of_inert
from engram_jax.evaluation.held_out import ScoredBatch, evaluate_held_out, make_scorer
from engram_jax.layers.engram import inspect_health


def test_shares_of_gates_and_relative_size_of_the_output():
    hidden, added = jax.random.normal(jax.random.key(0), (2, 3, 5, 2, 4))
    gates = np.full((3, 5, 2), 0.5, np.float32)
    gates[0, :, 0], gates[1, 0, 0] = 0.96, 0.04
    mask = np.ones((3, 5), bool)
    health = inspect_health(hidden, added, jnp.asarray(gates), jnp.asarray(mask))
    assert int(health.tokens) == 15
    assert float(health.open) == pytest.approx(5 / 30)
    assert float(health.closed) == pytest.approx(1 / 30)
    expected = np.sqrt(np.mean(np.square(added)) / np.mean(np.square(hidden)))
    assert float(health.strength) == pytest.approx(expected, rel=1e-5)


def test_padding_and_small_batches_have_their_weight():
    """The last batch has three tokens, the others are padding with open gates."""
    hidden, added = jax.random.normal(jax.random.key(0), (2, 6, 5, 2, 4))
    gates = jax.random.uniform(jax.random.key(1), (6, 5, 2))
    mask = np.arange(30).reshape(6, 5) < 18
    study = HealthStudy()
    for half in (slice(0, 3), slice(3, 6)):
        padded = jnp.where(mask[half, :, None], gates[half], 1.0)
        health = inspect_health(hidden[half], added[half], padded, jnp.asarray(mask[half]))
        study(ScoredBatch("", None, None, None, {}, {1: health}))
    found, values = study.report()[1], np.asarray(gates)[mask]
    assert found["open"] == pytest.approx(np.mean(values > 0.95), abs=1e-6)
    assert found["closed"] == pytest.approx(np.mean(values < 0.05), abs=1e-6)
    squares = [np.mean(np.square(np.asarray(part)[mask])) for part in (added, hidden)]
    assert found["strength"] == pytest.approx(np.sqrt(squares[0] / squares[1]), rel=1e-5)


def test_an_evaluation_reports_the_gates_of_all_its_tokens(run, weights, in_mesh):
    study, gates = HealthStudy(), []

    def watch(scored):
        study(scored)
        gates.append(scored.gates[1][scored.rows.segments > 0].ravel())

    scorer = make_scorer(run.program)
    evaluate_held_out(run.program, scorer, weights, run.corpora(), watch=watch, with_gates=True)
    gates = np.concatenate(gates)
    found = study.report()[1]
    assert found["open"] == pytest.approx(np.mean(gates > 0.95), abs=1e-6)
    assert found["closed"] == pytest.approx(np.mean(gates < 0.05), abs=1e-6)
    assert found["strength"] > 0


def test_a_memory_that_adds_almost_nothing_is_warned_of():
    study = HealthStudy()
    hidden, gates = jnp.ones((1, 1, 1, 4)), jnp.full((1, 1, 1), 0.997)
    inert = inspect_health(hidden, 0.004 * hidden, gates, jnp.ones((1, 1), bool))
    alive = inert._replace(added=0.3**2)
    study(ScoredBatch("", None, None, None, {}, {1: inert, 4: alive}))
    [warning] = warn_of_inert(study.report())
    assert "layer 1 is inert" in warning and "0.4%" in warning
    assert f"Warning: {warning}" in format_health(study.report())
