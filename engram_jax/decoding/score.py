"""Log-likelihoods of continuations, given their contexts, in batches of similar length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import jax
import numpy as np
from jaxtyping import Array

from engram_jax.decoding.batches import encode_start, padded_batch, split_by_length
from engram_jax.decoding.extend import FetchedRecords, extend, on_all_devices
from engram_jax.decoding.generate import Generator
from engram_jax.decoding.prompt_rows import PromptRows
from engram_jax.decoding.sampling import log_probabilities
from engram_jax.decoding.weights import DecodeWeights
from engram_jax.errors import InputError
from engram_jax.layers.decode_state import DecodeState
from engram_jax.program import Program


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a continuation.

    Attributes:
        log_probability: of all its tokens, in nats (see `sampling.log_probabilities`).
        tokens: number of its tokens.
        is_greedy: each of its tokens is the most likely one.
    """

    log_probability: float
    tokens: int
    is_greedy: bool


def make_likelihoods(program: Program) -> jax.stages.Wrapped:
    """The jitted function from tokens to the likelihood of the tokens after them.

    Its arguments are prepared weights, state, tokens [B, T], targets [B, T], counts [B], records of
    the rows (see `PromptRows`), and the number of ids that the tokenizer has. It returns the state,
    the log-probability of every target, and whether it is the most likely token.
    """

    def likelihoods(
        weights: DecodeWeights,
        state: DecodeState,
        tokens: Array,
        targets: Array,
        count: Array,
        fetched: FetchedRecords | None,
        pieces: Array,
    ) -> tuple[DecodeState, Array, Array]:
        logits, state = extend(program, weights, state, tokens, count, "all", fetched)
        flat = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        of_targets, is_greedy = log_probabilities(*flat, pieces)
        return state, of_targets.reshape(targets.shape), is_greedy.reshape(targets.shape)

    return on_all_devices(likelihoods, [True] * 5 + [False], donate=(1,))


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
            InputError: a text is not valid Unicode, or too long; or logits are not finite.
        """
        tokenizer = self.generator.tokenizer
        rows, begins = [], []
        for number, (context, continuation) in enumerate(pairs, 1):
            before = encode_start(tokenizer, number, context)
            whole = encode_start(tokenizer, number, context + continuation)
            rows.append(whole + [tokenizer.eos_id] * ends)
            shared = takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
            begins.append(len(list(shared)))
        return self.score_tokens(rows, begins)

    def score_tokens(self, rows: Sequence[list[int]], begins: Sequence[int]) -> list[Likelihood]:
        """The likelihood of every row's tokens from one of them on, given those before it.

        Args:
            rows: token ids, of one document in each row.
            begins: number of the first token whose likelihood counts, from 1.

        Raises:
            InputError: a row is too long, or logits are not finite.
        """
        program = self.generator.program
        scored = [Likelihood(0.0, 0, True)] * len(rows)
        parts = [number for number, row in enumerate(rows) if len(row) > begins[number]]
        lengths = [len(rows[number]) for number in parts]
        self.generator.warn_beyond_training(max(lengths, default=1) - 1)  # the last is not read
        for places, capacity in split_by_length(program.config, lengths, program.mesh.size):
            numbers = [parts[place] for place in places]
            found = self._score_batch([rows[number] for number in numbers], capacity)
            for number, (of_targets, is_greedy) in zip(numbers, found, strict=True):
                after = slice(begins[number] - 1, None)
                total = float(of_targets[after].astype(np.float64).sum())
                if not math.isfinite(total):
                    raise InputError(
                        f"The logits of text {number + 1} are not finite; the checkpoint is "
                        "damaged or diverged."
                    )
                length = len(rows[number]) - begins[number]
                scored[number] = Likelihood(total, length, bool(is_greedy[after].all()))
        return scored

    def _score_batch(
        self, rows: list[list[int]], capacity: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each row, two arrays over its tokens from the second on.

        They are the token's log-probability in nats given those before it, and whether no other
        token is more likely.
        """
        generator, longest = self.generator, max(map(len, rows))
        programs, pieces = generator.programs, np.int32(generator.tokenizer.vocab_size)
        batch = padded_batch(len(rows), generator.program.mesh.size)
        chunk, parts = programs.chunk(batch), []
        tokens = np.zeros((batch, longest + chunk), np.int32)
        lengths = np.zeros(batch, np.int32)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row
            lengths[number] = len(row) - 1
        with generator.program.use_mesh():
            state = programs.empty(generator.weights, batch, capacity)
            memory = PromptRows(generator.program, generator.weights, tokens)
            for first in range(0, longest - 1, chunk):
                here, there = slice(first, first + chunk), slice(first + 1, first + chunk + 1)
                counts = np.clip(lengths - first, 0, chunk)
                inputs = tokens[:, here], tokens[:, there], counts, memory.chunk(first, chunk)
                self.generator.check_tables()
                state, *found = self._likelihoods(
                    generator.weights, state, *jax.device_put(inputs, generator.by_sequence), pieces
                )
                parts.append(jax.device_get(found))
                self.generator.check_tables()
        of_targets, is_greedy = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        return [
            (of_targets[number, : len(row) - 1], is_greedy[number, : len(row) - 1])
            for number, row in enumerate(rows)
        ]
