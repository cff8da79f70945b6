"""The complete pipeline of decoding, from a checkpoint, for forms of the model.

Weights are prepared, n-grams hashed on the device, rows read without a plan, and the loop runs
inside `shard_map`; the plain pass does none of that.
"""

import numpy as np
import pytest
from plainly import continue_greedily, log_probabilities_of, score_plainly
from tiny_runs import plain_pass

from engram_jax.decoding.generate import Generator
from engram_jax.decoding.score import TextScorer
from engram_jax.decoding.settings import GenerationSettings
from engram_jax.run import Run

PROMPTS = ["Alexander the Great", "", "東京"]
PAIRS = [("Alexander the", " Great was born"), ("", "Wales and café"), ("the Gr", "eat was")]
# Others are parts of "several", or have tests in `test_generate`; of all forms of the network,
# `test_extend` compares the logits.
FORMS = (
    "several",
    *(pytest.param(form, marks=pytest.mark.slow) for form in ("frozen", "backbone")),
)


@pytest.fixture(scope="module", params=FORMS)
def generator(request, untrained):
    run = Run.open(untrained(request.param).folder)
    weights = run.restore_weights()
    generator = Generator(run.program, run.tokenizer, weights)
    return run, plain_pass(run, weights), generator


def test_greedy_texts_are_those_of_plain_passes(generator) -> None:
    run, decode, generator = generator
    settings = GenerationSettings(tokens=5, temperature=0.0)
    for prompt, found in zip(PROMPTS, generator.generate(PROMPTS, settings), strict=True):
        assert found.tokens == continue_greedily(run, decode, prompt, 5)
        expected = log_probabilities_of(run, decode, prompt, found.tokens)
        np.testing.assert_allclose(found.log_probabilities[: len(expected)], expected, atol=1e-4)


def test_likelihoods_are_those_of_plain_passes(generator) -> None:
    run, decode, generator = generator
    for pair, found in zip(PAIRS, TextScorer(generator).score(PAIRS), strict=True):
        expected = score_plainly(run, decode, *pair)
        assert (found.tokens, found.is_greedy) == (expected.tokens, expected.is_greedy)
        assert found.log_probability == pytest.approx(expected.log_probability, abs=2e-4)


@pytest.mark.slow
def test_bfloat16_is_near_the_plain_pass(untrained) -> None:
    """Computation and table are in bfloat16, so tokens can differ, but not their probabilities."""
    run = Run.open(untrained("bfloat16").folder)
    weights = run.restore_weights()
    generator, decode = Generator(run.program, run.tokenizer, weights), plain_pass(run, weights)
    settings = GenerationSettings(tokens=8, seed=1)
    errors = []
    for prompt, found in zip(PROMPTS, generator.generate(PROMPTS, settings), strict=True):
        expected = log_probabilities_of(run, decode, prompt, found.tokens)
        errors += list(found.log_probabilities[: len(expected)] - expected)
    for pair, found in zip(PAIRS, TextScorer(generator).score(PAIRS), strict=True):
        expected = score_plainly(run, decode, *pair)
        errors.append((found.log_probability - expected.log_probability) / found.tokens)
    assert 0 < np.sqrt(np.mean(np.square(errors))) < 0.02
