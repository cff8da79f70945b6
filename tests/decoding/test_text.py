"""The text of a sequence while it grows: split characters, stop strings, ends."""

import re

import pytest

from engram_jax.decoding.text import GrowingText
from engram_jax.tokenizer import Tokenizer, load_tokenizer

TOKENIZER = load_tokenizer("default")
PROMPT = [TOKENIZER.bos_id, *TOKENIZER.encode("The city").tolist()]


def grow(text: str, *stop: str, limit: int = 1000, burst: int = 1) -> tuple[list[str], GrowingText]:
    """Adds the tokens of a text in bursts, then the end of the document."""
    whole = TOKENIZER.encode("The city" + text).tolist()
    ids = [*whole[len(PROMPT) - 1 :], TOKENIZER.eos_id]
    growing = GrowingText(TOKENIZER, PROMPT, stop, TOKENIZER.eos_id, limit)
    shown = []
    for begin in range(0, len(ids), burst):
        part = ids[begin : begin + burst]
        shown.append(growing.add(part, [-1.0] * len(part)))
        if growing.reason:
            break
    return shown, growing


@pytest.mark.parametrize("burst", [1, 3])
def test_split_characters_are_held_back(burst: int) -> None:
    text = " of 東京 🙂 is \U0001f9ff."
    shown, growing = grow(text, burst=burst)
    assert "".join(shown) == text == growing.finish().text
    assert not any("\ufffd" in part for part in shown)
    assert growing.finish().reason == "end"
    assert TOKENIZER.eos_id not in growing.finish().tokens


@pytest.mark.parametrize("burst", [1, 4, 100])
def test_a_stop_string_ends_the_text_and_is_never_shown(burst: int) -> None:
    shown, growing = grow(" of London is the capital.", "don is", "nothing", burst=burst)
    found = growing.finish()
    assert "".join(shown) == found.text == " of Lon"
    assert found.reason == "stop"
    # The fewest tokens whose text has the stop string.
    text = TOKENIZER.decode(PROMPT + found.tokens)
    assert "don is" in text and "don is" not in TOKENIZER.decode(PROMPT + found.tokens[:-1])
    assert len(found.log_probabilities) == len(found.tokens)


class BytesTokenizer(Tokenizer):
    """A token for every byte. Like SentencePiece, it drops a space at the start of a text, and each
    byte of a split character is decoded to U+FFFD.
    """

    def __init__(self) -> None:
        self.decoded: list[int] = []

    def decode(self, ids: list[int]) -> str:
        self.decoded.append(len(ids))
        text = bytes(ids).decode(errors="surrogateescape").removeprefix(" ")
        return re.sub("[\udc80-\udcff]", "\ufffd", text)


@pytest.mark.parametrize("burst", [1, 2, 3, 16])
@pytest.mark.parametrize("text", ["東X", "🙂X", "a東🙂X", "🙂\ufffdX", "東🙂"])
def test_a_stop_string_after_characters_spelled_in_bytes(text: str, burst: int) -> None:
    """All bytes up to the stop string's end are kept."""
    ids = [*text.encode(), *b"after it"]
    stop, shown = text[-1], []
    growing = GrowingText(BytesTokenizer(), [*b" of"], [stop], 256, 99)
    while growing.reason is None:
        part, ids = ids[:burst], ids[burst:]
        shown.append(growing.add(part, [-1.0] * len(part)))
    found = growing.finish()
    assert "".join(shown) == found.text == text.removesuffix(stop)
    assert bytes(found.tokens).decode() == text and found.reason == "stop"


@pytest.mark.parametrize("burst", [1, 3, 16])
def test_only_the_newest_tokens_are_decoded(burst: int) -> None:
    """So the work is linear; spaces between bursts stay."""
    text = "  of 東京 and 🙂, " * 50
    ids, tokenizer, shown = [*text.encode()], BytesTokenizer(), []
    growing = GrowingText(tokenizer, [*b" The city"], [", and"], 256, len(ids))
    for begin in range(0, len(ids), burst):
        part = ids[begin : begin + burst]
        shown.append(growing.add(part, [-1.0] * len(part)))
    assert "".join(shown) == text == growing.finish().text
    assert sum(tokenizer.decoded) < 8 * len(ids) and max(tokenizer.decoded) <= 64


def test_the_start_of_a_stop_string_is_shown_once_it_is_none() -> None:
    shown, growing = grow(" of London is here", "London was")
    assert "".join(shown) == " of London is here" and growing.finish().reason == "end"


def test_the_first_of_several_stop_strings_ends_the_text() -> None:
    _, growing = grow(" a b c d e", "d", "b", " c", burst=100)
    assert growing.finish().text == " a "


@pytest.mark.parametrize("burst", [1, 2, 3, 16])
def test_of_overlapping_stop_strings_the_first_to_be_complete_ends_the_text(burst: int) -> None:
    _, growing = grow(" of London is the capital.", "London is the", "is", burst=burst)
    assert growing.finish().text == " of London "


def test_the_limit_ends_the_text() -> None:
    _, growing = grow(" of London is the capital.", limit=3, burst=2)
    found = growing.finish()
    assert len(found.tokens) == 3 and found.reason == "length"
