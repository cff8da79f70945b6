"""Would a cache of hot rows on the device save reads of a table outside it? Hit rates on text.

    python -m benchmarks.row_cache [--config default] [--tokens 50_000] [--figure FILE]

A model that generates reads H rows of each layer for every token. The documents that are held out
are read one after another, token by token, through caches of several sizes:

    static    the rows that are most frequent in the training text
    first     the rows that training met first: slots 1 to n of a store, which need no counting
    LRU       the rows that were used last
    half      half static, half LRU
    ideal     a cache that knows all later reads (Belady)

The last three read the end of the training text before. A host is called for a token if *any* of
its rows is missing, so the share of tokens without a missing row counts, too.
"""

import heapq
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64
from matplotlib.figure import Figure

from engram_jax.command_line import load_named_config, parse_flags
from engram_jax.decoding.hot_rows import by_frequency, places_of, sample_text
from engram_jax.errors import one_sentence
from engram_jax.run import Run

type Rows = Int64[np.ndarray, "tokens H"]
type Cache = Callable[[list[int], int], Iterator[bool]]

WARM_UP = 200_000  # tokens


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        config: name of a configuration with memory.
        train_tokens: tokens of training text that are counted.
        tokens: tokens of held-out text that are read.
        figure: file of the plot; by default, none.
    """

    config: str = "default"
    train_tokens: int = 2_000_000
    tokens: int = 50_000
    figure: Path | None = None


def by_first_use(reads: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "distinct"]:
    """The distinct rows in the order of their first use."""
    rows, first = np.unique(reads, return_index=True)
    return rows[np.argsort(first)]


def hits_of_lru(reads: list[int], size: int) -> Iterator[bool]:
    """Whether each read finds its row among the `size` rows that were used last."""
    cache: OrderedDict[int, None] = OrderedDict()
    for row in reads:
        hit = row in cache
        cache[row] = None
        cache.move_to_end(row)
        if len(cache) > size:
            cache.popitem(last=False)
        yield hit


def hits_of_ideal(reads: list[int], size: int) -> Iterator[bool]:
    """Whether each read finds its row, if the row whose next use is latest leaves the cache."""
    following: list[int] = [0] * len(reads)
    seen: dict[int, int] = {}
    for number in range(len(reads) - 1, -1, -1):
        following[number] = seen.get(reads[number], len(reads))
        seen[reads[number]] = number
    cache: dict[int, int] = {}  # row: its next use
    latest: list[tuple[int, int]] = []  # (−next use, row), also of older uses
    for row, after in zip(reads, following, strict=True):
        yield row in cache
        cache[row] = after
        heapq.heappush(latest, (-after, row))
        while len(cache) > size:
            use, oldest = heapq.heappop(latest)
            if cache.get(oldest) == -use:
                del cache[oldest]


def measure(trained: Rows, read: Rows, size: int) -> dict[str, Bool[np.ndarray, "tokens H"]]:
    """The hits of all caches of a size, while text is read after the end of the training text."""
    text = trained.reshape(-1)
    frequent = by_frequency(text)
    reads = np.concatenate([trained[-WARM_UP:], read]).reshape(-1)

    def after_warm_up(hits: Bool[np.ndarray, "reads"]) -> Bool[np.ndarray, "tokens H"]:
        return hits[-read.size :].reshape(read.shape)

    def dynamic(cache: Cache, reads: Int64[np.ndarray, "n"], size: int) -> Bool[np.ndarray, "n"]:
        return np.fromiter(cache(reads.tolist(), size), bool, len(reads))

    half = np.isin(reads, frequent[: size // 2])
    half[~half] = dynamic(hits_of_lru, reads[~half], size - size // 2)
    found = {
        "static": np.isin(reads, frequent[:size]),
        "first": np.isin(reads, by_first_use(text)[:size]),
        "LRU": dynamic(hits_of_lru, reads, size),
        "half": half,
        "ideal": dynamic(hits_of_ideal, reads, size),
    }
    return {name: after_warm_up(hits) for name, hits in found.items()}


def draw(sizes: list[int], rates: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Hit rates against the size of the cache."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, column, title in zip(
        figure.subplots(1, 2, sharey=True),
        (0, 1),
        ("rows", "tokens without a missing row"),
        strict=True,
    ):
        for name, of in rates.items():
            style = "k:" if name == "ideal" else "o-"
            axes.plot(sizes, [pair[column] for pair in of], style, markersize=3, label=name)
        axes.set_xscale("log")
        axes.set_xlabel("rows in the cache")
        axes.set_title(title, fontsize=10)
    figure.axes[0].set_ylabel("share found in the cache")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures and prints."""
    options = parse_flags(Options, prog="benchmarks.row_cache", description=__doc__ or "")
    config = load_named_config(options.config)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.start(config, Path(folder))
        corpora, ngram_hash = run.corpora(), run.program.ngram_hash
        assert ngram_hash is not None
        layer = ngram_hash.spec.layers[0]
        trained, read = (
            places_of(sample_text(views, count), ngram_hash, layer).astype(np.int64)
            for views, count in (
                ([corpus.train for corpus in corpora], options.train_tokens),
                ([corpus.held_out for corpus in corpora], options.tokens),
            )
        )
    used = len(np.unique(trained))
    print(f"{ngram_hash.padded_rows[0]:,} rows; {used:,} of them in the training text")
    sizes = [4**power for power in range(5, 11)]
    rates: dict[str, list[tuple[float, float]]] = {}
    for count in sizes:
        for name, hits in measure(trained, read, count).items():
            rates.setdefault(name, []).append((hits.mean(), hits.all(axis=1).mean()))
        line = ", ".join(f"{name} {of[-1][0]:.3f} ({of[-1][1]:.3f})" for name, of in rates.items())
        print(f"{count:,} rows: {line}", flush=True)
    if options.figure:
        draw(sizes, rates, options.figure)


if __name__ == "__main__":
    with one_sentence():
        main()
