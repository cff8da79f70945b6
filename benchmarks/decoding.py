"""Speed of decoding, each figure as a ratio to a baseline that is measured in turn with it.

    python -m benchmarks.decoding [--rounds N] [--large-width N]

- tokens/s of one sequence, as `Generator.generate` reports it, with the work of the host; and of
  the path before there was a cache: a forward pass over a window, planned on the host, per token;
- bytes of weights read per second by a model of at least four times the last-level cache, of a
  copy, and of a sum of squares of as many numbers;
- a step of the compiled loop of the default model and of its dense twin;
- prompt tokens/s (without logits), and tokens/s of the forward pass of training on the same shape;
- a step with each option of drawing, and without;
- hashing on the device, and a step.

Parameters are random: no figure depends on them, except how often a draw is repeated. The logits of
the comparison of options are as peaked as a trained model's. Prints medians and quartiles.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.command_line import load_named_config, run_function
from engram_jax.compression import project_vocabulary
from engram_jax.config import Config
from engram_jax.data.packing import Batch, micro_batches
from engram_jax.decoding.generate import Generator
from engram_jax.decoding.programs import BURST, Drawing, Limits
from engram_jax.decoding.sampling import DrawSettings, draw
from engram_jax.decoding.settings import GenerationSettings
from engram_jax.hashing import NgramHash
from engram_jax.hashing_device import HashConstants, hash_tokens, stored_places
from engram_jax.layers.attention import AttentionConfig
from engram_jax.layers.cross_entropy import compute_logits
from engram_jax.program import Program
from engram_jax.sharding import make_mesh
from engram_jax.tokenizer import load_tokenizer
from engram_jax.train_state import Weights

BURSTS = 8  # of the loop, in one measurement
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

type Timed = Callable[[], float]  # seconds of one repetition


@dataclass
class Model:
    """A configuration with random weights."""

    config: Config

    def __post_init__(self) -> None:
        tokenizer = load_tokenizer()
        ngram_hash = None
        if self.config.memory.layers:
            spec = self.config.memory.hash_spec(tokenizer.pad_id)
            ngram_hash = NgramHash.build(spec, project_vocabulary(tokenizer))
        self.program = Program.build(self.config, ngram_hash, make_mesh(self.config.mesh))
        self.weights: Weights = self.program.initial_state().weights
        self.generator = Generator(self.program, tokenizer, self.weights)
        self.prepared, self.programs = self.generator.weights, self.generator.programs

    def generate(self, tokens: int = 128) -> Timed:
        """Seconds of a token of one continuation, with the work of the host."""

        def run() -> float:
            self.generator.generate(["The city of"], GenerationSettings(tokens=tokens))
            return 1 / self.generator.speed.rate

        return run

    def burst(self, batch: int, length: int = 32) -> Timed:
        """Seconds of a step of the compiled loop, from a length of the sequences on."""
        with self.program.use_mesh():
            burst = self.programs.burst(self.prepared, batch, 256)
            state = self.programs.empty(self.prepared, batch, 256)

            def by_sequence(value: Any, dtype: Any) -> jax.Array:
                return jax.device_put(np.full(batch, value, dtype), self.generator.by_sequence)

            whole = by_sequence(0, np.int32)
            given = jax.device_put(
                np.full((batch, BURST), -1, np.int32), self.generator.by_sequence
            )
            drawing = Drawing(whole, jnp.copy(whole), by_sequence(False, bool), given)
            draw_settings = DrawSettings(
                by_sequence(1, np.float32),
                by_sequence(2**31 - 1, np.int32),
                by_sequence(1, np.float32),
                by_sequence(0, np.float32),
                by_sequence(7, np.uint32),
            )
            max_tokens, limits = by_sequence(10**9, np.int32), Limits(np.int32(8192), np.int32(-1))
        held: list[Any] = [state, drawing]

        def run() -> float:
            with self.program.use_mesh():
                state, drawing = replace(held[0], length=by_sequence(length, np.int32)), held[1]
                begin = perf_counter()
                for _ in range(BURSTS):
                    state, drawing, tokens, _ = burst(
                        self.prepared, state, drawing, draw_settings, max_tokens, limits
                    )
                    tokens.block_until_ready()
                held[:] = state, drawing
            return (perf_counter() - begin) / (BURSTS * BURST)

        return run

    def prefill(self, batch: int, length: int) -> Timed:
        """Seconds to read prompts of a length, in chunks."""
        tokens = np.random.default_rng(0).integers(0, 8192, (batch, length), dtype=np.int32)
        with self.program.use_mesh():
            prefill = self.programs.prefill(self.prepared, batch, max(length, 256))
            held = [self.programs.empty(self.prepared, batch, max(length, 256))]
            sharding, chunk = self.generator.by_sequence, self.programs.chunk(batch)

        def run() -> float:
            with self.program.use_mesh():
                begin = perf_counter()
                zeros = jax.device_put(np.zeros(batch, np.int32), sharding)
                state = replace(held[0], length=zeros)
                for first in range(0, length, chunk):
                    part = tokens[:, first : first + chunk], np.full(batch, chunk, np.int32)
                    inputs = jax.device_put(part, sharding)
                    state = prefill(self.prepared, state, *inputs, None)
                held[:] = [jax.block_until_ready(state)]
            return perf_counter() - begin

        return run

    def forward(self, batch: int, length: int) -> Timed:
        """Seconds of the forward pass of training on one packed batch, whose plan is ready."""
        program, weights = self.program, self.weights
        tokens = np.random.default_rng(0).integers(0, 8192, (1, batch, length), dtype=np.int32)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy()
        ones = np.ones(tokens.shape, np.int32)
        planner = program.planner()
        plan = planner(tokens, ones) if planner else None
        mask = np.ones(tokens.shape, np.float32)
        packed = Batch(tokens, tokens, mask, ones, positions, plan=plan)

        @jax.jit
        def logits_of(weights: Weights, batch: Batch, row_adam: Any) -> jax.Array:
            read = program.read_rows(weights, batch.plan, row_adam)
            rows = {layer: of_layer.values for layer, of_layer in read.items()}
            only = jax.tree.map(lambda array: array[0], micro_batches(batch))
            hidden, head, _ = program.forward(weights.params, rows, only, weights.expert_bias)
            return compute_logits(hidden, head)

        with program.use_mesh():
            put = program.put(packed)

        def run() -> float:
            with program.use_mesh():
                begin = perf_counter()
                logits_of(weights, put, program.row_adam).block_until_ready()
            return perf_counter() - begin

        return run

    def before(self) -> Timed:
        """Seconds of a token without a cache: a plan on the host, and a pass over a window."""
        program, weights = self.program, self.weights
        length = program.config.data.sequence_length
        shape = (1, program.mesh.size, length)
        ids = np.random.default_rng(0).integers(0, 8192, shape, dtype=np.int32)
        ones, planner = np.ones(shape, np.int32), program.planner()
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy()

        @jax.jit
        def next_token(weights: Weights, batch: Batch, row_adam: Any, key: jax.Array) -> jax.Array:
            read = program.read_rows(weights, batch.plan, row_adam)
            rows = {layer: of_layer.values for layer, of_layer in read.items()}
            only = jax.tree.map(lambda array: array[0], micro_batches(batch))
            hidden, head, _ = program.forward(weights.params, rows, only, weights.expert_bias)
            logits = jax.sharding.reshard(compute_logits(hidden, head), jax.P())
            return jax.random.categorical(key, logits[0, -1])

        def run() -> float:
            with program.use_mesh():
                begin = perf_counter()
                plan = planner(ids, ones) if planner else None
                mask = np.zeros(shape, np.float32)
                batch = program.put(Batch(ids, ids, mask, ones, positions, plan=plan))
                int(next_token(weights, batch, program.row_adam, jax.random.key(0)))
            return perf_counter() - begin

        return run

    def hash(self, batch: int) -> Timed:
        """Seconds to hash the next token of every sequence, from a loop of 1,000."""
        constants = self.prepared.hash
        assert constants is not None
        orders = len(self.config.memory.rows_per_head)

        @jax.jit
        def repeat(tokens: jax.Array, constants: HashConstants) -> jax.Array:
            def body(_: Any, tokens: jax.Array) -> jax.Array:
                places = stored_places(constants, hash_tokens(constants, tokens, 0 * tokens))
                return (tokens + jnp.sum(places[0, :, -1], axis=1, keepdims=True)) % 8192

            return jax.lax.fori_loop(0, 1000, body, tokens)

        def run() -> float:
            with self.program.use_mesh():
                tokens = jnp.ones((batch, orders + 1), jnp.int32)
                begin = perf_counter()
                repeat(tokens, constants).block_until_ready()
            return (perf_counter() - begin) / 1000

        return run


def draws(logits: jax.Array, **options: float) -> Timed:
    """Seconds to draw a token of every sequence."""
    settings = {"temperature": 1.0, "top_k": 2**31 - 1, "top_p": 1.0, "min_p": 0.0} | options
    batch, types = len(logits), (np.float32, np.int32, np.float32, np.float32)
    parts = [np.full(batch, v, t) for v, t in zip(settings.values(), types, strict=True)]
    draw_settings = DrawSettings._make([*parts, np.arange(batch, dtype=np.uint32)])
    number = np.zeros(batch, np.int32)

    def run() -> float:
        number[:] += 1
        begin = perf_counter()
        jax.block_until_ready(_draw(logits, np.int32(logits.shape[1]), draw_settings, number))
        return perf_counter() - begin

    return run


_draw = jax.jit(draw)


def copy(size: int) -> Timed:
    """Seconds to copy an array of this many bytes, by one thread per core, to used memory."""
    source, target = (np.ones(size // 4, np.float32) for _ in range(2))
    return _by_all_cores(size, lambda part: np.copyto(target[part], source[part]))


def read(size: int) -> Timed:
    """Seconds to sum the squares of an array of this many bytes, by one thread per core."""
    source = np.ones(size // 4, np.float32)
    return _by_all_cores(size, lambda part: np.dot(source[part], source[part]))


def _by_all_cores(size: int, work: Callable[[slice], object]) -> Timed:
    """Seconds of `work` on an array of this many bytes, of which each core has a part."""
    cores = os.cpu_count() or 1
    bounds = np.linspace(0, size // 4, cores + 1, dtype=int).tolist()
    parts = [slice(*pair) for pair in pairwise(bounds)]
    threads = ThreadPoolExecutor(cores)

    def run() -> float:
        begin = perf_counter()
        list(threads.map(work, parts))
        return perf_counter() - begin

    return run


def measure(rounds: int, **timed: Timed) -> dict[str, np.ndarray]:
    """Seconds of each, measured in turn; the first round is not counted."""
    seconds = [[run() for run in timed.values()] for _ in range(rounds + 1)][1:]
    return dict(zip(timed, np.array(seconds).T, strict=True))


def show(name: str, values: np.ndarray, unit: str, bar: str = "") -> None:
    """Prints the median and the quartiles."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    line = f"{name:<56}{middle:>10,.3f} {unit} (quartiles {low:,.3f} … {high:,.3f})"
    print(f"{line}{'  bar: ' + bar if bar else ''}", flush=True)


