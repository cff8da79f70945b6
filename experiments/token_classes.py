"""The class of a word's tokens: number, function word, inside a name, repeated, first mention."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

CLASSES = (
    "number",
    "function word",
    "inside a name",
    "repeated in context",
    "first mention",
    "punctuation",
)
# The most frequent English words that carry grammar: articles, pronouns, prepositions,
# conjunctions, auxiliaries, and a few adverbs.
_FUNCTION_WORDS = """
a about after all also although among an and any are as at be because been before being between
both but by can could did do does during each either else few for from had has have he her here him
his how however i if in into is it its itself just many may me might more most much must my near no
nor not of off on once one only or other our out over own same shall she should since so some such
than that the their them then there these they this those through to too under until up upon us very
was we were what when where whether which while who whom whose why will with within without would
you your
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
_WORD = re.compile(r"\d[\d.,]*|[^\W\d_]+(?:['’][^\W\d_]+)*|\S")


def classify(texts: Sequence[str]) -> Int32[np.ndarray, "T"]:
    """The class of every token of a text: an index into `CLASSES`.

    A token has the class of the word in which its first letter is. A word is inside a name if it
    and the word before it are capitalized, and nothing but spaces is between them. Other words are
    a first mention, or repeated if the text has had them before, in any case.

    Args:
        texts: the text that each token adds, in order.
    """
    whole, kinds = "".join(texts), []
    of_character = np.full(len(whole) + 1, CLASSES.index("punctuation"), np.int32)
    seen: set[str] = set()
    name_end = -1  # where a capitalized word has ended
    for found in _WORD.finditer(whole):
        word, lower = found.group(), found.group().lower()
        if word[0].isdigit():
            kind = "number"
        elif not word[0].isalpha():
            kind = "punctuation"
        elif lower in FUNCTION_WORDS:
            kind = "function word"
        elif word[0].isupper() and whole[name_end : found.start()].isspace() and name_end >= 0:
            kind = "inside a name"
        else:
            kind = "repeated in context" if lower in seen else "first mention"
        if word[0].isalpha():
            seen.add(lower)
            is_name = word[0].isupper() and lower not in FUNCTION_WORDS
            name_end = found.end() if is_name else -1
        of_character[found.start() : found.end()] = CLASSES.index(kind)
    place = 0
    for text in texts:
        first = place + len(text) - len(text.lstrip())
        kinds.append(of_character[min(first, len(whole))])
        place += len(text)
    return np.array(kinds, np.int32)
