"""Hashing on the host: tokens/s of `NgramHash.hash_tokens` and of the plain formula.

Both run in this process, on one core, with the sizes of Engram-27B (two layers of 2 × 8 heads of
2,262,400 rows), on 8 × 4,096 tokens of a shipped corpus. The plain formula is equation 2 in int64
NumPy, as in the paper's demo. The two results are checked to be equal first.

    python -m benchmarks.hashing
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engram_jax import HashSpec, NgramHash, load_tokenizer, project_vocabulary
from engram_jax.command_line import run_function
from engram_jax.data.token_cache import build_corpus

ROUNDS = 15
BATCH, LENGTH = 8, 4096
SPEC = HashSpec(layers=(1, 14), rows_per_head=(2_262_400, 2_262_400))


def hash_plainly(ngram_hash: NgramHash, tokens: np.ndarray) -> list[np.ndarray]:
    """Rows of every layer within their heads, by column. (Ignores document boundaries.)"""
    ids = ngram_hash.projection.lookup[tokens].astype(np.int64)
    length = ids.shape[1]
    window = [ids] + [
        np.pad(ids, ((0, 0), (back, 0)), constant_values=ngram_hash.pad)[:, :length]
        for back in range(1, ngram_hash.spec.max_order)
    ]
    layers = []
    for multipliers, primes in zip(ngram_hash.multipliers, ngram_hash.primes, strict=True):
        mix = window[0] * multipliers[0]
        columns = []
        for order in range(1, len(window)):
            mix = np.bitwise_xor(mix, window[order] * multipliers[order])
            columns += [mix % prime for prime in primes[order - 1]]
        layers.append(np.moveaxis(np.stack(columns), 0, 2))  # the same memory layout as ours
    return layers


def hash_vectorized(ngram_hash: NgramHash, tokens: np.ndarray) -> list[np.ndarray]:
    """Table rows of every layer."""
    return [ngram_hash.hash_tokens(layer, tokens) for layer in ngram_hash.spec.layers]


def measure(runs: list[Callable[[], object]]) -> list[list[float]]:
    """Seconds of each function in every round; the functions alternate.

    Each is called once before it is timed. Otherwise it would include page faults for memory that
    the other function returned to the system (two microseconds per page on some virtual machines,
    half of our time).
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, measured in zip(runs, seconds, strict=True):
            run()
            start = time.perf_counter()
            run()
            measured.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Prints tokens/s of both and the ratio."""
    tokenizer = load_tokenizer()
    corpus = build_corpus("vital_en", tokenizer, Path(".cache/corpora"))
    tokens = corpus.ids[: BATCH * LENGTH].reshape(BATCH, LENGTH).astype(np.int32)
    ngram_hash = NgramHash.build(SPEC, project_vocabulary(tokenizer))

    plain, ours = hash_plainly(ngram_hash, tokens), hash_vectorized(ngram_hash, tokens)
    for index, (expected, rows) in enumerate(zip(plain, ours, strict=True)):
        assert (rows - ngram_hash.offsets[index].reshape(-1) == expected).all()

    baseline, vectorized = measure(
        [lambda: hash_plainly(ngram_hash, tokens), lambda: hash_vectorized(ngram_hash, tokens)]
    )
    for name, seconds in (("plain int64 formula", baseline), ("engram_jax", vectorized)):
        rates = tokens.size / np.array(seconds) / 1e6
        print(
            f"{name:<20} {np.median(rates):6.2f} M tokens/s "
            f"(quartiles {np.quantile(rates, 0.25):.2f} … {np.quantile(rates, 0.75):.2f})"
        )
    ratios = np.array(baseline) / np.array(vectorized)
    print(
        f"{'ratio':<20} {np.median(ratios):6.2f} "
        f"(quartiles {np.quantile(ratios, 0.25):.2f} … {np.quantile(ratios, 0.75):.2f})"
    )


if __name__ == "__main__":
    run_function(main)
