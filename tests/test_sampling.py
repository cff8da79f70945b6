from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_runs import plain_pass

from engram_jax.errors import InputError
from engram_jax.sampling import sample

PROMPT = "Alexander the Great"


@pytest.fixture(
    scope="module",
    params=["engram", pytest.param("over_encoding", marks=pytest.mark.slow), "dense"],
)
def model(request, untrained):
    run = untrained(request.param)
    return run, run.restore_weights()


@pytest.fixture(scope="module")
def engram(untrained):
    run = untrained("engram")
    return run, run.restore_weights()


def continue_greedily(run, weights, prompt: str, tokens: int) -> str:
    """Greedy sampling with a plain forward pass."""
    tokenizer, decode = run.tokenizer, plain_pass(run, weights)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    for _ in range(tokens):
        window = np.array([ids[-run.config.data.sequence_length :]], np.int32)
        positions = np.arange(window.shape[1], dtype=np.int32)[None]
        logits, _ = decode(window, np.ones_like(window), positions)
        ids.append(int(np.argmax(logits[0, -1])))
    return tokenizer.decode(ids).removeprefix(prompt)


def test_zero_temperature_is_the_argmax_of_plain_passes(model):
    run, weights = model
    prompt = "Alexander the Great was born in Wales and" + " on" * 10
    room = run.config.data.sequence_length - 1 - len(run.tokenizer.encode(prompt))
    assert 0 < room < 5  # the window is filled, then moves
    expected = continue_greedily(run, weights, prompt, 6)
    assert expected
    assert sample(run, weights, prompt, tokens=6, temperature=0.0) == expected


def test_a_long_prompt_keeps_its_end(engram):
    run, weights = engram
    long = "in Wales and on " * 20
    assert sample(run, weights, long, tokens=2, temperature=0.0) == continue_greedily(
        run, weights, long, 2
    )


def test_equal_seeds_give_equal_texts(engram):
    run, weights = engram
    texts = [sample(run, weights, PROMPT, tokens=8, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_one_candidate_is_the_argmax(engram):
    run, weights = engram
    greedy = sample(run, weights, PROMPT, tokens=6, temperature=0.0)
    assert sample(run, weights, PROMPT, tokens=6, top_k=1, temperature=5.0, seed=3) == greedy


def test_low_temperatures_approach_the_argmax(engram):
    run, weights = engram
    greedy = sample(run, weights, PROMPT, tokens=6, temperature=0.0)
    assert sample(run, weights, PROMPT, tokens=6, temperature=1e-6, seed=4) == greedy


def test_it_stops_at_the_end_of_the_document(engram):
    """With an output head that always predicts eos."""
    run, weights = engram
    params = jax.tree.map(lambda leaf: leaf, weights.params)
    embedding = params["embedding"]
    params["embedding"] = 0 * embedding + 1
    params["embedding"] = params["embedding"].at[run.tokenizer.eos_id].set(2)
    # The final norm of equal entries is ±1; both signs are tried.
    texts = []
    for sign in (1, -1):
        signed = params | {"norm": jax.tree.map(lambda leaf, s=sign: s * leaf, params["norm"])}
        texts.append(sample(run, replace(weights, params=signed), "", tokens=9, temperature=0.0))
    assert "" in texts  # the name of eos is not in the text


def test_sampling_writes_nothing(engram):
    run, weights = engram
    before = jax.device_get(weights)
    sample(run, weights, PROMPT, tokens=3)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(weights))


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"tokens": 0}, "0 tokens"),
        ({"tokens": 1, "temperature": -1.0}, "temperature is -1"),
        ({"tokens": 1, "temperature": float("nan")}, "temperature is nan"),
        ({"tokens": 1, "top_k": 0}, "top_k is 0"),
        ({"tokens": 1, "top_k": 8193}, "1 to 8192"),
    ],
)
def test_settings_out_of_range_are_refused(engram, wrong, named):
    with pytest.raises(InputError, match=named):
        sample(*engram, PROMPT, **wrong)
