"""The examples of the shipped tasks.

They are made when a task is loaded, so there is no copy of the texts. Each function is the
`custom_dataset` of a task's YAML file.
"""

import re
from typing import Any

import numpy as np

from engram_jax.config import DataConfig
from engram_jax.data.corpus import is_held_out
from engram_jax.data.documents import read_documents
from engram_jax.data.survey import document_hash

MOST_CHARACTERS = 600  # of a context; with what follows, fewer than 256 tokens

type Example = dict[str, Any]

_SENTENCE_END = re.compile(r"(?<=[a-z0-9)][.!?]) (?=[A-Z])")
# A capitalized word after a word in small letters. So it is not the start of a sentence.
_NAME = re.compile(r"(?<=[a-z]) ([A-Z][a-z]{2,})\b")
_FIELD = re.compile(r"\n([^\n:]{3,40}):( [^\n]{2,24})(?=\n)")


def next_sentence(**_: Any) -> Any:
    """Multiple choice: which is the third sentence of this article, and not of another one?"""
    found = []
    for text in held_out_texts("vital_en"):
        sentences = _SENTENCE_END.split(text)
        if len(sentences) < 4 or any(not 40 <= len(s) <= 250 for s in sentences[:3]):
            continue
        found.append((" ".join(sentences[:2]), sentences[2]))
    examples: list[Example] = []
    for number in range(len(found)):
        choices = [found[(number + other) % len(found)][1] for other in range(4)]
        place = number % 4
        choices[0], choices[place] = choices[place], choices[0]
        examples.append({"context": found[number][0], "sentences": choices, "answer": place})
    return _dataset(examples)


def names(**_: Any) -> Any:
    """The last name of the beginning of an article, which has appeared in it before."""
    examples: list[Example] = []
    for text in held_out_texts("vital_en"):
        text = text[:MOST_CHARACTERS]
        for match in reversed(list(_NAME.finditer(text))):
            before = text[: match.start()]
            if len(before) >= 150 and re.search(rf"\b{match[1]}\b", before):
                examples.append({"context": before, "name": match[1]})
                break
    return _dataset(examples)


def fields(**_: Any) -> Any:
    """Short values of the fields of a country's section, at most two of a section."""
    examples: list[Example] = []
    for text in held_out_texts("factbook"):
        for match in list(_FIELD.finditer(text[:MOST_CHARACTERS]))[-2:]:
            examples.append({"context": text[: match.start(2)], "value": match[2].strip()})
    return _dataset(examples)


def held_out_texts(source: str, share: float = DataConfig().held_out) -> list[str]:
    """The documents of a source that a run with this share holds out, in the order of their hash.

    Equal documents are one.
    """
    texts = {document_hash(found.text.encode()): found.text for found in read_documents(source)}
    hashes = np.array(sorted(texts), np.uint64)
    return [texts[int(number)] for number in hashes[is_held_out(hashes, share)]]


def _dataset(examples: list[Example]) -> Any:
    from datasets import Dataset

    return {"test": Dataset.from_list(examples)}
