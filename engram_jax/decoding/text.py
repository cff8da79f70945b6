"""The text of a sequence while it is generated: stop strings, and what can be shown already."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from engram_jax.tokenizer import Tokenizer

type Reason = Literal["end", "stop", "length"]

_INCOMPLETE = "\ufffd"  # what the bytes of a split character decode to


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt.

    Attributes:
        text: the continuation, without prompt and stop string.
        tokens: its token ids. The last one can reach into the stop string.
        log_probabilities: of the tokens, at temperature 1, without selection of candidates.
        reason: "end" of the document, "stop" string, or "length": the number of tokens asked for,
            or the capacity.
    """

    text: str
    tokens: list[int]
    log_probabilities: list[float]
    reason: Reason


@dataclass
class GrowingText:
    """A sequence's continuation so far.

    Attributes:
        tokenizer: the tokenizer.
        prompt: token ids before the continuation.
        stop: strings that end it.
        end_id: token id that ends it.
        limit: maximum number of tokens.
    """

    tokenizer: Tokenizer
    prompt: list[int]
    stop: Sequence[str]
    end_id: int
    limit: int
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    reason: Reason | None = None
    _text: str = ""
    _shown: int = 0

    def __post_init__(self) -> None:
        self._prompt_length = len(self.tokenizer.decode(self.prompt))

    def add(self, tokens: Sequence[int], log_probabilities: Sequence[float]) -> str:
        """Adds tokens, of which those after an end are ignored; returns the text to show now.

        Text is shown once no later token can change it: a split character and the start of a stop
        string are held back.
        """
        for token, log_probability in zip(tokens, log_probabilities, strict=True):
            if self.reason is None and token == self.end_id:
                self.reason = "end"
            elif self.reason is None:
                self.tokens.append(token)
                self.log_probabilities.append(log_probability)
                if len(self.tokens) >= self.limit:
                    self.reason = "length"
        self._text = self._decode(len(self.tokens))
        self._cut_at_stop()
        shown = self._text if self.reason else self._settled()
        new = shown[self._shown :]
        self._shown = max(self._shown, len(shown))
        return new

    def finish(self) -> Continuation:
        """The complete continuation."""
        return Continuation(
            self._text, self.tokens, self.log_probabilities, self.reason or "length"
        )

    def _decode(self, count: int) -> str:
        """The text of the first tokens. (Some tokenizers drop a space at the start of a text.)"""
        return self.tokenizer.decode(self.prompt + self.tokens[:count])[self._prompt_length :]

    def _cut_at_stop(self) -> None:
        places = [self._text.find(stop) for stop in self.stop]
        found = [place for place in places if place >= 0]
        if not found:
            return
        begin, self.reason = min(found), "stop"
        ends = min(
            place + len(stop)
            for place, stop in zip(places, self.stop, strict=True)
            if place == begin
        )
        # The fewest tokens that have the stop string.
        low, high = 0, len(self.tokens)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if len(self._decode(middle)) >= ends else (middle, high)
        self.tokens, self.log_probabilities = self.tokens[:high], self.log_probabilities[:high]
        self._text = self._text[:begin]

    def _settled(self) -> str:
        """The text without a split character at its end, and without the start of a stop string."""
        text = self._text.rstrip(_INCOMPLETE)
        held = max(
            (
                size
                for stop in self.stop
                for size in range(1, len(stop))
                if text.endswith(stop[:size])
            ),
            default=0,
        )
        return text[: len(text) - held]
