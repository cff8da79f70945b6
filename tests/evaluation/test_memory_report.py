"""Statistics of the memory, compared with manual counts."""

from collections import Counter, defaultdict
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from tiny_runs import vary

from engram_jax.data.pipeline import mix_rows
from engram_jax.evaluation import memory_report
from engram_jax.evaluation.held_out import ScoredBatch, make_scorer
from engram_jax.evaluation.memory_report import (
    MemoryReport,
    MemoryStudy,
    format_memory,
    memory_json,
    write_memory_png,
)
from engram_jax.evaluation.report import POOLED, SourceReport, evaluate
from engram_jax.run import Run


class Evaluated(NamedTuple):
    run: Run
    report: MemoryReport
    scores: dict[str, SourceReport]
    batches: dict[str, list[ScoredBatch]]


@pytest.fixture(scope="module")
def evaluated(trained) -> Evaluated:
    """A run of six steps, read on one device, and every batch that was scored."""
    run = Run.open(trained.folder)
    weights, batches = run.restore_weights(), defaultdict(list)
    study = MemoryStudy(run, weights)

    def watch(suppressed, scored):
        study(suppressed, scored)
        batches[suppressed].append(scored)

    scores = evaluate(
        run.program,
        make_scorer(run.program),
        weights,
        run.corpora(),
        max_tokens=200,
        watch=watch,
        with_gates=True,
    )
    return Evaluated(run, study.report(), scores, batches)


def spell(run, tokens, segments, order) -> list[tuple[int, ...]]:
    """The n-gram at every position: ids of its document and row, latest first."""
    lookup, ngrams = run.program.ngram_hash.projection.lookup, []
    for row, documents in zip(tokens, segments, strict=True):
        for end in range(len(row)):
            places = range(end, max(end - order, -1), -1)
            ngrams.append(
                tuple(int(lookup[row[p]]) for p in places if documents[p] == documents[end])
            )
    return ngrams


@pytest.fixture(scope="module")
def read(evaluated):
    """Tokens and segments of the 48 rows that training read."""
    run = evaluated.run
    config = run.config
    rows = mix_rows(run.corpora(), (), config.data.sequence_length, config.train.seed)
    read = rows.rows(np.arange(6 * 8))
    return read.tokens, read.segments


def test_tables_hold_the_rows_of_the_text_that_was_read(evaluated, read):
    run, report = evaluated.run, evaluated.report
    assert report.tokens_read == report.tokens_counted == 6 * 8 * 24
    rows = run.program.ngram_hash.hash_tokens(1, *read)
    assert [table.order for table in report.tables] == [2, 3]
    for table in report.tables:
        columns = range((table.order - 2) * 2, (table.order - 1) * 2)
        for column, size, share in zip(columns, table.rows, table.occupancy, strict=True):
            assert share == len(np.unique(rows[..., column])) / size
        assert table.ngrams == len(set(spell(run, *read, table.order)))
        assert table.expected_occupancy == pytest.approx(np.mean(table.occupancy), rel=0.1)
        assert table.full_collisions == 0  # expected: 0.1 of them
        # The first 16 batches of 8 rows, which are more than training used.
        data = run.config.data
        more = mix_rows(run.corpora(), (), data.sequence_length, run.config.train.seed)
        ngrams, distinct = [], []
        for start in range(0, 16 * 8, 8):
            batch = more.rows(np.arange(start, start + 8))
            ngrams.append(len(set(spell(run, batch.tokens, batch.segments, table.order))))
            hashed = run.program.ngram_hash.hash_tokens(1, batch.tokens, batch.segments)
            distinct.append(len(np.unique(hashed[..., columns])))
        assert table.ngrams_per_batch == np.mean(ngrams)
        assert table.rows_per_batch == np.mean(distinct)


