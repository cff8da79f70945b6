import math
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_runs import plain_pass, scale_rows

from engram_jax.evaluation import held_out
from engram_jax.evaluation.held_out import (
    DocumentSums,
    Score,
    ScoredBatch,
    difference,
    evaluate_held_out,
    make_scorer,
    pool,
)
from engram_jax.evaluation.report import POOLED, evaluate, format_report
from engram_jax.layers.engram import MemoryHealth
from engram_jax.run import Run
from engram_jax.sharding import MeshConfig


def score_of(losses, tokens) -> Score:
    """The score of documents with these sums, as a difference from zero losses."""
    losses, tokens = np.asarray(losses, float), np.asarray(tokens, float)
    whole = Score(0.0, None, 1, 1, 0.25, DocumentSums(losses, tokens))
    nothing = replace(whole, by_document=DocumentSums(0 * losses, tokens))
    return difference(whole, nothing)


def test_loss_is_that_of_a_plain_pass_over_every_row(run, weights):
    """Computed manually: rows of the concatenated documents, a plain pass, softmax in NumPy."""
    corpus = run.corpora()[0]
    documents = corpus.held_out
    with run.program.use_mesh():
        score = evaluate_held_out(run.program, make_scorer(run.program), weights, [corpus])["first"]

    stream = np.concatenate([documents.tokens(i) for i in range(len(documents))])
    document = np.repeat(np.arange(len(documents), dtype=np.int32), documents.lengths)
    decode = plain_pass(run, weights)
    losses, tokens = np.zeros(len(documents)), np.zeros(len(documents))
    length = run.config.data.sequence_length
    for start in range(0, len(stream) - 1, length):
        inputs, targets = stream[None, start : start + length], stream[start + 1 :][:length]
        inputs = inputs[:, : len(targets)]
        segments = document[None, start : start + len(targets)]
        begins = np.searchsorted(segments[0], segments[0])  # of every document in the row
        positions = (np.arange(len(targets)) - begins)[None].astype(np.int32)
        logits, _ = decode(inputs, segments, positions)
        logits = np.asarray(logits[0], np.float64)
        chosen = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), targets]
        scored = document[start + 1 :][:length] == segments[0]
        np.add.at(losses, segments[0][scored], chosen[scored])
        np.add.at(tokens, segments[0][scored], 1)
    np.testing.assert_array_equal(score.by_document.tokens, tokens)
    np.testing.assert_allclose(score.by_document.losses, losses, rtol=1e-5)
    assert score.loss == pytest.approx(losses.sum() / tokens.sum(), rel=1e-6)
    assert score.tokens == len(stream) - len(documents)
    texts = [run.tokenizer.decode(documents.tokens(i)) for i in range(len(documents))]
    nbytes = len("".join(texts).encode())
    assert score.bits_per_byte == pytest.approx(losses.sum() / math.log(2) / nbytes, rel=1e-6)


def test_neither_the_mesh_nor_the_batch_size_changes_a_score(trained):
    """One device, and eight that split parameters, tables and tokens."""
    scores = []
    for mesh, rows in ((None, 8), (MeshConfig(2, 4), 8), (None, 3)):
        run = Run.open(trained.folder, mesh, evaluate_batch_size=rows)
        weights = run.restore_weights()
        for split in (weights.tables[1].records, weights.params["blocks"][0]["feed_forward"]["up"]):
            assert split.addressable_shards[0].data.size < split.size or mesh is None
        batches: list[ScoredBatch] = []
        with run.program.use_mesh():
            found = evaluate_held_out(
                *(run.program, make_scorer(run.program), weights, run.corpora()),
                watch=batches.append,
            )
        assert {len(batch.losses) for batch in batches} == {rows}
        scores.append(found)
    for others in scores[1:]:
        for name, expected in scores[0].items():
            assert others[name].loss == pytest.approx(expected.loss, rel=1e-6)
            found, known = others[name].by_document, expected.by_document
            np.testing.assert_array_equal(found.tokens, known.tokens)
            np.testing.assert_allclose(found.losses, known.losses, rtol=1e-6)


@pytest.mark.usefixtures("in_mesh")
@pytest.mark.parametrize("with_gates", [False, True])
def test_gates_leave_the_devices_only_if_they_are_asked_for(run, weights, monkeypatch, with_gates):
    """Without them, a batch of 8 × 24 tokens sends its losses, and the health of one layer."""
    gathered = []

    def gather(tree, *, tiled):
        gathered.append(sum(leaf.size for leaf in jax.tree.leaves(tree)))
        return tree

    monkeypatch.setattr(held_out.multihost_utils, "process_allgather", gather)
    evaluate_held_out(
        run.program, make_scorer(run.program), weights, run.corpora(), with_gates=with_gates
    )
    assert set(gathered) == {8 * 24 * (2 if with_gates else 1) + len(MemoryHealth._fields)}


def test_standard_error_agrees_with_a_bootstrap_over_documents():
    generator = np.random.default_rng(0)
    tokens = generator.integers(20, 400, 300)
    losses = tokens * generator.normal(4, 0.8, 300)
    draws = generator.integers(0, 300, (4000, 300))
    means = losses[draws].sum(1) / tokens[draws].sum(1)
    # With 4,000 resamples, the standard deviation has a relative error of 1/√8000 = 1.1 %.
    assert score_of(losses, tokens).standard_error == pytest.approx(means.std(), rel=0.05)


