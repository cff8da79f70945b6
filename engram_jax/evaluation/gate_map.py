"""Gate maps: the gate of every token of a text, as an HTML page and as a picture.

As in Figure 7 of the Engram paper, a token is redder if its gate for the memory of the n-grams that
end there is larger, compared with the other tokens of the text.
"""

import html
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle

from engram_jax.data.packing import Batch
from engram_jax.errors import InputError
from engram_jax.evaluation.held_out import Scorer, score_batch
from engram_jax.files import atomic_write
from engram_jax.run import Run
from engram_jax.tokenizer import Tokenizer
from engram_jax.train_state import Weights

_WHITE, _RED = np.array([255, 255, 255]), np.array([244, 84, 74])  # black text is legible on both
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
_MARKS = str.maketrans({"\n": "↵", "\r": "↵", "\t": "⇥"})


@dataclass(frozen=True)
class GateMap:
    """The gates of a text. T is the number of its tokens, without bos.

    Attributes:
        texts: the part of the text that each token adds; "" for a token that ends inside a
            character.
        labels: the text to show for each token: as in `texts`, but "·" instead of "".
        losses: cross-entropy of each token in nats.
        gates: by layer id, the gate of each token, the mean over the branches.
        max_order: largest n-gram order N of the memory.
    """

    texts: list[str]
    labels: list[str]
    losses: Float[np.ndarray, "T"]
    gates: dict[int, Float[np.ndarray, "T"]]
    max_order: int

    def ngrams(self, token: int) -> list[str]:
        """The n-grams that end at a token and are looked up for it, of orders 2…N."""
        labels = ["⊢", *self.labels[: token + 1]]  # bos
        longest = min(self.max_order, len(labels))
        return ["".join(labels[-order:]) for order in range(2, longest + 1)]

    def shares(self, layer: int) -> Float[np.ndarray, "T"]:
        """For every token, the share of the text's tokens with a smaller gate (ties count half).

        The colors show this share, not the gate itself. After training most gates are close to 1,
        because σ(±√|s|) has few values near 0.5. On a scale of gates most tokens would look equal.
        """
        gates = self.gates[layer]
        ascending = np.sort(gates)
        below = np.searchsorted(ascending, gates, "left")
        return (below + np.searchsorted(ascending, gates, "right") - 1) / 2 / max(len(gates) - 1, 1)

    def quartiles(self, layer: int) -> list[str]:
        """The gates at the five ticks of the color scale: minimum, quartiles, maximum."""
        return [f"{gate:.2f}" for gate in np.quantile(self.gates[layer], _TICKS)]


