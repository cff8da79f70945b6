"""Gate maps: which tokens of a text let their memory through, as a page and as a picture.

After Figure 7 of the Engram paper: a token is the redder, the wider its gate opened for the memory
of the n-grams that end there.
"""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle

from engram_jax.data.packing import Batch
from engram_jax.errors import InputError
from engram_jax.evaluation.held_out import Scorer
from engram_jax.run import Run
from engram_jax.tokenizer import Tokenizer
from engram_jax.train_state import TrainState

_WHITE, _RED = np.array([255, 255, 255]), np.array([244, 84, 74])  # black text reads on both
_MARKS = str.maketrans({"\n": "↵", "\r": "↵", "\t": "⇥"})


@dataclass(frozen=True)
class GateMap:
    """The gates of a text. T: its tokens, without bos.

    Attributes:
        texts: what each token adds to the text; "" for a token that ends inside a character.
        labels: what to show for each token: its text, or its piece where the text is "".
        losses: cross-entropy of each token in nats.
        gates: by layer id, the gate of each token, the mean over the branches.
        max_order: largest n-gram order N that the memory reads.
    """

    texts: list[str]
    labels: list[str]
    losses: Float[np.ndarray, "T"]
    gates: dict[int, Float[np.ndarray, "T"]]
    max_order: int

    def ngrams(self, token: int) -> list[str]:
        """The n-grams that end at a token and are looked up there, orders 2…N."""
        labels = ["⊢", *self.labels[: token + 1]]  # bos
        return ["".join(labels[-order:]) for order in range(2, self.max_order + 1)]

    def scale(self, layer: int) -> tuple[float, float]:
        """The gates drawn white and full red: a layer's 5th and 95th percentile.

        Gates σ(±√|s|) cluster on both sides of ½, so that a fixed scale from 0 to 1 shows little.
        """
        low, high = np.percentile(self.gates[layer], [5, 95])
        return float(low), float(max(high, low + 0.01))