def test_tokens_fall_into_the_bins_of_their_ngrams(evaluated, read):
    run, batches = evaluated.run, evaluated.batches
    assert set(batches) == {"nothing", "output", "rows"}
    assert [of_order.order for of_order in evaluated.report.frequencies] == [2, 3]
    for of_order in evaluated.report.frequencies:
        times = Counter(spell(run, *read, of_order.order))
        found, documents = defaultdict(list), defaultdict(list)
        for whole, without in zip(batches["nothing"], batches["output"], strict=True):
            ngrams = spell(run, whole.rows.tokens, whole.rows.segments, of_order.order)
            gates = whole.gates[1].mean(-1)
            values = np.stack([gates, whole.losses, without.losses], axis=-1).reshape(-1, 3)
            numbers = whole.rows.documents.reshape(-1).tolist()
            for at in np.flatnonzero(whole.mask):
                number = times[ngrams[at]].bit_length()
                found[number].append(values[at])
                documents[number].append((whole.source, numbers[at]))
        assert len(found) > 3
        for number, least in enumerate(of_order.least):
            assert least == (0 if number == 0 else 2 ** (number - 1))
            values = np.array(found[number]).reshape(-1, 3)
            assert of_order.tokens[number] == len(values)
            if len(values):
                gate, loss, dropped = values.mean(axis=0)
                assert of_order.gates[1].mean[number] == pytest.approx(gate, rel=1e-5)
                assert of_order.loss.mean[number] == pytest.approx(loss, rel=1e-5)
                assert of_order.loss_dropped.mean[number] == pytest.approx(dropped, rel=1e-5)
                harm = of_order.harm.mean[number]
                assert harm == pytest.approx(dropped - loss, abs=1e-5)
                residuals = defaultdict(float)
                for document, value in zip(documents[number], values[:, 1] - loss, strict=True):
                    residuals[document] += value
                count = len(residuals)
                if count > 1:
                    error = np.linalg.norm(list(residuals.values())) / len(values)
                    assert of_order.loss.standard_error[number] == pytest.approx(
                        error * np.sqrt(count / (count - 1)), rel=1e-4
                    )


def test_bins_together_are_the_whole_text(evaluated):
    pooled = evaluated.scores[POOLED]
    for of_order in evaluated.report.frequencies:
        tokens = of_order.tokens
        assert tokens.sum() == pooled.score.tokens == 400
        harm = np.nansum(of_order.harm.mean * tokens) / 400
        assert harm == pytest.approx(pooled.ablations["output"].harm.loss, abs=1e-6)
        assert np.nansum(of_order.loss.mean * tokens) / 400 == pytest.approx(pooled.score.loss)


def test_a_long_training_is_counted_in_part(evaluated, monkeypatch):
    run = evaluated.run
    monkeypatch.setattr(memory_report, "MOST_TOKENS", 250)
    study = MemoryStudy(run, run.restore_weights())
    for batch in evaluated.batches["nothing"]:
        study("nothing", batch)
        study("output", batch)
    report = study.report()
    assert (report.tokens_read, report.tokens_counted) == (1152, 240)
    assert [table.expected_occupancy for table in report.tables] == [None, None]
    assert "the first 240 of 1,152 training tokens" in format_memory(report)


def test_frozen_tables_are_expected_to_hold_nothing(evaluated):
    run = evaluated.run
    config = vary(run.config, memory={"frozen": True})
    frozen = replace(run, program=replace(run.program, config=config))
    [report, _] = MemoryStudy(frozen, run.restore_weights())._tables
    assert report.ngrams and report.expected_occupancy is None


def test_before_the_first_step_nothing_was_met(evaluated, tmp_path):
    run = evaluated.run
    study = MemoryStudy(run, replace(run.restore_weights(), step=jnp.int32(0)))
    for suppressed, batches in evaluated.batches.items():
        for batch in batches:
            study(suppressed, batch)
    report = study.report()
    assert [of_order.tokens.tolist() for of_order in report.frequencies] == [[400], [400]]
    assert report.tables[0].ngrams == 0 and report.tables[0].expected_occupancy == 0
    assert "0 training tokens" in format_memory(report)
    write_memory_png(report, tmp_path / "memory.png")


def test_table_and_json_hold_the_figures(evaluated):
    report = evaluated.report
    printed = format_memory(report)
    assert max(map(len, printed.splitlines())) <= 100
    longest = report.frequencies[-1]
    assert f"{longest.gates[1].mean[0]:.3f} ± {longest.gates[1].standard_error[0]:.3f}" in printed
    assert f"{np.mean(report.tables[0].occupancy):.1%}" in printed
    plain = memory_json(report)
    assert plain["tables"][1]["occupancy"] == report.tables[1].occupancy
    for of_order, figures in zip(report.frequencies, plain["frequencies"], strict=True):
        assert figures["tokens"] == of_order.tokens.tolist()
        errors = figures["gates"]["1"]["standard_error"]
        assert [error is None for error in errors] == np.isnan(
            of_order.gates[1].standard_error
        ).tolist()


def test_picture_is_as_wide_as_a_page_and_colored(evaluated, tmp_path):
    report = evaluated.report
    without_gates = replace(
        report, frequencies=[replace(part, gates={}) for part in report.frequencies]
    )
    for name, drawn, panels in (("three", report, 3), ("two", without_gates, 2)):
        write_memory_png(drawn, tmp_path / f"{name}.png")
        picture = matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3]
        assert picture.shape[1] == 1600
        np.testing.assert_array_equal(picture[:, [0, -1]], 1)
        red = (picture[..., 0] > 0.9) & (picture[..., 1] < 0.4)
        thirds = np.array_split(red, panels, axis=1)
        assert all(third.any() for third in thirds)
