"""How prompts are continued."""

from dataclasses import dataclass

from engram_jax.errors import InputError


@dataclass(frozen=True)
class GenerationSettings:
    """How prompts are continued.

    Attributes:
        tokens: maximum number of tokens to add.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: draw from this many most likely tokens; None: from all.
        top_p: draw from the fewest tokens that have this probability together.
        min_p: draw from tokens with at least this probability, relative to the most likely one.
        stop: strings that end a continuation, or one such string.
        seed: of the first prompt; prompt n has seed + n.
        capacity: maximum number of tokens of prompt and continuation; None: as many as needed.

    Raises:
        InputError: a value is out of its range.
    """

    tokens: int = 100
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] | str = ()
    seed: int = 0
    capacity: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"--tokens is {self.tokens}; ask for at least 1.")
        if not 0 <= self.temperature <= 3e38:  # in float32
            raise InputError(
                f"--temperature is {self.temperature}; it must be finite, and 0 or more."
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top-k is {self.top_k}; it must be at least 1.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p is {self.top_p}; it must be above 0 and at most 1.")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"--min-p is {self.min_p}; it must be from 0 to 1.")
        if "" in self.stop_strings:
            raise InputError("--stop has an empty string; leave it out.")
        if any("\ud800" <= character <= "\udfff" for character in "".join(self.stop_strings)):
            raise InputError("--stop is not valid Unicode, so no text contains it; correct it.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed is {self.seed}; it must be from 0 to 2³² − 1.")
        if self.capacity is not None and self.capacity < 2:
            raise InputError(f"--capacity is {self.capacity}; it must be at least 2.")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end a continuation."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
