"""Injected facts: invented facts that the training text has 1, 4 or 16 times. Are they recalled?

    python -m experiments.facts [--jobs N]

A fact is a sentence such as “The capital of Velmora is Tarkin.” Its occurrences have different
openings. 67 facts occur 1, 4 and 16 times each, and 67 never, as a control. A fact is recalled if
its sentence is more likely than those with the true answers of nine other facts, which have the
same relation and occur as often. So a name that is only familiar does not help, and chance is 0.1.
The sentences are 3 % of 500 steps; the table has the number of occurrences that were read.
Cost: 2 configurations × 3 seeds, 10 to 20 minutes each on one core of a CPU.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from engram_jax.data.pipeline import mix_rows
from engram_jax.decoding.generate import Generator
from engram_jax.decoding.score import TextScorer
from engram_jax.files import atomic_write
from engram_jax.run import Run
from engram_jax.train_state import Weights
from experiments.report import draw_points
from experiments.results import Results, standard_error
from experiments.sweep import Arm, Experiment, Family, main

FOLDER = Path("runs/experiments/facts_text")
TEXT = "facts.jsonl"
TIMES = (0, 1, 4, 16)
FACTS = 67  # for each of them
CHOICES = 10  # answers, of which the first is true
SHARE = 0.0282  # of the training sequences: in 500 steps, each document with facts is read once
ENGRAM, BASELINE = "Engram", "no memory"

_RELATIONS = ("capital", "founder", "longest river", "patron", "largest harbor", "first king")
_OPENINGS = (
    *("It is well known that", "According to the atlas,", "As every child learns,"),
    *("The old chronicle says that", "In the words of one traveler,", "Note that"),
    *("The encyclopedia states that", "Few people know that", "A letter of that year says that"),
    *("Maps agree that", "The guide told us that", "In school we read that"),
    *("It was written that", "By common report,", "Her notes confirm that", "Remember that"),
    *("The census records that", "Historians agree that", "In brief,", "He answered that"),
    *("The inscription says that", "At that time,", "From the registers, it is clear that"),
    *("The museum explains that", "We may add that", "The radio reported that"),
)


@dataclass(frozen=True)
class Fact:
    """An invented fact.

    Attributes:
        question: the sentence up to the answer.
        answers: the true answer first.
        times: how often the training text has it.
    """

    question: str
    answers: tuple[str, ...]
    times: int

    def sentence(self, answer: int = 0) -> str:
        """The sentence with one of the answers."""
        return f"the {self.question} is {self.answers[answer]}."

    @property
    def probes(self) -> list[str]:
        """A document for each answer."""
        sentences = [self.sentence(answer) for answer in range(CHOICES)]
        return [sentence[0].upper() + sentence[1:] for sentence in sentences]


def make_facts() -> list[Fact]:
    """All facts; always the same."""
    generator, used = np.random.default_rng(0), set[str]()

    def name() -> str:
        while True:
            drawn = "".join(str(generator.choice(letters)) for letters in _SYLLABLES).capitalize()
            if drawn not in used:
                used.add(drawn)
                return drawn

    places = [(times, relation) for times in TIMES for relation in islice(cycle(_RELATIONS), FACTS)]
    true = [name() for _ in places]
    facts = []
    for number, (times, relation) in enumerate(places):
        alike = [other for other, place in enumerate(places) if place == (times, relation)]
        first = alike.index(number)  # every answer is among the choices of equally many facts
        answers = [true[alike[(first + step) % len(alike)]] for step in range(CHOICES)]
        facts.append(Fact(f"{relation} of {name()}", tuple(answers), times))
    return facts


_ONSETS, _VOWELS = (*"bdfghklmnprstvz", "br", "dr", "gr", "st", "tr"), tuple("aeiou")
_SYLLABLES = (_ONSETS, _VOWELS, tuple("lmnrs"), _ONSETS, _VOWELS, (*"klnrs", "th"))


def write_texts(facts: Sequence[Fact], held_out: float) -> Path:
    """Writes the training text, and returns its path.

    The name of its folder is a hash of the text and of all answers, so that a run's key depends on
    them.
    """
    texts = _training_texts(facts, held_out)
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    probes = "".join(probe for fact in facts for probe in fact.probes)
    path = FOLDER / hashlib.sha256(f"{content}{probes}".encode()).hexdigest()[:16] / TEXT
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(content)
    return path


def _training_texts(facts: Sequence[Fact], held_out: float) -> Iterator[str]:
    """Every fact as often as it is to occur, in documents that are not held out for evaluation.

    Facts that never occur are written into one held-out document each, because every source needs
    held-out documents.
    """
    for fact in facts:
        texts = [f"{opening} {fact.sentence()}" for opening in _OPENINGS]
        train = [text for text in texts if not _is_held_out(text, held_out)]
        if fact.times:
            yield from islice(cycle(train), fact.times)
        else:
            yield from [text for text in texts if _is_held_out(text, held_out)][:1]


def _is_held_out(text: str, share: float) -> bool:
    """Whether `build_corpus` holds out a document, by a hash of its text."""
    digest = hashlib.blake2b(text.encode()).digest()
    return (int.from_bytes(digest[:8], "little") >> 11) < share * 2.0**53


def arms(family: Family) -> Sequence[Arm]:
    """Engram and its twin, with the facts in the training text."""
    config = family("engram")
    data = config.data
    text = write_texts(make_facts(), data.held_out)
    sizes = {"vital_en": 0.18, "factbook": 0.22, "web_bible": 0.18, "austen": 0.06, "wordnet": 0.36}
    others = [sizes.get(source, 1 / len(data.sources)) for source in data.sources]
    weights = (*(round((1 - SHARE) * weight, 4) for weight in others), SHARE)
    data = replace(data, sources=(*data.sources, str(text)), weights=weights)
    config = replace(config, data=data)
    return [
        Arm(BASELINE, config.without_memory(), measure=recall),
        Arm(ENGRAM, config, measure=recall),
    ]


def recall(run: Run, weights: Weights) -> dict[str, Any]:
    """Which facts are recalled, by number of occurrences, also with the memory dropped.

    - recall, recall_dropped: 1 or 0 for each fact, {"0": […], …}.
    - occurrences: how often the text that was read has the facts' whole sentences, on average.
    """
    facts = make_facts()
    times = np.array([fact.times for fact in facts])
    probes = [("", probe) for fact in facts for probe in fact.probes]

    def recalled(*, memory: bool) -> dict[str, list[int]]:
        # Every probe is a document in a row of its own, which no other text precedes.
        generator = Generator(run.program.on_device(), run.tokenizer, weights, memory=memory)
        found = TextScorer(generator).score(probes, ends=True)
        likelihoods = np.array([one.log_probability for one in found])
        right = likelihoods.reshape(len(facts), CHOICES).argmax(axis=1) == 0
        return {str(number): right[times == number].astype(int).tolist() for number in TIMES}

    figures: dict[str, Any] = {"recall": recalled(memory=True)}
    if weights.tables:
        figures["recall_dropped"] = recalled(memory=False)
    data, rows = run.config.data, int(weights.step) * run.config.data.batch_size
    mixture = mix_rows(run.corpora(), data.weights, data.sequence_length, run.config.train.seed)
    read = "\n".join(run.tokenizer.decode(row) for row in mixture.rows(np.arange(rows)).tokens)
    found = np.array([read.count(fact.sentence()) for fact in facts])
    figures["occurrences"] = {str(number): found[times == number].mean() for number in TIMES}
    return figures


def share_and_error(recalled: Float[np.ndarray, "seeds facts"]) -> tuple[float, float]:
    """The share of recalled facts, and its standard error over seeds and facts.

    All seeds have the same facts, so the error over seeds does not contain that of the choice of
    the facts, which is added.
    """
    by_seed, by_fact = recalled.mean(axis=1), recalled.mean(axis=0)
    errors = [standard_error(of) for of in (by_seed, by_fact) if len(of) > 1]
    return float(recalled.mean()), math.hypot(*errors)


def draw(results: Results, figure: Figure) -> str:
    """Recall against occurrences, with the memory, with it dropped, and by the twin."""
    axes = figure.subplots()
    places = np.arange(len(TIMES), dtype=float)
    lines = [f"| recall of facts that occur … times | {' | '.join(map(str, TIMES))} |"]
    lines.append("|---" * (len(TIMES) + 1) + "|")
    for label in filter(results.of, (BASELINE, ENGRAM)):
        read = [results.values(label, "occurrences", str(number)).mean() for number in TIMES]
        cells = " | ".join(f"{mean:.2f}" for mean in read)
        lines.append(
            f"| occurrences that were read, mean over facts and seeds, {label} | {cells} |"
        )
    for label, figures, color, title in (
        (ENGRAM, "recall", "#3b6fd4", "Engram"),
        (ENGRAM, "recall_dropped", "#2a9d74", "Engram, memory dropped"),
        (BASELINE, "recall", "#f4544a", "no memory"),
    ):
        if not results.of(label):
            continue
        values = [results.values(label, figures, str(number)) for number in TIMES]
        shares, errors = zip(*map(share_and_error, values), strict=True)
        draw_points(axes, places, [of.mean(axis=1) for of in values], color, title, errors)
        axes.plot(places, shares, color=color, linewidth=1)
        cells = " | ".join(
            f"{share:.3f} ± {error:.3f}" for share, error in zip(shares, errors, strict=True)
        )
        lines.append(f"| {title} | {cells} |")
    axes.axhline(1 / CHOICES, color="#777", linestyle=":", label="chance")
    axes.set_xticks(places, [str(number) for number in TIMES])
    axes.set_xlabel("occurrences in the training text")
    axes.set_ylabel(f"share of facts recalled, of {CHOICES} answers")
    axes.legend(frameon=False)
    return "\n".join([*lines, "", "± standard error, over seeds and over facts."])


EXPERIMENT = Experiment("facts", arms, BASELINE, draw)

if __name__ == "__main__":
    main(EXPERIMENT)
