"""Statistics of the memory: how much of it is used, and for which n-grams it lowers the loss.

The frequency of an n-gram is the number of its occurrences in the rows that training has read.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int32, Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram_jax.data.pipeline import mix_rows
from engram_jax.evaluation.held_out import ScoredBatch, Suppress
from engram_jax.evaluation.statistics import (
    BinMeans,
    NgramCounts,
    count_full_collisions,
    count_ngrams,
    expected_full_collisions,
    expected_occupancy,
    frequency_bins,
    head_rows,
    mean_by_bin,
    ngram_keys,
    row_occupancy,
)
from engram_jax.files import atomic_write
from engram_jax.run import Run
from engram_jax.train_state import Weights

MOST_TOKENS = 1 << 24  # maximum number of counted training tokens; more takes long, changes little
_PART = 1 << 20  # tokens counted at a time
_BATCHES = 16  # number of batches over which distinct n-grams and rows are averaged
_COLORS = ("#3b6fd4", "#f4544a", "#2a9d74", "#8e5bc4")  # by order


@dataclass(frozen=True)
class OrderReport:
    """One n-gram order in one layer's table.

    Attributes:
        layer: layer id.
        order: the order.
        rows: number of rows of each of the K heads.
        occupancy: share of each head's rows that training wrote.
        expected_occupancy: the same for an ideal hash of these n-grams; None if not all training
            tokens were counted, or if the tables are frozen.
        ngrams: number of distinct n-grams counted.
        full_collisions: number of n-grams that share all K rows with another n-gram.
        expected_full_collisions: the same for an ideal hash.
        ngrams_per_batch: mean number of distinct n-grams of a training batch.
        rows_per_batch: mean number of distinct rows of these n-grams.
    """

    layer: int
    order: int
    rows: list[int]
    occupancy: list[float]
    expected_occupancy: float | None
    ngrams: int
    full_collisions: int
    expected_full_collisions: float
    ngrams_per_batch: float
    rows_per_batch: float


@dataclass(frozen=True)
class FrequencyReport:
    """Held-out tokens, by the training frequency of the n-gram of one order that ends there.

    Attributes:
        order: the order.
        least: smallest frequency in each bin: 0, 1, 2, 4, 8, …
        tokens: number of scored tokens in each bin.
        loss: loss of the token after the n-gram.
        loss_dropped: the same without the memory's output.
        harm: the paired difference of the two.
        gates: mean over the branches, by layer id.
    """

    order: int
    least: Int64[np.ndarray, "bins"]
    tokens: Int64[np.ndarray, "bins"]
    loss: BinMeans
    loss_dropped: BinMeans
    harm: BinMeans
    gates: dict[int, BinMeans]


@dataclass(frozen=True)
class MemoryReport:
    """The results of a `MemoryStudy`.

    Attributes:
        tokens_read: number of tokens that training read.
        tokens_counted: number of them whose n-grams were counted.
        tables: reports of tables, by layer and order.
        frequencies: reports of frequencies, by order.
    """

    tokens_read: int
    tokens_counted: int
    tables: list[OrderReport]
    frequencies: list[FrequencyReport]


class MemoryStudy:
    """Collects data during an evaluation (as `watch` of `report.evaluate`), then reports.

    Of a model with gates, the evaluation must be one `with_gates`. With several processes, all of
    them must create a study; each has the complete report.

    Args:
        run: a run with memory.
        weights: its parameters and tables.

    Raises:
        InputError: the training text is not available, or its n-grams cannot be counted.
    """

    def __init__(self, run: Run, weights: Weights) -> None:
        assert run.program.ngram_hash is not None
        length = run.config.data.sequence_length
        rows = int(weights.step) * run.config.data.batch_size
        counted = min(rows, MOST_TOKENS // length)
        parts = training_rows(run, counted, at_once=-(-_PART // length))
        self._hash, self._counts = (
            run.program.ngram_hash,
            count_ngrams(run.program.ngram_hash, parts),
        )
        self._tables = _inspect_tables(run, weights, self._counts, complete=counted == rows)
        self._tokens_read, self._tokens_counted = rows * length, counted * length
        self._sources: dict[str, int] = {}
        self._whole: list[dict[str, np.ndarray]] = []
        self._dropped: list[np.ndarray] = []

    def __call__(self, suppressed: Suppress, scored: ScoredBatch) -> None:
        """Adds a batch that was scored with a part of the memory suppressed, or nothing."""
        chosen = scored.mask > 0
        losses = scored.losses[chosen]
        if suppressed == "output":
            self._dropped.append(losses)
        if suppressed != "nothing":
            return
        source = self._sources.setdefault(scored.source, len(self._sources))
        documents = scored.rows.documents[chosen].astype(np.int64)
        columns = {"loss": losses, "document": (source << 32) + documents}
        for order, keys in ngram_keys(self._hash, scored.rows.tokens, scored.rows.segments).items():
            columns[f"bin {order}"] = frequency_bins(self._counts[order].of(keys[chosen]))
        for layer, gates in scored.gates.items():
            columns[f"gate {layer}"] = gates[chosen].mean(axis=-1)
        self._whole.append(columns)

    def report(self) -> MemoryReport:
        """The report. Call it after scoring the full model and the model without memory."""
        whole = {
            name: np.concatenate([part[name] for part in self._whole]) for name in self._whole[0]
        }
        whole["dropped"] = np.concatenate(self._dropped)
        frequencies = [_by_frequency(whole, order) for order in self._counts]
        return MemoryReport(self._tokens_read, self._tokens_counted, self._tables, frequencies)


def _by_frequency(tokens: dict[str, np.ndarray], order: int) -> FrequencyReport:
    bins = tokens[f"bin {order}"]
    in_bin = np.bincount(bins)
    loss, dropped = tokens["loss"], tokens["dropped"]
    mean = partial(mean_by_bin, bins=bins, documents=tokens["document"])
    return FrequencyReport(
        order=order,
        least=2 ** np.arange(len(in_bin)) // 2,
        tokens=in_bin,
        loss=mean(loss),
        loss_dropped=mean(dropped),
        harm=mean(dropped - loss),
        gates={
            int(name.removeprefix("gate ")): mean(values)
            for name, values in tokens.items()
            if name.startswith("gate ")
        },
    )


def training_rows(
    run: Run, count: int, at_once: int
) -> Iterator[tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]]:
    """Tokens and segments of the first `count` rows that training reads, in parts."""
    data = run.config.data
    rows = mix_rows(run.corpora(), data.weights, data.sequence_length, run.config.train.seed)
    for start in range(0, count, at_once):
        part = rows.rows(np.arange(start, min(start + at_once, count)))
        yield part.tokens, part.segments


def _inspect_tables(
    run: Run, weights: Weights, counts: dict[int, NgramCounts], *, complete: bool
) -> list[OrderReport]:
    ngram_hash, batch_size = run.program.ngram_hash, run.config.data.batch_size
    complete = complete and not run.config.memory.frozen
    assert ngram_hash is not None
    batches = [
        {order: np.unique(keys) for order, keys in ngram_keys(ngram_hash, *part).items()}
        for part in training_rows(run, _BATCHES * batch_size, at_once=batch_size)
    ]
    reports = []
    for layer, table in weights.tables.items():
        written = multihost_utils.process_allgather(table.clocks() > 0, tiled=True)
        occupancy = row_occupancy(ngram_hash, layer, np.asarray(written))
        of_layer = ngram_hash.primes[ngram_hash.spec.layers.index(layer)]
        for (order, met), rows, shares in zip(counts.items(), of_layer, occupancy, strict=True):
            keys, parts = met.keys, [batch[order] for batch in batches]
            found = [np.unique(head_rows(ngram_hash, layer, order, part)) for part in parts]
            expected = float(expected_occupancy(rows, len(keys)).mean()) if complete else None
            reports.append(
                OrderReport(
                    layer=layer,
                    order=order,
                    rows=rows.tolist(),
                    occupancy=shares.tolist(),
                    expected_occupancy=expected,
                    ngrams=len(keys),
                    full_collisions=count_full_collisions(ngram_hash, layer, order, keys),
                    expected_full_collisions=expected_full_collisions(rows, len(keys)),
                    ngrams_per_batch=float(np.mean([len(part) for part in parts])),
                    rows_per_batch=float(np.mean([len(part) for part in found])),
                )
            )
    return reports


def format_memory(report: MemoryReport) -> str:
    """Two tables: use of the memory; gates and losses by the frequency of N-grams."""
    counted = f"{report.tokens_counted:,}"
    if report.tokens_counted < report.tokens_read:
        counted = f"the first {counted} of {report.tokens_read:,}"
    lines = [
        f"memory, and the n-grams of {counted} training tokens",
        f"layer  order  {'rows/head':>11}  written  if ideal  {'n-grams':>10}  "
        f"{'full collisions':>15}  {'n-grams/batch':>13}  rows/batch",
    ]
    for table in report.tables:
        expected = table.expected_occupancy
        lines.append(
            f"{table.layer:>5}  {table.order:>5}  {np.mean(table.rows):>11,.0f}  "
            f"{np.mean(table.occupancy):>7.1%}  "
            f"{'' if expected is None else format(expected, '.1%'):>8}  {table.ngrams:>10,}  "
            f"{table.full_collisions:>15,}  {table.ngrams_per_batch:>13,.0f}  "
            f"{table.rows_per_batch:>10,.0f}"
        )
    longest = report.frequencies[-1]
    gates = "".join(f"  {f'gate {layer} ± s.e.':>15}" for layer in longest.gates)
    lines += [
        "",
        f"held-out tokens, by the training frequency of the {longest.order}-gram that ends there",
        f"{'frequency':>15}  {'tokens':>9}{gates}  {'loss':>7}  {'memory dropped':>14}  "
        f"{'increase ± s.e.':>16}",
    ]
    for bin_, (least, tokens) in enumerate(zip(longest.least, longest.tokens, strict=True)):
        if not tokens:
            continue
        times = f"{least:,}" if least < 2 else f"{least:,}–{2 * least - 1:,}"
        gates = "".join(f"  {_cell(means, bin_):>15}" for means in longest.gates.values())
        lines.append(
            f"{times:>15}  {tokens:>9,}{gates}  {longest.loss.mean[bin_]:>7.3f}  "
            f"{longest.loss_dropped.mean[bin_]:>14.3f}  "
            f"{_cell(longest.harm, bin_, signed=True):>16}"
        )
    return "\n".join(lines)


def memory_json(report: MemoryReport) -> dict[str, Any]:
    """The report as JSON-serializable values; None for NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): plain(part) for name, part in value.items()}
        if isinstance(value, list):
            return [plain(part) for part in value]
        if isinstance(value, np.ndarray):
            return [None if np.isnan(number) else number for number in value.tolist()]
        return value

    plainly: dict[str, Any] = plain(asdict(report))
    return plainly