def read_gates(run: Run, scorer: Scorer, state: TrainState, text: str) -> GateMap:
    """Reads a text, as a document of its own, and keeps the gates.

    A text longer than the window T is read in windows that overlap by half; every token's gate
    is that of a window in which it has at least T/2 tokens before it (or the text's beginning).

    Args:
        run: the run.
        scorer: as `make_scorer` gives it; the compiled shape is that of evaluation.
        state: parameters and tables; they are only read.
        text: any text.

    Raises:
        InputError: the text is empty, or the model has no Engram layer.
    """
    tokenizer, planner = run.tokenizer, run.planner()
    if planner is None or not run.config.memory.sites.layers:
        raise InputError(f"The model in {run.folder} has no Engram layer, hence no gates to show.")
    ids = tokenizer.encode(text)
    if not len(ids):
        raise InputError("The text for the gate map is empty; give at least one character.")
    length = run.config.data.sequence_length
    rows = run.config.data.batch_size // run.config.train.accumulation
    whole = np.concatenate([[tokenizer.bos_id], ids]).astype(np.int32)
    losses = np.zeros(len(whole))
    gates = {layer: np.zeros(len(whole)) for layer in run.config.memory.layers}
    starts = list(range(0, max(len(whole) - length, 0) + length // 2, max(length // 2, 1)))
    for first in range(0, len(starts), rows):
        chosen = starts[first : first + rows]
        batch = _windows(whole, chosen, rows, length, tokenizer.pad_id)
        batch = batch._replace(plan=planner(batch.tokens, batch.segments))
        with jax.set_mesh(run.mesh):
            read = multihost_utils.process_allgather(
                scorer(state.params, state.tables, run.put(batch)), tiled=True
            )
        by_token, by_layer = jax.tree.map(lambda array: np.asarray(array)[0], read)
        for row, start in enumerate(chosen):
            # Later windows know more of what comes before their second half.
            fresh = 0 if start == 0 else length // 2
            place = slice(start + fresh, min(start + length, len(whole)))
            inside = slice(fresh, place.stop - start)
            losses[place] = by_token[row, inside]
            for layer, of_layer in by_layer.items():
                gates[layer][place] = of_layer[row, inside].mean(axis=-1)
    texts = list(_token_texts(tokenizer, ids))
    return GateMap(
        texts=texts,
        labels=[
            text or tokenizer.piece(int(token)) for text, token in zip(texts, ids, strict=True)
        ],
        losses=losses[:-1],  # position i predicts token i + 1, and bos stands before the text
        gates={layer: values[1:] for layer, values in gates.items()},
        max_order=run.config.memory.max_order,
    )


def write_html(gate_map: GateMap, path: Path) -> None:
    """Writes the map as a page of its own: one panel per layer, numbers on hovering."""
    panels = "\n".join(_panel(gate_map, layer) for layer in gate_map.gates)
    path.write_text(_PAGE.replace("PANELS", panels), encoding="utf-8")


def write_png(gate_map: GateMap, path: Path, *, width: float = 8.3, font_size: float = 9) -> None:
    """Writes the map as a picture.

    Args:
        gate_map: the map.
        path: where to.
        width: in inches, of 200 pixels each.
        font_size: in points.
    """
    text_width, line, margin = width * 72, 1.75 * font_size, 1.2 * font_size
    pen = _Pen(font_size)
    lines = list(_wrap(gate_map.labels, pen, text_width - 2 * margin))
    height = (len(lines) * line + 3.4 * font_size) * len(gate_map.gates) + 1.5 * margin
    figure = Figure(figsize=(width, height / 72), dpi=200, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, text_width), ylim=(height, 0))
    axes.set_axis_off()
    top = margin
    for layer, gates in gate_map.gates.items():
        low, high = gate_map.scale(layer)
        top += font_size
        axes.text(margin, top, f"Layer {layer}", fontsize=font_size, weight="bold")
        legend = (f"gate ≤ {low:.2f}", f"≥ {high:.2f}")
        x = text_width - margin - pen.width(legend[1])
        axes.text(x, top, legend[1], fontsize=font_size, color="#444")
        x -= 11.5 * font_size
        axes.imshow(
            np.stack([_color(share) for share in np.linspace(0, 1, 64)])[None] / 255,
            extent=(x, x + 11 * font_size, top + 0.15 * font_size, top - 0.8 * font_size),
            aspect="auto",
        )
        axes.add_patch(
            Rectangle(
                (x, top - 0.8 * font_size),
                11 * font_size,
                0.95 * font_size,
                fill=False,
                edgecolor="#bbb",
                linewidth=0.5,
            )
        )
        x -= pen.width(legend[0]) + 0.5 * font_size
        axes.text(x, top, legend[0], fontsize=font_size, color="#444")
        top += 1.2 * font_size
        for tokens in lines:
            x = margin
            for token, shown in tokens:
                color = _color((gates[token] - low) / (high - low)) / 255
                advance = pen.width(shown)
                box = Rectangle(
                    (x, top),
                    advance,
                    0.86 * line,
                    facecolor=color,
                    edgecolor="white",
                    linewidth=0.6,
                )
                axes.add_patch(box)
                axes.text(
                    x, top + 0.6 * line, shown, fontsize=font_size, color="#111", parse_math=False
                )
                x += advance
            top += line
        top += 1.2 * font_size
    # imshow moves the limits.
    axes.set(xlim=(0, text_width), ylim=(height, 0))
    figure.savefig(path)


class _Pen:
    """Widths of texts in DejaVu Sans, Matplotlib's own font."""

    def __init__(self, size: float) -> None:
        self._font = FT2Font(font_manager.findfont("DejaVu Sans"))
        self._font.set_size(size, 72)
        self._known = self._font.get_charmap()

    def spell(self, text: str) -> str:
        """The text, with □ for characters that the font lacks."""
        return "".join(char if ord(char) in self._known else "□" for char in text)

    def width(self, text: str) -> float:
        """Its width in points."""
        return sum(self._font.load_char(ord(char)).linearHoriAdvance / 65536 for char in text)


def _wrap(labels: Sequence[str], pen: _Pen, width: float) -> Iterator[list[tuple[int, str]]]:
    """Lines of (token, what is drawn of it); breaks fall before words and after line ends."""
    line: list[tuple[int, str]] = []
    used = 0.0
    for word in _words(labels):
        shown = [(token, pen.spell(labels[token].translate(_MARKS))) for token in word]
        needed = sum(pen.width(text) for _, text in shown)
        if line and used + needed > width:
            yield line
            line, used = [], 0.0
        for token, text in shown:
            text = text if line else text.lstrip(" ") or text
            if line and used + pen.width(text) > width:
                yield line
                line, used = [], 0.0
            line.append((token, text))
            used += pen.width(text)
        if "\n" in labels[word[-1]]:
            yield line
            line, used = [], 0.0
    if line:
        yield line


def _words(labels: Sequence[str]) -> Iterator[list[int]]:
    """Token numbers, grouped so that a group begins with a space or after a line end."""
    word: list[int] = []
    for token, label in enumerate(labels):
        if word and (label[:1].isspace() or "\n" in labels[token - 1]):
            yield word
            word = []
        word.append(token)
    if word:
        yield word


def _color(share: float) -> Float[np.ndarray, "3"]:
    return _WHITE + (_RED - _WHITE) * min(max(share, 0.0), 1.0)


def _panel(gate_map: GateMap, layer: int) -> str:
    low, high = gate_map.scale(layer)
    spans = []
    for token, gate in enumerate(gate_map.gates[layer]):
        red, green, blue = _color((gate - low) / (high - low)).round().astype(int)
        ngrams = [f"{text!r}" for text in gate_map.ngrams(token)]
        title = (
            f"gate {gate:.3f}, loss {gate_map.losses[token]:.2f}\nlooked up: {', '.join(ngrams)}"
        )
        label = gate_map.labels[token]
        # The mark stands for the line end, which follows it outside of the colored box.
        after = "\n" * label.count("\n")
        spans.append(
            f'<span style="background:rgb({red},{green},{blue})" title="{html.escape(title)}">'
            f"{html.escape(label.translate(_MARKS))}</span>{after}"
        )
    return (
        f"<section><h2>Layer {layer}</h2>"
        f'<p class="legend">gate ≤ {low:.2f} <i></i> ≥ {high:.2f} (5th and 95th percentile; '
        f"mean {gate_map.gates[layer].mean():.2f})</p>"
        f'<p class="text">{"".join(spans)}</p></section>'
    )


def _windows(
    ids: Int[np.ndarray, "tokens"], starts: Sequence[int], rows: int, length: int, pad_id: int
) -> Batch:
    """One micro-batch whose first rows are the windows that begin at `starts`."""
    places = np.arange(length)
    index = np.full((rows, length), len(ids))
    index[: len(starts)] = np.array(starts)[:, None] + places
    index = np.minimum(index, len(ids))[None]
    padded = np.append(ids, [pad_id, pad_id]).astype(np.int32)
    inside = index < len(ids)
    return Batch(
        tokens=padded[index],
        targets=padded[index + 1],
        target_mask=(index + 1 < len(ids)).astype(np.float32),
        segments=inside.astype(np.int32),
        positions=np.where(inside, places, 0).astype(np.int32),
    )


def _token_texts(tokenizer: Tokenizer, ids: Int[np.ndarray, "T"]) -> Iterator[str]:
    """What every token adds to the text; a token that ends inside a character adds nothing yet."""
    whole, done = tokenizer.decode(ids), 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        if whole.startswith(text) and len(text) > done:
            yield text[done:]
            done = len(text)
        else:
            yield ""


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Engram gate map</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 1.5rem 0 0; }
.legend { font-size: .85rem; margin: .2rem 0 .5rem; }
.legend i { display: inline-block; width: 8rem; height: .8em; vertical-align: -.05em;
  border: 1px solid #999; background: linear-gradient(to right, WHITE, RED); }
.text { background: #fff; color: #111; padding: .8rem 1rem; border: 1px solid #999;
  border-radius: .4rem; line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere; }
.text span { padding: .15em 0; border-radius: .2em; box-shadow: inset -1px 0 #fff; }
.text span:hover { outline: 2px solid #111; }
</style>
<h1>Engram gate map</h1>
<p>The redder a token, the wider its gate opened for the memory of the n-grams that end there.
Hover over a token for its gate, its loss in nats and those n-grams (⊢ is the text's beginning;
before hashing, n-grams lose case and accents).</p>
PANELS
</html>
"""
_PAGE = _PAGE.replace("WHITE", "rgb(255,255,255)").replace("RED", "rgb(244,84,74)")