def last_level_cache() -> int:
    """Bytes of the last-level cache, as Linux states them; elsewhere 32 MiB."""
    sizes = [file.read_text().strip() for file in CACHES.glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=32 << 20)


def large_config(width: int | None) -> Config:
    """A dense model of a width; by default 1,024, or more for four times the last-level cache."""
    if width is None:
        head = 4 * 8192
        width = next(
            width
            for width in count(1024, 128)
            if 8 * 12 * 4 * width**2 + head * width >= 4 * last_level_cache()
        )
    config = load_named_config("dense")
    attention = AttentionConfig(heads=width // 64, kv_heads=width // 64, head_width=64)
    model = replace(
        config.model, width=width, layers=8, attention=attention, feed_forward=8 * width // 3
    )
    return replace(config, model=model)


def main(rounds: int = 15, large_width: int | None = None) -> None:
    """Measures and prints.

    Args:
        rounds: repetitions of every measurement.
        large_width: width of the model that is compared with the copy bandwidth; by default 1,024,
            or more if its weights are then below four times the last-level cache. Six times their
            size must fit in memory.
    """
    engram, dense = Model(load_named_config("default")), Model(load_named_config("dense"))
    measured = measure(rounds, before=engram.before(), step=engram.generate())
    show("default, one sequence: tokens/s", 1 / measured["step"], "tokens/s")
    show("  without a cache", 1 / measured["before"], "tokens/s")
    show("  ratio", measured["before"] / measured["step"], "×", "≥ 20")
    for batch in (1, 8, 64):
        timed = {"engram": engram.burst(batch), "dense": dense.burst(batch)}
        measured = measure(rounds, **timed)
        show(f"a step of {batch} sequences", 1e3 * measured["engram"], "ms")
        bar = "≤ 1.15" if batch < 64 else ""
        show("  relative to the dense twin", measured["engram"] / measured["dense"], "×", bar)
        hashing = measure(rounds, hash=engram.hash(batch))["hash"]
        show("  share of hashing", 100 * hashing / np.median(measured["engram"]), "%", "≤ 1")
    for batch, length in ((8, 256), (1, 2048)):
        timed = {"ours": engram.prefill(batch, length), "theirs": engram.forward(batch, length)}
        measured = measure(rounds, **timed)
        show(f"prompts of {batch} × {length}", batch * length / measured["ours"], "tokens/s")
        ratio = measured["theirs"] / measured["ours"]
        show("  relative to the forward pass of training", ratio, "×", "≥ 0.8")
    options: dict[str, dict[str, float]] = {
        "greedy": {"temperature": 0.0},
        "top_k": {"top_k": 50},
        "top_p": {"top_p": 0.9},
        "min_p": {"min_p": 0.05},
    }
    step = engram.burst(64)
    logits = 3 * jax.random.normal(jax.random.key(0), (64, 8192))
    timed = {name: draws(logits, **option) for name, option in options.items()}
    measured = measure(rounds, step=step, plain=draws(logits), **timed)
    for name in options:
        added = measured[name] - measured["plain"]
        show(f"64 sequences: {name} adds", 100 * added / measured["step"], "% of a step", "≤ 25")
    del engram, dense
    large = Model(large_config(large_width))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(large.prepared.params["blocks"]))
    size += large.prepared.head.nbytes
    measured = measure(rounds, step=large.burst(1), copy=copy(size), read=read(size))
    show(f"{size / 1e6:.0f} MB of weights, one sequence", size / measured["step"] / 1e9, "GB/s")
    show("  copy, read and write", 2 * size / measured["copy"] / 1e9, "GB/s")
    show("  ratio", measured["copy"] / measured["step"] / 2, "×", "≥ 0.5")
    show("  ratio to reading alone", measured["read"] / measured["step"], "×")


if __name__ == "__main__":
    run_function(main)