def write_memory_png(report: MemoryReport, path: Path) -> None:
    """Writes a picture, 1,600 pixels wide: occupancy, gates (if there are any), losses."""
    gates = [_draw_gates] if report.frequencies[0].gates else []
    panels = [_draw_occupancy, *gates, _draw_losses]
    figure = Figure(figsize=(10, 3.2), dpi=160, facecolor="white", layout="constrained")
    for draw, axes in zip(panels, figure.subplots(1, len(panels)), strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8.5)
        draw(report, axes)
        axes.legend(frameon=False, fontsize=8.5)
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished)


def _draw_occupancy(report: MemoryReport, axes: Axes) -> None:
    names = [f"{table.order}-grams\nlayer {table.layer}" for table in report.tables]
    for place, table in enumerate(report.tables):
        shares = 100 * np.array(table.occupancy)
        axes.bar(place, shares.mean(), width=0.62, color=_color(table.order))
        spread = place + np.linspace(-0.22, 0.22, len(shares))
        label = "each head" if place == 0 else None
        axes.plot(spread, shares, "o", color="#222", markersize=2.5, label=label)
        if table.expected_occupancy is not None:
            level = 100 * table.expected_occupancy
            label = "ideal hash" if place == 0 else None
            axes.plot(
                [place - 0.4, place + 0.4], [level] * 2, "--", color="#222", lw=1, label=label
            )
    axes.set_title("Rows that training wrote", fontsize=10)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("share of a head's rows, %")
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylim(0, 122)  # room for the legend


