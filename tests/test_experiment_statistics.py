"""What is made of the records of experiments: tables, slopes, differences, recall of facts."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from experiment_records import record
from matplotlib.figure import Figure

from engram_jax.data.token_cache import build_corpus
from engram_jax.errors import InputError
from engram_jax.evaluation.held_out import DocumentSums, _summarize
from engram_jax.tokenizer import load_tokenizer
from experiments import facts, memory_law, where_it_helps
from experiments.results import Results
from experiments.sweep import Task
from experiments.token_classes import CLASSES, classify


def test_the_table_has_paired_differences_and_their_standard_errors():
    losses = {"twin": (5.0, 5.2, 5.4), "memory": (4.9, 5.0, 5.1)}
    records = [
        record(label, seed, loss) for label, of in losses.items() for seed, loss in enumerate(of)
    ]
    health = {"1": {"open": 0.5, "closed": 0.25, "strength": 0.125}}
    records[3] |= {"dropped": 0.3, "health": health}
    records[4] |= {"dropped": 0.4, "health": health}
    records[5] |= {"dropped": 0.5, "health": health}
    _, _, twin, memory, *_ = Results(tuple(records)).table("twin").splitlines()
    assert twin == ("| twin | 3 | 500 | 2.00 M | 5.2000 ± 0.1155 |  |  |  |  | 1,000 |")
    # Differences −0.1, −0.2, −0.3: standard deviation 0.1, over √3.
    assert memory == (
        "| memory | 3 | 500 | 2.00 M | 5.0000 ± 0.0577 | -0.2000 ± 0.0577 | +0.4000 ± 0.0577 "
        "| 50.0%, 25.0% | 0.125 | 1,000 |"
    )


def test_only_common_seeds_are_compared_and_a_label_and_seed_are_there_once(tmp_path):
    results = Results(())
    for label, seed, loss in (("b", 1, 3.0), ("a", 1, 1.0), ("b", 0, 2.0), ("b", 1, 4.0)):
        results = results.add(record(label, seed, loss), ["a", "b"])
    results.write(tmp_path / "r.json")
    results = Results.read(tmp_path / "r.json")
    assert [(of["label"], of["seed"]) for of in results.records] == [("a", 1), ("b", 0), ("b", 1)]
    assert results.differences("b", "a", "loss", "prose").tolist() == [3.0]
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(InputError, match=r"r\.json holds no results"):
        Results.read(tmp_path / "r.json")


def test_the_line_through_losses_of_known_slopes():
    """Seeds have the slopes −0.3, −0.1 and −0.2, and another level each; one size is off."""
    sizes = np.array([1e3, 1e4, 1e5])
    levels, slopes = np.array([5.0, 7.0, 6.0]), np.array([-0.3, -0.1, -0.2])
    losses = levels + slopes * np.log10(sizes)[:, None]
    line = memory_law.fit_line(sizes, losses)
    np.testing.assert_allclose(line.slopes, slopes)
    np.testing.assert_allclose(line.means, losses.mean(axis=1))
    assert line.r_squared == pytest.approx(1)
    # Off the line by 0.1, −0.2, 0.1, which is orthogonal to the line: 0.06 of 0.06 + 0.08.
    line = memory_law.fit_line(sizes, losses + np.array([[0.1], [-0.2], [0.1]]))
    np.testing.assert_allclose(line.slopes, slopes)
    assert line.r_squared == pytest.approx(0.08 / 0.14)
    assert memory_law.fit_line(sizes[:2], losses[:2]) is None


def test_slopes_are_of_the_seeds_that_all_sizes_have():
    """Size 10⁵ lacks seed 0. Joined by position, seeds of other levels would be compared."""
    levels = {0: 5.0, 1: 7.0, 2: 6.0}
    records = [
        record(
            f"Engram, rows × {rows}",
            seed,
            levels[seed] - 0.2 * np.log10(rows),
            account={"rows": rows, "total": rows},
        )
        for rows in (1000, 10_000, 100_000)
        for seed in levels
        if (rows, seed) != (100_000, 0)
    ]
    remark = memory_law.draw(Results(tuple(records)), Figure())
    assert remark == (
        "- Engram: -0.2000 ± 0.0000 nats per decade of rows (mean ± standard error over 2 seeds), "
        "R² 1.000."
    )


def of_groups(label, seed, loss, tokens):
    """A record with the losses of one group, per token of each block."""
    sums = [mean * count for mean, count in zip(loss, tokens, strict=True)]
    return record(label, seed, 5.0, groups={"rare": {"loss": sums, "tokens": tokens}})


def test_a_group_is_compared_by_each_seeds_own_tokens():
    """Seed 1 has four times the tokens of seed 0 in this group, and the twin lacks seed 2."""
    records = (
        of_groups("no memory", 1, (4.0, 4.0), (400, 400)),
        of_groups("no memory", 0, (3.0, 3.0), (100, 100)),
        of_groups("Engram", 0, (2.0, 2.0), (100, 100)),
        of_groups("Engram", 1, (3.5, 3.5), (400, 400)),
        of_groups("Engram", 2, (9.0, 9.0), (100, 100)),
        record("no memory", 3, 5.0, groups={}),
    )
    found = where_it_helps.compare(Results(records), "rare")
    assert found.mean == pytest.approx((-1 - 0.5) / 2) and found.over_documents == 0
    assert found.over_seeds == pytest.approx(0.5 / 2)  # half of their distance
    assert (found.twin, found.tokens) == (3.5, 500)
    assert where_it_helps.compare(Results(records[:2]), "rare") is None
    assert where_it_helps.compare(Results(records), "never seen") is None


def test_the_error_over_documents_is_that_of_a_ratio():
    """As that of a held-out loss for one seed; noise of the seeds is averaged by block."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 9, 20).astype(float)
    losses = generator.normal(1, 1, 20) * tokens
    score = _summarize(DocumentSums(losses, tokens), 1.0)
    mean, error = where_it_helps.ratio_and_error(losses[None], tokens[None])
    assert (mean, error) == pytest.approx((score.loss, score.standard_error))
    # A second seed with other counts, and with the same losses or the opposite deviations.
    deviations = losses - mean * tokens
    both = np.stack([tokens, 3 * tokens])
    for second, expected in ((3 * losses, error), (3 * (mean * tokens - deviations), 0)):
        found = where_it_helps.ratio_and_error(np.stack([losses, second]), both)
        assert found == pytest.approx((mean, expected), abs=1e-12)


