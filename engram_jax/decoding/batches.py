"""Which prompts are decoded together, with how many slots, within bounded memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from engram_jax.config import Config
from engram_jax.costs.accounting import decode_state_bytes
from engram_jax.decoding.settings import GenerationSettings
from engram_jax.errors import InputError
from engram_jax.tokenizer import Tokenizer

STATE_BYTES = 4 << 30  # maximum size of a batch's state, per device
LEAST_CAPACITY, MOST_CAPACITY = 256, 2**17
MOST_SEQUENCES = 64  # in a batch, per device


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are continued at the same time.

    Attributes:
        numbers: which of the given prompts they are, from 0.
        prompts: their token ids.
        limits: maximum number of tokens to add to each.
        capacity: number of slots of every sequence.
    """

    numbers: list[int]
    prompts: list[list[int]]
    limits: list[int]
    capacity: int


def make_batches(
    config: Config,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: GenerationSettings,
    devices: int,
) -> list[PromptBatch]:
    """Encodes prompts, and puts those of similar length into one batch, the longest first.

    This runs on the host and without the weights, so invalid prompts are found before the
    checkpoint is read.

    Args:
        config: of the run.
        tokenizer: the tokenizer.
        prompts: starts of documents.
        settings: how they are continued.
        devices: number of devices.

    Raises:
        InputError: a prompt is not valid Unicode or too long, or top_k is too large.
    """
    pieces = tokenizer.vocab_size
    if settings.top_k is not None and settings.top_k > pieces:
        raise InputError(f"--top-k is {settings.top_k}; the tokenizer has {pieces} tokens.")
    encoded = [encode_start(tokenizer, number, text) for number, text in enumerate(prompts, 1)]
    most = [_most_tokens(number, ids, settings) for number, ids in enumerate(encoded, 1)]
    batches = []
    for numbers, capacity in split_by_length(config, most, devices):
        batches.append(
            PromptBatch(
                numbers,
                [encoded[number] for number in numbers],
                [most[number] - len(encoded[number]) for number in numbers],
                capacity,
            )
        )
    return batches


def encode_start(tokenizer: Tokenizer, number: int, prompt: str) -> list[int]:
    """The tokens of prompt `number` (from 1), as the start of a document."""
    try:
        return [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    except InputError as error:
        raise InputError(f"Prompt {number} is not valid: {error}") from error


def split_by_length(
    config: Config, lengths: Sequence[int], devices: int
) -> list[tuple[list[int], int]]:
    """Splits sequences into batches of similar length, the longest first.

    Returns:
        For every batch, the numbers of its sequences, ascending, and its capacity.

    Raises:
        InputError: a sequence is too long, or its state does not fit in `STATE_BYTES`.
    """
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    batches = []
    while order:
        capacity = padded_capacity(lengths[order[0]])
        size = devices * _sequences_per_device(config, lengths[order[0]], capacity)
        batches.append((sorted(order[:size]), capacity))
        order = order[size:]
    return batches


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
            f"{tokens:,} tokens of prompt and continuation are more than {MOST_CAPACITY:,}; ask "
            "for fewer tokens, or shorten the text."
        )
    return LEAST_CAPACITY * _power_of_two(-(-tokens // LEAST_CAPACITY))


def _most_tokens(number: int, prompt: Sequence[int], settings: GenerationSettings) -> int:
    """Maximum number of tokens of prompt `number` (from 1) and its continuation."""
    if settings.capacity is None:
        return len(prompt) + settings.tokens
    if len(prompt) >= settings.capacity:
        raise InputError(
            f"Prompt {number} has {len(prompt):,} tokens, and --capacity is "
            f"{settings.capacity:,}, which leaves no room to continue it; raise --capacity, or "
            "shorten the prompt."
        )
    return min(settings.capacity, len(prompt) + settings.tokens)


def _sequences_per_device(config: Config, tokens: int, capacity: int) -> int:
    """The largest power of two of sequences whose state fits."""
    of_one = decode_state_bytes(config, sequences=1, slots=capacity)
    if of_one > STATE_BYTES:
        raise InputError(
            f"The state of {tokens:,} tokens has {of_one / 1e9:.1f} GB, and at most "
            f"{STATE_BYTES / 1e9:.1f} GB are used; ask for fewer tokens, or shorten the text."
        )
    fitting = min(MOST_SEQUENCES, STATE_BYTES // of_one)
    return 1 << (fitting.bit_length() - 1)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << (number - 1).bit_length()
