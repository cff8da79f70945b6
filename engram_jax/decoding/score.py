"""Log-likelihoods of continuations, given their contexts, in batches of similar length."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from engram_jax.decoding.extend import extend, on_all_devices
from engram_jax.decoding.generate import MOST_SEQUENCES, Generator, padded_batch, padded_capacity
from engram_jax.decoding.state import DecodeState
from engram_jax.decoding.weights import DecodeWeights
from engram_jax.program import Program


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a continuation.

    Attributes:
        log_probability: of all its tokens, in nats.
        tokens: number of its tokens.
        is_greedy: each of its tokens is the most likely one.
    """

    log_probability: float
    tokens: int
    is_greedy: bool


def make_likelihoods(program: Program) -> jax.stages.Wrapped:
    """The jitted function from tokens to the likelihood of the tokens after them.

    Its arguments are prepared weights, state, tokens [B, T], targets [B, T] and counts [B]. It
    returns the state, the log-probability of every target, and whether it is the most likely token.
    """

    def likelihoods(
        weights: DecodeWeights, state: DecodeState, tokens: Array, targets: Array, count: Array
    ) -> tuple[DecodeState, Array, Array]:
        logits, state = extend(program, weights, state, tokens, count, "all")
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=2)[..., 0]
        is_greedy = chosen >= jnp.max(logits, axis=2)
        return state, chosen - jax.nn.logsumexp(logits, axis=2), is_greedy

    return on_all_devices(likelihoods, [True] * 4, donate=(1,))


class TextScorer:
    """Scores texts with the prepared weights of a generator.

    Args:
        generator: the generator.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self._likelihoods = make_likelihoods(generator.program)

    def score(self, pairs: Sequence[tuple[str, str]], *, ends: bool = False) -> list[Likelihood]:
        """The likelihood of every continuation.

        A context is the start of a document. It is encoded together with its continuation, and a
        token that has characters of both belongs to the continuation.

        Args:
            pairs: contexts and continuations; the context may be "".
            ends: the end of the document is a part of the continuations.

        Raises:
            InputError: a text is not valid Unicode, or too long.
        """
        tokenizer = self.generator.tokenizer
        rows, begins = [], []
        for number, (context, continuation) in enumerate(pairs, 1):
            before = self.generator.encode(number, context)
            whole = self.generator.encode(number, context + continuation)
            rows.append(whole + [tokenizer.eos_id] * ends)
            shared = takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
            begins.append(len(list(shared)))
        scored: list[Likelihood | None] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
        size = MOST_SEQUENCES * self.generator.program.mesh.size
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            found = self._score_batch([rows[number] for number in chosen])
            for number, (log_probabilities, is_greedy) in zip(chosen, found, strict=True):
                after = slice(begins[number] - 1, None)
                scored[number] = Likelihood(
                    float(log_probabilities[after].astype(np.float64).sum()),
                    len(rows[number]) - begins[number],
                    bool(is_greedy[after].all()),
                )
        return [one for one in scored if one is not None]

    def _score_batch(self, rows: list[list[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For every token but the first: its log-probability, and whether it is the most likely."""
        generator, longest = self.generator, max(map(len, rows))
        program = generator.program
        batch = padded_batch(len(rows), program.mesh.size)
        tokens = np.zeros((batch, longest + 256), np.int32)
        lengths = np.ones(batch, np.int32)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row
            lengths[number] = len(row) - 1
        parts = []
        with program.use_mesh():
            programs = generator.programs.get(generator.weights, batch, padded_capacity(longest))
            state, chunk = programs.empty()[0], programs.chunk
            for first in range(0, longest - 1, chunk):
                here, there = slice(first, first + chunk), slice(first + 1, first + chunk + 1)
                inputs = tokens[:, here], tokens[:, there], np.clip(lengths - first, 0, chunk)
                state, *found = self._likelihoods(
                    generator.weights, state, *jax.device_put(inputs, generator.by_sequence)
                )
                parts.append(jax.device_get(found))
        log_probabilities, is_greedy = (
            np.concatenate(part, axis=1) for part in zip(*parts, strict=True)
        )
        return [
            (log_probabilities[number, : len(row) - 1], is_greedy[number, : len(row) - 1])
            for number, row in enumerate(rows)
        ]
