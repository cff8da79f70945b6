"""Tasks of lm-evaluation-harness: the shipped ones, the model that answers, and eval.py --tasks."""

import json
import socket
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from zlib import crc32

import jax
import numpy as np
import pytest
from tiny_runs import plain_pass

from engram_jax.decoding.generate import Generator
from engram_jax.decoding.settings import GenerationSettings
from engram_jax.errors import InputError
from engram_jax.evaluation.tasks import documents
from engram_jax.run import Run

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval brings 41 packages, so dev does not contain it"
)
ignores_warnings = pytest.mark.filterwarnings("ignore")  # of other packages

TASK = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: " {{{{answer}}}}"
metric_list: [{{metric: perplexity}}]
"""


@pytest.fixture(scope="module")
def run(untrained) -> Run:
    return Run.open(untrained("engram").folder)


@pytest.fixture(scope="module")
def model(run, eval_program):
    from engram_jax.evaluation.harness import HarnessModel

    return HarnessModel(Generator(run.program, run.tokenizer, run.restore_weights()))


def request(*args: object) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def test_tasks_are_made_of_held_out_documents(run) -> None:
    view = run.corpora()[0].held_out
    expected = [run.tokenizer.decode(view.by_hash().tokens(n)[1:-1]) for n in range(len(view))]
    found = documents.held_out_texts(run.config.data.sources[0], share=0.5)
    assert found == expected and len(found) > 5


@pytest.mark.parametrize(
    ("name", "count", "checksum"),
    [("next_sentence", 173, 2655222918), ("names", 199, 1110606490), ("fields", 111, 3055205576)],
)
def test_shipped_examples_do_not_change(monkeypatch, name, count, checksum) -> None:
    """If this fails on purpose, raise the version in the task's YAML file."""
    monkeypatch.setattr(documents, "_dataset", lambda examples: examples)
    examples = getattr(documents, name)(version=1)
    for example in examples:
        assert len(example["context"]) <= documents.MOST_CHARACTERS
        if name == "next_sentence":
            assert len(set(example["sentences"])) == 4
    assert len(examples) == count
    assert crc32(json.dumps(examples, sort_keys=True).encode()) == checksum


@needs_harness
def test_rolling_likelihoods_are_those_of_training_rows(run, model) -> None:
    """Of rows of T = 24 inputs; the last one is moved back to have as many."""
    short, long = "Alexander the Great was born", "Wales and the Great café in Wales " * 6
    decode, expected = plain_pass(run, run.restore_weights()), []
    for text in (short, long):
        ids = [run.tokenizer.bos_id, *run.tokenizer.encode(text).tolist()]
        total, first = 0.0, 1  # the first target of a row
        while first < len(ids):
            begin = max(min(first - 1, len(ids) - 25), 0)
            row = np.zeros(25, np.int32)
            row[: len(ids[begin : begin + 25])] = ids[begin : begin + 25]
            positions = np.arange(24, dtype=np.int32)[None]
            logits, _ = decode(row[None, :24], np.ones_like(positions), positions)
            chances = jax.nn.log_softmax(logits[0, :, : run.tokenizer.vocab_size])
            last = min(begin + 25, len(ids))
            total += float(sum(chances[n - begin - 1, ids[n]] for n in range(first, last)))
            first = last
        expected.append(total)
    assert len(ids) > 2 * 25 and (len(ids) - 1) % 24
    found = model.loglikelihood_rolling([request(short), request(long), request("")])
    np.testing.assert_allclose(found, [*expected, 0.0], atol=1e-3)


@needs_harness
def test_pairs_have_the_likelihoods_of_the_scorer(model, capsys) -> None:
    """Also a continuation that has no token of its own."""
    pairs = [("the Gr", "eat was"), ("", "Wales"), ("in ", "Wales")]
    found = model.loglikelihood([request(*pair) for pair in pairs])
    assert not capsys.readouterr().err
    expected = model.scorer.score(pairs)
    assert found == [(of_one.log_probability, of_one.is_greedy) for of_one in expected]
    assert all(log_probability < -1 for log_probability, _ in found)
    model.loglikelihood([request("in Wales " * 20, "on")] * 4)
    assert "model was trained on rows of 24" in capsys.readouterr().err
    assert model.tok_encode("in", add_special_tokens=False) == model.tok_encode("in")[1:]


