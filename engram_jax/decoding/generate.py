"""Generation: prompts in, text out, in batches, by one compiled loop."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from engram_jax.decoding.extend import BY_SEQUENCE
from engram_jax.decoding.programs import Drawing, Limits, ProgramCache, Programs
from engram_jax.decoding.sampling import DrawSettings
from engram_jax.decoding.state import DecodeState
from engram_jax.decoding.text import Continuation, GrowingText
from engram_jax.decoding.weights import prepare
from engram_jax.errors import InputError
from engram_jax.program import Program
from engram_jax.tokenizer import Tokenizer
from engram_jax.train_state import Weights

LEAST_CAPACITY, MOST_CAPACITY = 256, 2**17
MOST_SEQUENCES = 64  # in a batch, per device


@dataclass(frozen=True)
class Settings:
    """How prompts are continued.

    Attributes:
        tokens: maximum number of tokens to add.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: draw from this many most likely tokens; None: from all.
        top_p: draw from the fewest tokens that have this probability together.
        min_p: draw from tokens with at least this probability, relative to the most likely one.
        stop: strings that end a continuation.
        seed: of the first prompt; prompt n has seed + n.
        capacity: maximum number of tokens of prompt and continuation; None: as many as needed.
    """

    tokens: int = 100
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    capacity: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"--tokens is {self.tokens}; ask for at least 1.")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"--temperature is {self.temperature}; it must be 0 or more.")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top-k is {self.top_k}; it must be at least 1.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p is {self.top_p}; it must be above 0 and at most 1.")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"--min-p is {self.min_p}; it must be from 0 to 1.")
        if "" in self.stop:
            raise InputError("--stop has an empty string; leave it out.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed is {self.seed}; it must be from 0 to 2³² − 1.")
        if self.capacity is not None and self.capacity < 2:
            raise InputError(f"--capacity is {self.capacity}; it must be at least 2.")


@dataclass(frozen=True)
class Speed:
    """Tokens and seconds of a generation, without compilation."""

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

    Programs are compiled for a batch size and a capacity, which are powers of two. Another prompt,
    setting or seed compiles nothing. In a batch of one shape, a sequence's text does not depend on
    the others, bit for bit; between shapes, logits differ by rounding.

    Args:
        program: the program.
        tokenizer: the tokenizer.
        weights: parameters and tables, which must not be donated meanwhile.
        memory: use the memory; without it, memory layers add nothing.
    """

    def __init__(
        self, program: Program, tokenizer: Tokenizer, weights: Weights, *, memory: bool = True
    ) -> None:
        self.program = program
        self.tokenizer = tokenizer
        self.weights = prepare(program, weights, memory=memory)
        self.speed = Speed()
        self.programs = ProgramCache(program)
        self.by_sequence = jax.NamedSharding(program.mesh, BY_SEQUENCE)

    def generate(
        self,
        prompts: Sequence[str],
        settings: Settings | None = None,
        *,
        show: Callable[[int, str], object] = lambda number, text: None,
    ) -> list[Continuation]:
        """Continues every prompt, as the start of a document.

        Args:
            prompts: the texts; "" generates a complete document.
            settings: how they are continued.
            show: called with the number of a prompt and the new part of its continuation, after
                every burst. It never gets a part of a character, or of a stop string.

        Raises:
            InputError: a prompt is not valid Unicode or too long, or top_k is too large.
        """
        settings = settings or Settings()
        pieces, sequences = self.tokenizer.vocab_size, MOST_SEQUENCES * self.program.mesh.size
        if settings.top_k is not None and settings.top_k > pieces:
            raise InputError(f"--top-k is {settings.top_k}; the tokenizer has {pieces} tokens.")
        encoded = [self.encode(number, prompt) for number, prompt in enumerate(prompts, 1)]
        capacity = self._capacity(encoded, settings)
        texts = [
            GrowingText(
                *(self.tokenizer, ids, settings.stop, self.tokenizer.eos_id),
                limit=min(settings.tokens, capacity - len(ids)),
            )
            for ids in encoded
        ]
        slots = padded_capacity(capacity)
        self.speed = Speed()
        for first in range(0, len(texts), sequences):
            self._continue(texts[first : first + sequences], first, settings, slots, show)
        return [text.finish() for text in texts]

    def encode(self, number: int, prompt: str) -> list[int]:
        """The tokens of prompt `number`, as the start of a document."""
        try:
            return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt).tolist()]
        except InputError as error:
            raise InputError(f"Prompt {number} is not valid: {error}") from error

    def _capacity(self, prompts: Sequence[list[int]], settings: Settings) -> int:
        """Number of slots; says so if they exceed the length of the training rows."""
        longest = max(map(len, prompts), default=0)
        needed = settings.capacity or longest + settings.tokens
        if longest >= needed:
            number = max(range(len(prompts)), key=lambda n: len(prompts[n]))
            raise InputError(
                f"Prompt {number + 1} has {longest:,} tokens, and --capacity is {needed:,}, which "
                "leaves no room to continue it; raise --capacity, or shorten the prompt."
            )
        trained = self.program.config.data.sequence_length
        used = min(needed, longest + settings.tokens)
        if used > trained:
            print(
                f"Up to {used:,} tokens are used, and the model was trained on rows of "
                f"{trained:,}: text beyond that is likely to be worse.",
                file=sys.stderr,
            )
        return needed

    def _continue(
        self,
        texts: list[GrowingText],
        first: int,
        settings: Settings,
        capacity: int,
        show: Callable[[int, str], object],
    ) -> None:
        """Continues one batch, which begins with prompt number `first`."""
        count = len(texts)
        batch = padded_batch(count, self.program.mesh.size)
        put = partial(self._put, batch)
        with self.program.use_mesh():
            programs = self.programs.get(self.weights, batch, capacity)
            state, logits = self._read_prompts(programs, texts, batch)
            ways = DrawSettings(
                temperature=put([settings.temperature] * count, np.float32),
                top_k=put([settings.top_k or 2**31 - 1] * count, np.int32),
                top_p=put([settings.top_p] * count, np.float32),
                min_p=put([settings.min_p] * count, np.float32),
                seed=put((settings.seed + first + np.arange(count)) % 2**32, np.uint32),
            )
            most = put([text.limit for text in texts], np.int32)
            limits = Limits(np.int32(self.tokenizer.vocab_size), np.int32(self.tokenizer.eos_id))
            drawing = Drawing(logits, put([0] * count, np.int32), put([False] * count, bool))
            begin = time.perf_counter()
            while any(text.reason is None for text in texts):
                done = put([text.reason is not None for text in texts], bool, fill=True)
                state, drawing, *new = programs.burst(
                    self.weights, state, drawing._replace(done=done), ways, most, limits
                )
                tokens, log_probabilities = jax.device_get(new)
                for number, text in enumerate(texts):
                    if text.reason is None:
                        drawn = tokens[number] >= 0
                        found = tokens[number][drawn], log_probabilities[number][drawn]
                        show(first + number, text.add(*(part.tolist() for part in found)))
        tokens_of_all = sum(len(text.tokens) for text in texts)
        self.speed += Speed(tokens=tokens_of_all, seconds=time.perf_counter() - begin)

    def _read_prompts(
        self, programs: Programs, texts: list[GrowingText], batch: int
    ) -> tuple[DecodeState, Array]:
        """A state with the prompts of a batch, and the logits after them."""
        begin = time.perf_counter()
        state, logits = programs.empty()
        chunk, longest = programs.chunk, max(len(text.prompt) for text in texts)
        tokens = np.zeros((batch, -(-longest // chunk) * chunk), np.int32)
        lengths = np.ones(batch, np.int32)  # an empty place has one token
        for number, text in enumerate(texts):
            tokens[number, : len(text.prompt)] = text.prompt
            lengths[number] = len(text.prompt)
        for first in range(0, longest, chunk):
            part = tokens[:, first : first + chunk], np.clip(lengths - first, 0, chunk)
            inputs = jax.device_put(part, self.by_sequence)
            state, logits = programs.prefill(self.weights, state, *inputs, logits)
        jax.block_until_ready(logits)
        seconds = time.perf_counter() - begin
        self.speed += Speed(int(lengths[: len(texts)].sum()), seconds)
        return state, logits

    def _put(self, batch: int, values: Any, dtype: Any, *, fill: Any = 0) -> Array:
        """One number per sequence, on the devices; empty places get `fill`."""
        filled = np.full(batch, fill, dtype)
        filled[: len(values)] = values
        return jax.device_put(filled, self.by_sequence)


def padded_batch(sequences: int, devices: int) -> int:
    """The number of sequences of the compiled programs: a power of two per device."""
    return devices * _power_of_two(-(-sequences // devices))


def padded_capacity(tokens: int) -> int:
    """The number of slots of the compiled programs.

    Raises:
        InputError: these are too many tokens.
    """
    if tokens > MOST_CAPACITY:
        raise InputError(
            f"{tokens:,} tokens of prompt and continuation are more than {MOST_CAPACITY:,}; lower "
            "--tokens or --capacity, or shorten the text."
        )
    return LEAST_CAPACITY * _power_of_two(-(-tokens // LEAST_CAPACITY))


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << (number - 1).bit_length()