def test_facts_occur_as_often_as_they_say_and_are_not_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "FOLDER", tmp_path / "text")
    invented = facts.make_facts()
    assert len({fact.question for fact in invented}) == len(invented) == 4 * 67
    path = facts.write_texts(invented, held_out=0.05)
    corpus = build_corpus(path, load_tokenizer("default"), tmp_path / "cache", held_out=0.05)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert len(set(texts)) == len(texts)
    read = "\n".join(texts[number] for number in corpus.train.indices)
    assert all(read.count(fact.sentence()) == fact.times for fact in invented)
    assert len(corpus.held_out)


def test_wrong_answers_are_as_familiar_as_the_true_one():
    """They are true for facts of the same relation and frequency, and equally often choices."""
    invented = facts.make_facts()
    of_answer = {fact.answers[0]: fact for fact in invented}
    assert len(of_answer) == len(invented)
    for fact in invented:
        assert len(set(fact.answers)) == facts.CHOICES
        alike = [of_answer[answer] for answer in fact.answers]
        assert {other.times for other in alike} == {fact.times}
        assert len({other.question.split(" of ")[0] for other in alike}) == 1
    assert set(Counter(answer for fact in invented for answer in fact.answers).values()) == {10}


def test_the_key_depends_on_the_text_of_the_facts(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "FOLDER", tmp_path)
    monkeypatch.setattr(facts, "FACTS", 12)

    def keys():
        return [Task(arm, 0, 2).key(arm.config) for arm in facts.arms(lambda kind: tiny)]

    before = keys()
    assert keys() == before
    monkeypatch.setattr(facts, "_OPENINGS", facts._OPENINGS[1:])
    assert not set(keys()) & set(before)


def test_the_error_of_a_recall_is_over_seeds_and_over_facts():
    """Two seeds that recall the same facts have no error over seeds."""
    same = np.array([[1, 1, 0, 0], [1, 1, 0, 0.0]])
    assert facts.share_and_error(same[:1]) == pytest.approx((0.5, np.sqrt(1 / 3) / 2))
    assert facts.share_and_error(same) == pytest.approx((0.5, np.sqrt(1 / 3) / 2))
    # By fact 1, 0.5, 0.5, 0.5: standard deviation 0.25; by seed 0.75, 0.5: 0.177.
    found = facts.share_and_error(np.array([[1, 1, 1, 0], [1, 0, 0, 1.0]]))
    assert found == pytest.approx((0.625, np.hypot(0.25 / 2, 0.125)))


def test_occurrences_that_were_read_are_shown():
    """The choice of rows is random, so a fact does not occur exactly as often as in the text."""

    def of_facts(label, read):
        recalled = {str(number): [1, 0] for number in facts.TIMES}
        occurrences = {str(number): number * read for number in facts.TIMES}
        return record(label, 0, 5.0, recall=recalled, occurrences=occurrences)

    results = Results((of_facts("no memory", 0.5),))
    lines = facts.draw(results, Figure()).splitlines()
    assert "no memory | 0.00 | 0.50 | 2.00 | 8.00 |" in lines[2]
    assert lines[3].startswith("| no memory | 0.500 ± 0.500 |")


def test_classes_of_tokens():
    text = "The city of New York has 1,200 parks; the New City, in York."
    texts = re.findall(r" ?\w+|[^\w ]", text)
    named = dict(enumerate(CLASSES[kind] for kind in classify(texts)))
    expected = {
        "The": "function word",
        " city": "first mention",
        " New": "first mention",
        " York": "inside a name",
        " 1": "number",
        ",": "number",  # of 1,200
        " parks": "first mention",
        ";": "punctuation",
    }
    for token, kind in expected.items():
        assert named[texts.index(token)] == kind, token
    assert [named[place] for place in (-4 + len(texts), -2 + len(texts))] == [
        "punctuation",
        "repeated in context",
    ]
    assert named[len(texts) - 6] == "repeated in context"  # New, after "the"
    assert named[len(texts) - 5] == "inside a name"  # City