def read_gates(run: Run, scorer: Scorer, weights: Weights, text: str) -> GateMap:
    """Computes the gates of a text, as one document. All processes must call this.

    A text longer than L = data.sequence_length tokens is read in windows of L tokens that overlap
    by half. The gate of a token is from the window in which at least L/2 tokens precede it, or all
    tokens of the text that precede it.

    Args:
        run: the run.
        scorer: from `make_scorer`; it is called with the same shapes as in evaluation.
        weights: parameters and tables.
        text: any text.

    Raises:
        InputError: the text is empty, or the model has no Engram layer.
    """
    tokenizer = run.tokenizer
    if not run.config.memory.sites.layers:
        raise InputError(f"The model in {run.folder} has no Engram layer, so it has no gates.")
    ids = tokenizer.encode(text)
    if not len(ids):
        raise InputError("The text for the gate map is empty; it needs at least one character.")
    length = run.config.data.sequence_length
    rows = run.config.evaluate_batch_size
    whole = np.concatenate([[tokenizer.bos_id], ids]).astype(np.int32)
    losses = np.zeros(len(whole))
    gates = {layer: np.zeros(len(whole)) for layer in run.config.memory.layers}
    half = max(length // 2, 1)
    starts = list(range(0, max(len(whole) - length, 0) + half, half))
    for first in range(0, len(starts), rows):
        chosen = starts[first : first + rows]
        batch = _windows(whole, chosen, rows, length, tokenizer.pad_id)
        with run.program.use_mesh():
            by_token, by_layer, _ = score_batch(
                run.program, scorer, weights, batch, with_gates=True
            )
        for row, start in enumerate(chosen):
            # Of every window except the first, only the second half is used.
            fresh = 0 if start == 0 else length - half
            place = slice(start + fresh, min(start + length, len(whole)))
            inside = slice(fresh, place.stop - start)
            losses[place] = by_token[row, inside]
            for layer, of_layer in by_layer.items():
                gates[layer][place] = of_layer[row, inside].mean(axis=-1)
    texts = list(_token_texts(tokenizer, ids))
    return GateMap(
        texts=texts,
        labels=[text or "·" for text in texts],
        losses=losses[:-1],  # position i predicts token i + 1, and position 0 is bos
        gates={layer: values[1:] for layer, values in gates.items()},
        max_order=run.config.memory.max_order,
    )


def write_html(gate_map: GateMap, path: Path) -> None:
    """Writes the map as a self-contained page: one panel per layer, numbers on hovering."""
    panels = "\n".join(_panel(gate_map, layer) for layer in gate_map.gates)
    with atomic_write(path) as partial:
        partial.write_text(_PAGE.replace("PANELS", panels), encoding="utf-8")


def write_png(
    gate_map: GateMap,
    path: Path,
    *,
    width: float = 8.3,
    font_size: float = 9.0,
    max_lines: int = 60,
) -> None:
    """Writes the map as a picture, with □ for characters that DejaVu Sans does not have.

    Args:
        gate_map: the map.
        path: the file to write.
        width: in inches, of 200 pixels each.
        font_size: in points.
        max_lines: maximum lines of a panel; the rest of a longer text is not drawn.
    """
    text_width, line, margin = width * 72, 1.75 * font_size, 1.2 * font_size
    pen = _Pen(font_size)
    wrapped = _wrap(gate_map.labels, pen, text_width - 2 * margin)
    lines = list(itertools.islice(wrapped, max_lines))
    height = (len(lines) * line + 3.5 * font_size) * len(gate_map.gates) + 1.5 * margin
    figure = Figure(figsize=(width, height / 72), dpi=200, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, text_width), ylim=(height, 0))
    axes.set_axis_off()
    top = margin
    for layer in gate_map.gates:
        top += font_size
        axes.text(margin, top, f"Layer {layer}", fontsize=font_size, weight="bold")
        _draw_legend(axes, gate_map.quartiles(layer), text_width - margin, top, font_size)
        top += 1.5 * font_size
        shares = gate_map.shares(layer)
        for tokens in lines:
            x = margin
            for token, shown in tokens:
                advance = pen.width(shown)
                color = _color(shares[token]) / 255
                box = (x, top), advance, 0.86 * line
                axes.add_patch(Rectangle(*box, facecolor=color, edgecolor="white", linewidth=0.6))
                axes.text(
                    x, top + 0.6 * line, shown, fontsize=font_size, color="#111", parse_math=False
                )
                x += advance
            top += line
        top += font_size
    # imshow changes the limits, so they are set again.
    axes.set(xlim=(0, text_width), ylim=(height, 0))
    with atomic_write(path) as partial:
        figure.savefig(partial)


def _draw_legend(axes: Axes, ticks: list[str], right: float, top: float, size: float) -> None:
    step = 3.2 * size
    left = right - step * len(ticks)
    axes.text(
        left - 0.5 * size,
        top,
        "gates: minimum, quartiles, maximum",
        fontsize=0.8 * size,
        color="#444",
        ha="right",
    )
    ramp = np.stack([_color(share) for share in np.linspace(0, 1, 128)])[None] / 255
    axes.imshow(ramp, extent=(left, right, top + 0.35 * size, top - size), aspect="auto")
    box = (left, top - size), right - left, 1.35 * size
    axes.add_patch(Rectangle(*box, fill=False, edgecolor="#bbb", linewidth=0.5))
    aligned = ["left", *["center"] * (len(ticks) - 2), "right"]
    for share, tick, side in zip(_TICKS, ticks, aligned, strict=True):
        inset = {"left": 0.3, "center": 0.0, "right": -0.3}[side] * size
        x = left + share * (right - left) + inset
        axes.text(x, top, tick, fontsize=0.8 * size, color="#111", ha=side)


