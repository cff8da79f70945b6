"""Log-likelihoods of continuations are those of plain passes and of the evaluation."""

from copy import copy
from dataclasses import replace

import jax
import numpy as np
import pytest
from plainly import score_plainly
from tiny_runs import plain_pass

from engram_jax.data.packing import pack_held_out
from engram_jax.decoding.generate import Generator
from engram_jax.decoding.programs import ProgramCache
from engram_jax.decoding.score import Likelihood, TextScorer
from engram_jax.decoding.settings import GenerationSettings
from engram_jax.errors import InputError
from engram_jax.evaluation.held_out import make_scorer
from engram_jax.run import Run

PAIRS = [
    ("Alexander the", " Great was born"),
    ("", "Wales and café"),
    ("in", " Wales"),
    ("born in Wales and on", ""),
    ("the Gr", "eat was"),  # a token has characters of both
    ("東京 ", "on the"),
]


@pytest.fixture(scope="module")
def scored(untrained):
    run = Run.open(untrained("engram").folder)
    weights = run.restore_weights()
    return run, weights, TextScorer(Generator(run.program, run.tokenizer, weights))


def test_likelihoods_are_those_of_plain_passes(scored) -> None:
    run, weights, scorer = scored
    decode = plain_pass(run, weights)
    for pair, found in zip(PAIRS, scorer.score(PAIRS), strict=True):
        expected = score_plainly(run, decode, *pair)
        assert (found.tokens, found.is_greedy) == (expected.tokens, expected.is_greedy)
        assert found.log_probability == pytest.approx(expected.log_probability, abs=1e-4)


def test_nothing_has_likelihood_one(scored) -> None:
    """Also if no context has a token."""
    nothing = Likelihood(0.0, 0, True)
    assert scored[2].score([("", ""), ("born in Wales and on", "")]) == [nothing] * 2
    assert scored[2].score([("", ""), PAIRS[0]])[0] == nothing
    assert scored[2].score([]) == []
    assert scored[2].score([("", "")], ends=True)[0].tokens == 1


def test_scoring_compiles_only_what_it_runs(untrained) -> None:
    run = Run.open(untrained("engram").folder)
    generator = Generator(run.program, run.tokenizer, run.restore_weights())
    generator.programs = ProgramCache(run.program)
    TextScorer(generator).score(PAIRS)
    assert [key[0] for key in generator.programs._compiled] == ["an empty state"]


def test_logits_that_are_not_finite_are_refused(scored) -> None:
    run, weights, scorer = scored
    norm = jax.tree.map(lambda leaf: np.nan * leaf, weights.params["norm"])
    bad = replace(weights, params=weights.params | {"norm": norm})
    broken = copy(scorer)
    broken.generator = Generator(run.program, run.tokenizer, bad)
    with pytest.raises(InputError, match="The logits of text 2 are not finite"):
        broken.score([("the", ""), ("the", " Great")])


def test_a_greedy_continuation_is_known_as_one(scored) -> None:
    run, _, scorer = scored
    settings = GenerationSettings(tokens=5, temperature=0.0)
    prompts = ["the", "in", "Alexander", "on", "born", "Great", "was", ""]
    same = 0
    for prompt, greedy in zip(prompts, scorer.generator.generate(prompts, settings), strict=True):
        before, whole = (
            run.tokenizer.encode(text).tolist() for text in (prompt, prompt + greedy.text)
        )
        if whole == before + greedy.tokens:  # otherwise the text has another, likelier spelling
            same += 1
            first, second = scorer.score([(prompt, greedy.text), (prompt, greedy.text + " the")])
            assert first.is_greedy and not second.is_greedy
            expected = sum(greedy.log_probabilities)
            assert first.log_probability == pytest.approx(expected, abs=1e-3)
    assert same


def test_documents_have_the_losses_of_the_evaluation(scored) -> None:
    """Documents that are alone in their rows, with their ends."""
    run, weights, scorer = scored
    view = run.corpora()[0].held_out
    short = [n for n in range(len(view)) if len(view.tokens(n)) <= 24]
    assert len(short) > 1
    texts = [run.tokenizer.decode(view.tokens(n)[1:-1]) for n in short]
    program, score = run.program, make_scorer(run.program)
    planner = program.planner()
    for text, found in zip(
        texts, scorer.score([("", text) for text in texts], ends=True), strict=True
    ):
        ids = [run.tokenizer.bos_id, *run.tokenizer.encode(text).tolist(), run.tokenizer.eos_id]
        packed = next(iter(pack_held_out(view, 24, 1))).map(lambda field: field[None].copy())
        packed.tokens[:], packed.segments[:], packed.positions[:] = 0, 0, np.arange(24)
        packed.tokens[0, 0, : len(ids)] = ids
        packed.segments[0, 0, : len(ids)] = 1
        packed.targets[0, 0, : len(ids) - 1] = ids[1:]
        batch = packed._replace(documents=None, plan=planner(packed.tokens, packed.segments))
        with program.use_mesh():
            losses, *_ = score(weights, program.put(batch), program.row_adam)
        expected = -np.asarray(losses)[0, 0, : len(ids) - 1].sum()
        assert found.tokens == len(ids) - 1
        assert found.log_probability == pytest.approx(expected, abs=1e-4 * len(ids))


def test_a_text_that_is_not_unicode_is_refused(scored) -> None:
    with pytest.raises(InputError, match="surrogate"):
        scored[2].score([("the", "\ud800")])
