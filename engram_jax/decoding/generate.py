"""Generation of text for batches of prompts.

One compiled program reads prompts in chunks, another draws up to 16 tokens per call.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int32

from engram_jax.decoding.batches import PromptBatch, make_batches, padded_batch
from engram_jax.decoding.extend import BY_SEQUENCE
from engram_jax.decoding.programs import BURST, Drawing, Limits, ProgramCache
from engram_jax.decoding.prompt_rows import PromptRows
from engram_jax.decoding.sampling import DrawSettings
from engram_jax.decoding.settings import GenerationSettings
from engram_jax.decoding.text import Continuation, GrowingText
from engram_jax.decoding.weights import prepare
from engram_jax.errors import InputError
from engram_jax.layers.decode_state import DecodeState
from engram_jax.memory.store import Stores
from engram_jax.memory.store_table import called_tables
from engram_jax.program import Program
from engram_jax.tokenizer import Tokenizer
from engram_jax.train_state import Weights

type Show = Callable[[int, str], object]


@dataclass(frozen=True)
class Speed:
    """Tokens and seconds of a generation, without compilation.

    Attributes:
        prompt_tokens: tokens of prompts, without the last one of each, which the loop reads.
        prompt_seconds: for reading them; if the loop reads a short prompt, its share of the time.
        tokens: tokens of continuations.
        seconds: for drawing them, including the work of the host.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def prompt_rate(self) -> float:
        """Tokens of prompts per second."""
        return self.prompt_tokens / max(self.prompt_seconds, 1e-9)

    @property
    def rate(self) -> float:
        """Tokens of continuations per second."""
        return self.tokens / max(self.seconds, 1e-9)

    def __add__(self, other: "Speed") -> "Speed":
        mine, theirs = asdict(self), asdict(other)
        return Speed(**{name: value + theirs[name] for name, value in mine.items()})