def test_paired_differences_know_more_than_two_errors():
    generator = np.random.default_rng(1)
    tokens = generator.integers(20, 400, 200)
    hardness = tokens * generator.normal(4, 1, 200)
    one = score_of(hardness + 0.1 * tokens + generator.normal(0, 0.5, 200), tokens)
    other = score_of(hardness, tokens)
    paired = difference(one, other)
    assert paired.loss == pytest.approx(one.loss - other.loss)
    assert paired.standard_error < 0.05 * one.standard_error
    assert abs(paired.loss - 0.1) < 5 * paired.standard_error


def test_differences_need_the_same_tokens():
    with pytest.raises(ValueError, match="same documents"):
        difference(score_of([1.0, 2.0], [1, 2]), score_of([1.0, 2.0], [2, 2]))


def test_one_document_has_no_standard_error():
    alone = score_of([8.0, 0.0], [4, 0])
    assert (alone.loss, alone.standard_error, alone.documents) == (2.0, None, 1)
    assert pool([alone, score_of([1.0, 2.0], [1, 1])]).standard_error is None


def test_pooling_weighs_by_tokens():
    one, other = score_of([10.0, 30.0], [10, 10]), score_of([4.0, 4.0], [4, 2])
    pooled = pool([one, other])
    assert pooled.loss == pytest.approx(48 / 26)
    assert pooled.standard_error == pytest.approx(
        math.hypot(20 * one.standard_error, 6 * other.standard_error) / 26
    )
    # Both have four bytes per token.
    assert pooled.bits_per_byte == pytest.approx(48 / 26 / 4 / math.log(2))


@pytest.mark.usefixtures("in_mesh")
def test_dropped_output_is_the_backbone_alone(run, weights):
    """A model without Engram parameters and rows has the same score as with suppressed output."""
    scores = evaluate_held_out(
        run.program, make_scorer(run.program, "output"), weights, run.corpora()
    )
    other_tables = {1: scale_rows(weights.tables[1], 7)}
    params = jax.tree.map(lambda leaf: leaf, weights.params)
    engram = params["blocks"][1]["engram"]
    params["blocks"][1]["engram"] = jax.tree.map(lambda leaf: leaf + 1, engram)
    changed = replace(weights, params=params, tables=other_tables)
    assert (
        evaluate_held_out(run.program, make_scorer(run.program, "output"), changed, run.corpora())
        == scores
    )
    whole = make_scorer(run.program)
    assert evaluate_held_out(run.program, whole, changed, run.corpora()) != scores


@pytest.mark.usefixtures("in_mesh")
def test_zeroed_rows_equal_rows_of_zeros(run, weights):
    zeros = replace(weights, tables={1: scale_rows(weights.tables[1], 0)})
    suppressed = evaluate_held_out(
        run.program, make_scorer(run.program, "rows"), weights, run.corpora()
    )
    assert suppressed == evaluate_held_out(
        run.program, make_scorer(run.program), zeros, run.corpora()
    )
    assert suppressed != evaluate_held_out(
        run.program, make_scorer(run.program), weights, run.corpora()
    )


def test_evaluating_changes_nothing(run, weights):
    before = jax.device_get(weights)
    first = evaluate(run.program, make_scorer(run.program), weights, run.corpora())
    second = evaluate(run.program, make_scorer(run.program), weights, run.corpora())
    assert first == second
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(weights))


@pytest.mark.usefixtures("in_mesh")
@pytest.mark.parametrize("max_tokens", [1, 70, 8 * 24 + 5])
def test_fewer_tokens_are_a_random_sample_of_the_documents(run, weights, max_tokens):
    corpora, scorer = run.corpora(), make_scorer(run.program)
    whole = evaluate_held_out(run.program, scorer, weights, corpora)
    batches: list[ScoredBatch] = []
    part = evaluate_held_out(
        run.program, scorer, weights, corpora, max_tokens=max_tokens, watch=batches.append
    )
    assert sum(batch.mask.sum() for batch in batches) == max_tokens * len(part)
    for name, score in part.items():
        losses = [np.sum(seen.losses * seen.mask) for seen in batches if seen.source == name]
        assert sum(losses) == pytest.approx(score.loss * max_tokens, rel=1e-5)
    for name, score in part.items():
        assert score.tokens == max_tokens < whole[name].tokens
        (corpus,) = (corpus for corpus in corpora if corpus.name == name)
        order = np.argsort(corpus.hashes[corpus.held_out.indices])
        ends = np.cumsum(corpus.held_out.lengths[order] - 1)  # no bos is a target
        expected = np.diff(np.minimum(ends, max_tokens), prepend=0)
        np.testing.assert_array_equal(score.by_document.tokens, expected)
        assert len(order) < 3 or not np.array_equal(order, np.sort(order))


def test_report_prints_every_figure(run, weights):
    report = evaluate(run.program, make_scorer(run.program), weights, run.corpora())
    table = format_report(report)
    for name in ("first", "second", POOLED):
        rows = [line for line in table.splitlines() if line.startswith(f"{name} ")]
        assert len(rows) == 2
        of_source = report[name]
        assert f"{of_source.score.loss:.3f} ± {of_source.score.standard_error:.3f}" in rows[0]
        for ablation in of_source.ablations.values():
            assert f"{ablation.harm.loss:+.3f}" in rows[1]
            assert ablation.harm.loss == pytest.approx(
                ablation.score.loss - of_source.score.loss, abs=1e-6
            )
    assert max(map(len, table.splitlines())) <= 100
