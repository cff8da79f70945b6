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
    _shown: int = 0  # characters
    # Tokens are settled if no later token changes their text. Later tokens are decoded after a
    # context of settled ones, because some tokenizers drop a space at the start of a text.
    _settled: int = 0
    _settled_length: int = 0  # characters

    def __post_init__(self) -> None:
        self._set_context(self.prompt)

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
        if self.reason is None:
            self._settle()
        shown = self._text if self.reason else self._final_text()
        new = shown[self._shown :]
        self._shown = max(self._shown, len(shown))
        return new

    def finish(self) -> Continuation:
        """The complete continuation."""
        return Continuation(
            self._text, self.tokens, self.log_probabilities, self.reason or "length"
        )

    def _set_context(self, tokens: list[int]) -> None:
        self._context, self._context_length = tokens, len(self.tokenizer.decode(tokens))

    def _decode(self, count: int) -> str:
        """The text of the first `count` tokens, which include the settled ones."""
        tail = self.tokenizer.decode(self._context + self.tokens[self._settled : count])
        return self._text[: self._settled_length] + tail[self._context_length :]

    def _settle(self) -> None:
        """Settles all tokens, unless the last ones are a part of a character."""
        if self._text.endswith(_INCOMPLETE):
            return
        tokens, text = self.tokens[self._settled :], self._text[self._settled_length :]
        self._set_context(tokens if text.strip() else self._context + tokens)
        self._settled, self._settled_length = len(self.tokens), len(self._text)

    def _cut_at_stop(self) -> None:
        """Ends the text before the stop string that is complete first, whatever a burst has."""
        # A split character at the end may become another one.
        text = self._text if self.reason else self._text.rstrip(_INCOMPLETE)
        begin = max(self._settled_length - max(map(len, self.stop), default=0) + 1, 0)
        places = [(text.find(stop, begin), len(stop)) for stop in self.stop]
        found = [(place + size, place) for place, size in places if place >= 0]
        if not found:
            return
        ends, begin = min(found)
        self.reason, before = "stop", self._text[:ends]
        # The fewest tokens that have the stop string. (A search by the length of the text would
        # find others, because the parts of a split character have more characters than the whole.)
        count = len(self.tokens)
        while count - 1 > self._settled and self._decode(count - 1)[:ends] == before:
            count -= 1
        self.tokens, self.log_probabilities = self.tokens[:count], self.log_probabilities[:count]
        self._text = self._text[:begin]

    def _final_text(self) -> str:
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