class Generator:
    """Continues prompts with the weights of a run, which are prepared once.

    Programs are compiled for a number of sequences per device and a capacity, which are powers of
    two: the loop that draws tokens, and one that reads prompts. (The loop reads a single short
    prompt, or "", itself.) Another prompt, setting or seed of the same sizes compiles nothing else.
    A batch's state has at most `batches.STATE_BYTES` per device. In a batch of one shape, a
    sequence's text does not depend on the others, bit for bit, in a model without experts; between
    shapes, logits differ by rounding.

    Args:
        program: the program.
        tokenizer: the tokenizer.
        weights: parameters and tables, which must not be donated meanwhile.
        stores: the tables by layer id, if they are outside the devices.
        memory: use the memory; without it, memory layers add nothing.
        verify_rows: compare all rows that programs read from stores with the stores' own.
        hot_rows: places of rows that are copied to the devices, by layer id (`hot_rows`).
    """

    def __init__(
        self,
        program: Program,
        tokenizer: Tokenizer,
        weights: Weights,
        stores: Stores | None = None,
        *,
        memory: bool = True,
        verify_rows: bool = False,
        hot_rows: Mapping[int, Int32[np.ndarray, "C"]] | None = None,
    ) -> None:
        self.program = program
        self.tokenizer = tokenizer
        self.weights = prepare(
            *(program, weights, stores), memory=memory, verify_rows=verify_rows, hot_rows=hot_rows
        )
        self._stores = (stores or {}) if memory else {}
        self.speed = Speed()
        self._has_warned, self._verifies = False, verify_rows
        self.programs = ProgramCache(program)
        self.by_sequence = jax.NamedSharding(program.mesh, BY_SEQUENCE)

    def generate(
        self,
        prompts: Sequence[str],
        settings: GenerationSettings | None = None,
        *,
        show: Show = lambda number, text: None,
    ) -> list[Continuation]:
        """Continues every prompt, as the start of a document.

        Args:
            prompts: the texts; "" generates a complete document.
            settings: how they are continued.
            show: called with the number of a prompt and the new part of its continuation, after
                every burst. It never gets a part of a character, or of a stop string.

        Returns:
            The continuations, in the order of the prompts.

        Raises:
            InputError: a prompt is not valid Unicode or too long, top_k is too large, logits are
                not finite, or the file of a table was truncated.
        """
        found: dict[int, Continuation] = {}
        for batch in self.generate_batches(prompts, settings, show=show):
            found |= batch
        return [found[number] for number in range(len(prompts))]

    def generate_batches(
        self,
        prompts: Sequence[str],
        settings: GenerationSettings | None = None,
        *,
        show: Show = lambda number, text: None,
    ) -> Iterator[dict[int, Continuation]]:
        """Like `generate`; gives the continuations of each batch, by number, as it is finished.

        A batch has prompts of similar length, and the batch with the longest ones is the first.
        """
        settings, config = settings or GenerationSettings(), self.program.config
        self.speed = Speed()
        batches = make_batches(config, self.tokenizer, prompts, settings, self.program.mesh.size)
        for number, batch in enumerate(batches):
            if number == 0:
                lengths = map(len, batch.prompts)
                self.warn_beyond_training(max(map(sum, zip(lengths, batch.limits, strict=True))))
            yield self._continue(batch, settings, show)

    def warn_beyond_training(self, used: int) -> None:
        """Says so, once, if tokens of a sequence exceed the length of the training rows."""
        trained = self.program.config.data.sequence_length
        if used > trained and not self._has_warned:
            self._has_warned = True
            print(
                f"Up to {used:,} tokens are used, and the model was trained on rows of "
                f"{trained:,}: text beyond that is likely to be worse.",
                file=sys.stderr,
            )

    def check_tables(self) -> None:
        """Checks tables outside the devices, before and after a program that reads them.

        Raises:
            InputError: a file was truncated, or rows could not be read, or differ.
        """
        if self._verifies:
            jax.effects_barrier()  # all comparisons so far are done
        for store in self._stores.values():
            store.check_complete()

    def _continue(
        self, batch: PromptBatch, settings: GenerationSettings, show: Show
    ) -> dict[int, Continuation]:
        """Continues one batch."""
        texts = [
            GrowingText(self.tokenizer, ids, settings.stop_strings, self.tokenizer.eos_id, limit)
            for ids, limit in zip(batch.prompts, batch.limits, strict=True)
        ]
        size, given = padded_batch(len(texts), self.program.mesh.size), self._given(batch)
        with self.program.use_mesh():
            state = self.programs.empty(self.weights, size, batch.capacity)
            if not given:
                state = self._read_prompts(batch, state)
            burst = self.programs.burst(self.weights, size, batch.capacity)
            begin = time.perf_counter()
            for tokens, log_probabilities in self._bursts(batch, settings, texts, burst, state):
                _add(batch.numbers, texts, tokens, log_probabilities, show)
        drawn, seconds = sum(len(text.tokens) for text in texts), time.perf_counter() - begin
        reading = seconds * len(given) / (len(given) + drawn + 1)  # the last step may draw the end
        self.speed += Speed(len(given), reading, drawn, seconds - reading)
        return {n: text.finish() for n, text in zip(batch.numbers, texts, strict=True)}

    def _bursts(
        self,
        batch: PromptBatch,
        settings: GenerationSettings,
        texts: Sequence[GrowingText],
        burst: Callable[..., Any],
        state: DecodeState,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens and log-probabilities of each burst, [B, BURST], until all texts have ended.

        A device sees itself where a text ends, except by a stop string. So without stop strings,
        the next burst is computed while the caller works with one.
        """
        size, rest = padded_batch(len(texts), self.program.mesh.size), self._given(batch)
        put = partial(self._put, size)
        limits = Limits(np.int32(self.tokenizer.vocab_size), np.int32(self.tokenizer.eos_id))
        constants = self._draw_settings(batch, settings), put(batch.limits, np.int32), limits
        given = np.full((size, BURST), -1, np.int32)
        given[0, : len(rest)] = rest
        last = [ids[0 if rest else -1] for ids in batch.prompts]
        drawing = Drawing(
            *(put(last, np.int32), put([], np.int32), put([], bool)),
            jax.device_put(given, self.by_sequence),
        )

        def begin_burst(state: DecodeState, drawing: Drawing) -> tuple[Any, ...]:
            self.check_tables()
            return tuple(burst(self.weights, state, drawing, *constants))

        following, left = None, max(batch.limits) + len(rest)
        while any(text.reason is None for text in texts):
            if following is None:
                done = put([text.reason is not None for text in texts], bool, fill=True)
                following = begin_burst(state, drawing._replace(done=done))
            (state, drawing, *new), following, left = following, None, left - BURST
            if left > 0 and not settings.stop_strings:
                following = begin_burst(state, drawing)
            tokens, log_probabilities = jax.device_get(new)
            self.check_tables()
            yield tokens, log_probabilities

    def _draw_settings(self, batch: PromptBatch, settings: GenerationSettings) -> DrawSettings:
        """The settings of every sequence, on the devices."""
        count = len(batch.numbers)
        put = partial(self._put, padded_batch(count, self.program.mesh.size))
        return DrawSettings(
            temperature=put([settings.temperature] * count, np.float32),
            top_k=put([settings.top_k or 2**31 - 1] * count, np.int32),
            top_p=put([settings.top_p] * count, np.float32),
            min_p=put([settings.min_p] * count, np.float32),
            seed=put((settings.seed + np.array(batch.numbers)) % 2**32, np.uint32),
        )

    def _given(self, batch: PromptBatch) -> list[int]:
        """The rest of a single short prompt, if the loop reads it, and no other program is needed.

        Not if the program has empty places for more sequences, because a sequence must not depend
        on the others; nor if the loop would call the host for the rows of every token.
        """
        size, ids = padded_batch(len(batch.prompts), self.program.mesh.size), batch.prompts[0]
        is_short = size == 1 and len(ids) <= BURST + 1
        return ids[1:] if is_short and not called_tables(self.weights.outside) else []

    def _read_prompts(self, batch: PromptBatch, state: DecodeState) -> DecodeState:
        """Appends the prompts to an empty state, without the last token of each."""
        size = padded_batch(len(batch.prompts), self.program.mesh.size)
        chunk, lengths = self.programs.chunk(size), np.zeros(size, np.int32)
        lengths[: len(batch.prompts)] = [len(ids) - 1 for ids in batch.prompts]
        if not lengths.any():
            return state
        prefill = self.programs.prefill(self.weights, size, batch.capacity)
        tokens = np.zeros((size, -(-max(lengths) // chunk) * chunk), np.int32)
        for number, ids in enumerate(batch.prompts):
            tokens[number, : len(ids) - 1] = ids[:-1]
        begin = time.perf_counter()
        rows = PromptRows(self.program, self.weights, tokens)
        for first in range(0, tokens.shape[1], chunk):
            part = tokens[:, first : first + chunk], np.clip(lengths - first, 0, chunk)
            inputs = jax.device_put((*part, rows.chunk(first, chunk)), self.by_sequence)
            self.check_tables()
            state = prefill(self.weights, state, *inputs)
        jax.block_until_ready(state)
        self.check_tables()
        self.speed += Speed(int(lengths.sum()), time.perf_counter() - begin)
        return state

    def _put(self, batch: int, values: Any, dtype: Any, *, fill: Any = 0) -> Array:
        """One number per sequence, on the devices; empty places get `fill`."""
        filled = np.full(batch, fill, dtype)
        filled[: len(values)] = values
        return jax.device_put(filled, self.by_sequence)


def _add(
    numbers: Sequence[int],
    texts: Sequence[GrowingText],
    tokens: np.ndarray,
    log_probabilities: np.ndarray,
    show: Show,
) -> None:
    """Adds the tokens of a burst, [B, BURST], to the texts that have not ended."""
    for row, (number, text) in enumerate(zip(numbers, texts, strict=True)):
        if text.reason is not None:
            continue
        drawn = tokens[row] >= 0
        found = log_probabilities[row][drawn]
        if not np.isfinite(found).all():
            raise InputError(
                f"The logits of prompt {number + 1} are not finite; the checkpoint is damaged or "
                "diverged."
            )
        show(number, text.add(tokens[row][drawn].tolist(), found.tolist()))