def _draw_gates(report: MemoryReport, axes: Axes) -> None:
    for of_order in report.frequencies:
        for (layer, means), style in zip(of_order.gates.items(), cycle(("-", "--", ":"))):
            label = f"{of_order.order}-gram, layer {layer}"
            _draw_means(axes, means, style, _color(of_order.order), label)
    axes.set_title("Gate by frequency of the n-gram", fontsize=10)
    axes.set_ylabel("mean gate")
    _label_bins(axes, max(len(of_order.least) for of_order in report.frequencies))


def _draw_losses(report: MemoryReport, axes: Axes) -> None:
    longest = report.frequencies[-1]
    _draw_means(axes, longest.loss_dropped, "--", "#777", "memory dropped")
    _draw_means(axes, longest.loss, "-", _color(longest.order), "with the memory")
    axes.set_title(f"Loss by frequency of the {longest.order}-gram", fontsize=10)
    axes.set_ylabel("held-out loss, nats per token")
    _label_bins(axes, len(longest.least))


def _draw_means(axes: Axes, means: BinMeans, style: str, color: str, label: str) -> None:
    """A line through the bins that have a mean, and a band of ± 1 standard error."""
    bins = np.flatnonzero(~np.isnan(means.mean))
    mean, error = means.mean[bins], means.standard_error[bins]
    axes.plot(bins, mean, style, color=color, lw=1.6, marker="o", markersize=3.5, label=label)
    axes.fill_between(bins, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)


def _label_bins(axes: Axes, count: int) -> None:
    ticks = [0, *range(1, count, 2)]
    least = [2**tick // 2 for tick in ticks]
    axes.set_xticks(ticks, [f"{n >> 10}k" if n >= 1024 else f"{n}" for n in least])
    axes.set_xlabel("frequency in training, at least")


def _color(order: int) -> str:
    return _COLORS[(order - 2) % len(_COLORS)]


def _cell(means: BinMeans, number: int, *, signed: bool = False) -> str:
    mean = f"{means.mean[number]:{'+' if signed else ''}.3f}"
    error = means.standard_error[number]
    return mean if np.isnan(error) else f"{mean} ± {error:.3f}"
