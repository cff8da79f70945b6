"""Generation and scoring by plain forward passes over windows of 24 tokens."""

import jax
import numpy as np
from tiny_runs import PlainPass

from engram_jax.decoding.score import Likelihood
from engram_jax.run import Run


def continue_greedily(run: Run, decode: PlainPass, prompt: str, tokens: int) -> list[int]:
    """Greedy tokens of plain forward passes, up to the end of the document."""
    tokenizer = run.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    found: list[int] = []
    while len(found) < tokens and tokenizer.eos_id not in found:
        window = np.array([[*ids, *found] + [0] * (24 - len(ids) - len(found))], np.int32)
        positions = np.arange(24, dtype=np.int32)[None]
        logits, _ = decode(window, np.ones_like(window), positions)
        found.append(int(np.argmax(logits[0, len(ids) + len(found) - 1, : tokenizer.vocab_size])))
    return [token for token in found if token != tokenizer.eos_id]


def log_probabilities_of(run: Run, decode: PlainPass, prompt: str, tokens: list[int]) -> np.ndarray:
    """Log-probabilities of these tokens after a prompt, in one plain pass."""
    ids = [run.tokenizer.bos_id, *run.tokenizer.encode(prompt).tolist()]
    window = np.zeros((1, 24), np.int32)
    window[0, : len(ids) + len(tokens)] = [*ids, *tokens]
    positions = np.arange(24, dtype=np.int32)[None]
    logits, _ = decode(window, np.ones_like(window), positions)
    chances = jax.nn.log_softmax(logits[0, :, : run.tokenizer.vocab_size].astype(np.float32))
    return np.asarray(chances)[len(ids) - 1 + np.arange(len(tokens)), tokens]


def score_plainly(run: Run, decode: PlainPass, context: str, continuation: str) -> Likelihood:
    tokenizer = run.tokenizer
    before, whole = (
        [tokenizer.bos_id, *tokenizer.encode(text).tolist()]
        for text in (context, context + continuation)
    )
    begin = next(
        (n for n, ids in enumerate(zip(before, whole, strict=False)) if ids[0] != ids[1]),
        min(len(before), len(whole)),
    )
    window = np.array([whole + [0] * (24 - len(whole))], np.int32)
    positions = np.arange(24, dtype=np.int32)[None]
    logits, _ = decode(window, np.ones_like(window), positions)
    chances = np.asarray(jax.nn.log_softmax(logits[0, :, : tokenizer.vocab_size]))
    numbers = range(begin, len(whole))
    return Likelihood(
        float(sum(chances[n - 1, whole[n]] for n in numbers)),
        len(numbers),
        all(int(chances[n - 1].argmax()) == whole[n] for n in numbers),
    )
