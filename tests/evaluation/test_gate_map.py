from dataclasses import replace
from html.parser import HTMLParser

import jax
import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import plain_pass

from engram_jax.errors import InputError
from engram_jax.evaluation.gate_map import GateMap, read_gates, write_html, write_png
from engram_jax.evaluation.held_out import make_scorer

TEXT = "Alexander the Great was\n\tborn in 東京 & <script>alert('$x_1$')</script> 🎉 “café”.\n\n"


@pytest.fixture(scope="module")
def scorer(run):
    return make_scorer(run.program)


@pytest.fixture(scope="module")
def read(run, scorer, weights):
    return lambda text: read_gates(run, scorer, weights, text)


class Page(HTMLParser):
    """The colored tokens of a page, and what its elements name."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tokens: list[str] = []
        self.tags: set[str] = set()
        self.titles: list[str] = []
        self.attributes: set[str] = set()
        self._in_token = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "span":
            self._in_token = True
            self.tokens.append("")
            self.titles.append(dict(attributes)["title"])

    def handle_endtag(self, tag):
        self._in_token = self._in_token and tag != "span"

    def handle_data(self, data):
        if self._in_token:
            self.tokens[-1] += data


def test_tokens_spell_the_text(run, read):
    gate_map = read(TEXT)
    assert "".join(gate_map.texts) == TEXT
    assert len(gate_map.texts) == len(run.tokenizer.encode(TEXT)) == len(gate_map.losses)
    assert all(gate_map.labels)
    # 東 is three bytes: two tokens inside it, and the one that completes it.
    place = gate_map.texts.index("東")
    assert gate_map.texts[place - 2 : place] == ["", ""]
    assert gate_map.labels[place - 2] == "·"


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
@settings(max_examples=25)
def test_any_text_is_spelled_and_gated(read, text):
    gate_map = read(text)
    assert "".join(gate_map.texts) == text
    assert np.all((gate_map.gates[1] > 0) & (gate_map.gates[1] < 1))


def test_windows_of_a_long_text_are_plain_passes(run, weights, read):
    """Computed manually: the decoder on each window; of later windows, only the second half."""
    text = "one two three four five six seven eight nine ten " * 9
    gate_map = read(text)
    ids = np.concatenate([[run.tokenizer.bos_id], run.tokenizer.encode(text)]).astype(np.int32)
    length, half = 24, 12
    assert length == run.config.data.sequence_length and len(ids) > 3 * length
    decode = plain_pass(run, weights)
    expected = np.zeros(len(ids))
    for start in range(0, len(ids) - length + 1, half):
        window = ids[None, start : start + length]
        positions = np.arange(length, dtype=np.int32)[None]
        _, gates = decode(window, np.ones_like(window), positions)
        fresh = half if start else 0
        expected[start + fresh : start + length] = np.asarray(gates[1])[0, fresh:, 0]
    full = start + length
    np.testing.assert_allclose(gate_map.gates[1][: full - 1], expected[1:full], rtol=1e-5)
    # The last window is shorter than T.
    assert len(gate_map.gates[1]) == len(ids) - 1 >= full
    assert np.all(gate_map.gates[1] > 0) and np.all(gate_map.losses > 0)


def test_losses_are_those_of_evaluation(run, read):
    """Losses of a complete document, with bos and without eos."""
    gate_map = read("Alexander the Great")
    shorter = read("Alexander the")
    np.testing.assert_allclose(gate_map.losses[: len(shorter.losses)], shorter.losses, rtol=1e-5)
    # The model is untrained, so every loss is close to log V.
    np.testing.assert_allclose(gate_map.losses, np.log(8192), atol=1)


def test_reading_writes_nothing(weights, read):
    before = jax.device_get(weights.tables)
    first, second = read(TEXT), read(TEXT)
    np.testing.assert_array_equal(first.gates[1], second.gates[1])
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(weights.tables))


def test_colors_rank_the_gates():
    gates = np.array([0.9, 0.2, 0.95, 0.9, 0.5])
    gate_map = GateMap(list("abcde"), list("abcde"), np.zeros(5), {1: gates}, 3)
    np.testing.assert_allclose(gate_map.shares(1), [0.625, 0, 1, 0.625, 0.25])
    assert gate_map.quartiles(1) == ["0.20", "0.50", "0.90", "0.90", "0.95"]
    alone = GateMap(["a"], ["a"], np.zeros(1), {1: gates[:1]}, 3)
    assert alone.shares(1) == [0]
    assert gate_map.ngrams(3) == ["cd", "bcd"]
    assert gate_map.ngrams(0) == ["⊢a"]


def test_page_is_whole_escaped_and_self_contained(read, tmp_path):
    gate_map = read(TEXT)
    gate_map = replace(gate_map, gates=gate_map.gates | {5: gate_map.gates[1] / 2})
    write_html(gate_map, tmp_path / "gates.html")
    text = (tmp_path / "gates.html").read_text(encoding="utf-8")
    page = Page(text)
    marked = [label.replace("\n", "↵").replace("\t", "⇥") for label in gate_map.labels]
    assert page.tokens == marked * 2  # one panel per layer
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert not page.attributes & {"src", "href", "onclick"}
    assert not any(word in text for word in ("http", "url(", "@import"))
    assert f"{gate_map.gates[1][4]:.3f}" in page.titles[4]
    assert all(ngram in page.titles[3] for ngram in gate_map.ngrams(3))


def test_picture_has_colors_and_the_width_asked_for(read, tmp_path):
    gate_map = read(TEXT)
    write_png(gate_map, tmp_path / "gates.png", width=6.0)
    picture = matplotlib.image.imread(tmp_path / "gates.png")
    assert picture.shape[1] == 1200
    red, green = picture[..., 0], picture[..., 1]
    assert ((red > 0.9) & (green < 0.4)).any()
    # Nothing is drawn in the margins.
    np.testing.assert_array_equal(picture[:, :20, :3], 1)
    np.testing.assert_array_equal(picture[:, -20:, :3], 1)


def test_pictures_of_long_words_and_texts_stay_within_bounds(read, tmp_path):
    write_png(read("x" * 150 + "\n" * 200), tmp_path / "gates.png", width=3.0, max_lines=5)
    picture = matplotlib.image.imread(tmp_path / "gates.png")
    assert picture.shape[0] < 600
    np.testing.assert_array_equal(picture[:, -20:, :3], 1)


def test_an_empty_text_is_refused(read):
    with pytest.raises(InputError, match="empty"):
        read("")


@pytest.mark.parametrize("memory", ["dense", "over_encoding"])
def test_models_without_gates_are_refused(memory, untrained):
    run = untrained(memory)
    with pytest.raises(InputError, match="no Engram layer"):
        read_gates(run, make_scorer(run.program), run.restore_weights(), "text")