@needs_harness
def test_generation_follows_the_settings_of_each_request(model) -> None:
    greedy = {"until": [""], "max_gen_toks": 8}
    drawn = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 5, "top_k": 0, "top_p": 0.9}
    drawn["until"] = "the"
    prompts = ["born in", "the", "on", "in"]
    settings = GenerationSettings(tokens=8, temperature=0.0)
    first, last = model.generator.generate(prompts[::3], settings)
    settings = GenerationSettings(tokens=5, temperature=0.7, top_p=0.9, stop="the")
    inner = model.generator.generate(prompts[1:3], settings)
    every = greedy, drawn, drawn, greedy
    found = model.generate_until(list(map(request, prompts, every)))
    assert found == [first.text, *(of_one.text for of_one in inner), last.text]
    stop = first.text[3:6]
    found = model.generate_until(
        [request(prompt, greedy | {"until": stop}) for prompt in prompts[::3]]
    )
    assert found[0] == first.text[: first.text.index(stop)]
    with pytest.raises(InputError, match=r"generation_kwargs .* not valid .*top-p is 2"):
        model.generate_until([request("in", {"top_p": 2})])


@needs_harness
@ignores_warnings
def test_tasks_run_without_a_network(eval_program, run, model, tmp_path, capsys, monkeypatch):
    """All shipped ones, with few examples, and one of local files."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network, or processes that fork, are used")

    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE  # eval.py was imported before it
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("multiprocessing.Pool", refuse)
    read = documents.held_out_texts

    def read_few(source: str) -> list[str]:
        return read(source)[: 1 if source == "factbook" else 12]

    monkeypatch.setattr(documents, "held_out_texts", read_few)
    answers = {"Alexander the": "Great was", "in": "Wales", "born in": "Wales"}
    lines = [json.dumps({"context": c, "answer": a}) for c, a in answers.items()]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    written = TASK.format(data=tmp_path / "data.jsonl", cache=tmp_path / "cache")
    (tmp_path / "mine.yaml").write_text(written)
    shipped = ("next_sentence", "names", "fields")
    flags = [*("--tasks", str(tmp_path / "mine.yaml"), *shipped), "--output", str(tmp_path)]
    eval_program([str(run.folder), *flags])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{run.folder}: tiny, step 2 of 3\n\n|")
    assert printed.endswith(f"Written: {tmp_path / 'tasks.json'}\n")
    results = json.loads((tmp_path / "tasks.json").read_text())["results"]
    assert set(results) == {"mine", *shipped}
    found = model.scorer.score([(context, " " + answer) for context, answer in answers.items()])
    expected = np.exp(-np.mean([of_one.log_probability for of_one in found]))
    assert results["mine"]["perplexity,none"] == pytest.approx(expected, rel=1e-4)
    for name, metric in (("next_sentence", "acc,none"), ("fields", "exact_match,stripped")):
        assert 0 <= results[name][metric] <= 1 and results[name]["sample_len"] > 1
    assert not (tmp_path / "eval.json").exists()


@needs_harness
@ignores_warnings
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, r"There is no task 'TASK'; give a YAML file, or fields, names, next_sentence\."),
        ("task: [", r"Task TASK cannot be loaded \(while parsing"),
        ("- task", r"Task TASK cannot be loaded \(Expected YAML dict"),
        ("other: 1", r"Task TASK cannot be loaded \(Unknown config shape"),
        ("task: a\ndataset_path: no/such", r"Task TASK cannot be loaded .*nothing is downloaded"),
        (TASK.format(data="missing.jsonl", cache="cache"), r"Task TASK .*missing\.jsonl"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_refused(run, eval_program, tmp_path, text, sentence):
    path = tmp_path / "task.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=sentence.replace("TASK", str(path))) as refused:
        eval_program([str(run.folder), "--tasks", str(path)])
    assert "\n" not in str(refused.value)


@needs_harness
@ignores_warnings
def test_two_tasks_of_one_name_are_refused(run, eval_program):
    with pytest.raises(InputError, match="Two tasks are called 'fields'"):
        eval_program([str(run.folder), "--tasks", "fields", "fields"])


def test_a_missing_extra_is_named(run, eval_program, monkeypatch):
    monkeypatch.delitem(sys.modules, "engram_jax.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        InputError, match=r"needs the package lm_eval; run pip install -c constraints"
    ):
        eval_program([str(run.folder), "--tasks", "names"])


def test_flags_of_another_evaluation_are_refused(run, eval_program):
    with pytest.raises(InputError, match="leave out --max-tokens"):
        eval_program([str(run.folder), "--tasks", "names", "--max-tokens", "5"])