class _Pen:
    """Widths of texts in DejaVu Sans, Matplotlib's default font."""

    def __init__(self, size: float) -> None:
        self._font = FT2Font(font_manager.findfont("DejaVu Sans"))
        self._font.set_size(size, 72)
        self._known = self._font.get_charmap()

    def spell(self, text: str) -> str:
        """The text, with □ for characters that the font does not have."""
        return "".join(char if ord(char) in self._known else "□" for char in text)

    def width(self, text: str) -> float:
        """The width of a text in points."""
        return sum(self._font.load_char(ord(char)).linearHoriAdvance / 65536 for char in text)


def _wrap(labels: Sequence[str], pen: _Pen, width: float) -> Iterator[list[tuple[int, str]]]:
    """Lines of (token, text to draw); lines break before words and after line ends."""
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
    """Groups of token numbers; a group starts with a space or after a line end."""
    word: list[int] = []
    for token, label in enumerate(labels):
        if word and (label[:1].isspace() or "\n" in labels[token - 1]):
            yield word
            word = []
        word.append(token)
    if word:
        yield word


def _color(share: float) -> Float[np.ndarray, "3"]:
    # Squared: pale colors for the lower half, clearly different colors for the upper half.
    return _WHITE + (_RED - _WHITE) * share**2


def _css(share: float) -> str:
    return f"rgb({','.join(f'{part:.0f}' for part in _color(share))})"


def _panel(gate_map: GateMap, layer: int) -> str:
    gates, shares = gate_map.gates[layer], gate_map.shares(layer)
    spans = []
    for token, (gate, share) in enumerate(zip(gates, shares, strict=True)):
        ngrams = [f"{text!r}" for text in gate_map.ngrams(token)]
        title = (
            f"gate {gate:.3f}, loss {gate_map.losses[token]:.2f}\nlooked up: {', '.join(ngrams)}"
        )
        label = gate_map.labels[token]
        # The visible mark of a line end is in the colored box; the line end itself follows the box.
        after = "\n" * label.count("\n")
        spans.append(
            f'<span style="background:{_css(share)}" title="{html.escape(title)}">'
            f"{html.escape(label.translate(_MARKS))}</span>{after}"
        )
    ramp = ",".join(_css(share) for share in np.linspace(0, 1, 9))
    ticks = "".join(f"<b>{tick}</b>" for tick in gate_map.quartiles(layer))
    return (
        f"<section><h2>Layer {layer}</h2>"
        f'<p class="legend" style="background:linear-gradient(to right,{ramp})">{ticks}</p>'
        f'<p class="text">{"".join(spans)}</p></section>'
    )


def _windows(
    ids: Int[np.ndarray, "tokens"], starts: Sequence[int], rows: int, length: int, pad_id: int
) -> Batch:
    """One batch whose first rows are the windows that start at `starts`."""
    places = np.arange(length)
    index = np.full((rows, length), len(ids))
    index[: len(starts)] = np.array(starts)[:, None] + places
    index = np.minimum(index, len(ids))
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
    """The text that every token adds; "" for a token that ends inside a character."""
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
.legend { display: flex; justify-content: space-between; width: 20rem; max-width: 100%;
  box-sizing: border-box; padding: 0 .5rem; margin: .4rem 0; font-size: .85rem; color: #111;
  border: 1px solid #999; border-radius: .4rem; }
.legend b { font-weight: normal; }
.text { background: #fff; color: #111; padding: .8rem 1rem; border: 1px solid #999;
  border-radius: .4rem; line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere; }
.text span { padding: .15em 0; border-radius: .2em; box-shadow: inset -1px 0 #fff; }
.text span:hover { outline: 2px solid #111; }
</style>
<h1>Engram gate map</h1>
<p>A redder token has a larger gate for the memory of the n-grams that end there, compared with the
other tokens of this text. The color scale of a layer gives its gates in this text: minimum,
quartiles, maximum. Hover over a token to see its gate, its loss in nats and its n-grams. In
n-grams, ⊢ is the start of the text, and · is a token that ends inside a character. The hash ignores
case and accents.</p>
PANELS
</html>
"""
