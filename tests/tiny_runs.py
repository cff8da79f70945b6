"""Runs of a few seconds: a tiny model with random tables on a few documents."""

import gc
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from jaxtyping import Int32
from lively import enliven

from engram_jax import run as run_module
from engram_jax import run_folder, train_step, trainer
from engram_jax.compression import VocabularyProjection, project_vocabulary
from engram_jax.config import Config, DataConfig, MemoryConfig, TrainConfig
from engram_jax.decoding import generate
from engram_jax.evaluation import held_out, report
from engram_jax.layers.attention import AttentionConfig
from engram_jax.layers.engram import EngramConfig
from engram_jax.layers.hyper_connections import HyperConnectionsConfig
from engram_jax.layers.latent_attention import LatentAttentionConfig
from engram_jax.layers.mixture_of_experts import ExpertsConfig
from engram_jax.memory.layout import RowState, StorageConfig, Table
from engram_jax.memory.places import stored_places
from engram_jax.memory.row_adam import RowAdamConfig
from engram_jax.metrics import read_metrics
from engram_jax.model import DecoderConfig, Gates
from engram_jax.program import Program
from engram_jax.run import Run
from engram_jax.sharding import MeshConfig, make_mesh
from engram_jax.tokenizer import Tokenizer
from engram_jax.train_state import TrainState, Weights
from engram_jax.typing import PyTree

type Tokens = Int32[np.ndarray, "B T"]
type PlainPass = Callable[[Tokens, Tokens, Tokens], tuple[Array, Gates]]
type TrainWhole = Callable[[Config, int, int], tuple[Run, TrainState]]

WORDS = ("Alexander", "the", "Great", "was", "born", "in", "Wales", "and", "café", "東京", "on")


def tiny_config(folder: Path) -> Config:
    """A model with random rows, so that its memory has an effect; 40 documents in two files."""
    sources = []
    for name, stride in (("first", 3), ("second", 7)):
        path = folder / f"{name}.jsonl"
        texts = [
            " ".join(WORDS[(start + stride * place) % len(WORDS)] for place in range(5 + start))
            for start in range(20)
        ]
        if not path.exists():  # other processes may read it
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources.append(str(path))
    return Config(
        name="tiny",
        model=DecoderConfig(
            width=32,
            layers=2,
            attention=AttentionConfig(heads=2, kv_heads=1, head_width=16),
            feed_forward=32,
        ),
        memory=MemoryConfig(heads=2, rows_per_head=(500, 500), row_width=8, init_scale=1.0),
        data=DataConfig(
            sources=tuple(sources), sequence_length=24, held_out=0.5, cache=str(folder / "cache")
        ),
        train=TrainConfig(steps=3),
    )


# What forms of the model differ in from `tiny_config`, by section of the configuration.
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "engram": {},
    "over_encoding": {"memory": {"layers": (0,), "fusion": "over_encoding"}},
    "dense": {"memory": {"layers": ()}},
    "two_layers": {"memory": {"layers": (0, 1)}},
    "added": {"memory": {"layers": (0,), "fusion": "added", "row_width": 32}},
    "ungated": {"model": {"engram": EngramConfig(gated=False)}},
    "frozen": {"memory": {"frozen": True}},
    "more_ids": {"model": {"vocabulary": 8300}},
    "untied": {"model": {"tie_embeddings": False}},
    "several": {  # of the above
        "model": {"vocabulary": 8300, "tie_embeddings": False},
        "memory": {"layers": (0, 1)},
    },
    "bfloat16": {
        "model": {"dtype": "bfloat16"},
        "memory": {"storage": StorageConfig("bfloat16", "bfloat16", "row")},
    },
}


def make_run(folder: Path, form: str) -> Run:
    """Starts a run of one of the `FORMS`, or of "backbone"; saves step 2 without zeros.

    Its rows were last written by steps 0 to 2, so many of them have pending updates.
    """
    config = tiny_config(folder)
    config = with_backbone(config) if form == "backbone" else vary(config, **FORMS[form])
    config = vary(config, memory={"adam": RowAdamConfig(form="exact")})
    run = Run.start(config, folder / "run")
    state = run.program.initial_state()
    state = replace(
        state,
        step=jax.device_put(jnp.int32(2), state.step.sharding),
        params=enliven(state.params),
        expert_bias=enliven(state.expert_bias),
        tables={layer: use_rows(table, steps=2) for layer, table in state.tables.items()},
    )
    run.save(state)
    return run


draw_on_the_mesh = Program.initial_state  # for its own tests


def place_initial_state(program: Program) -> TrainState:
    """Replaces `Program.initial_state` in tests: drawn once, then placed on any mesh.

    Compiling the initializer takes as long as compiling a step.
    """
    config = program.config
    key = config.model, config.memory, config.train.seed
    state = _DRAWN.get(key)
    if state is None:
        state = _DRAWN[key] = jax.device_get(program._make_state(np.uint32(key[-1])))
    state = replace(state, optimizer=jax.device_get(program.optimizer.init(state.params)))
    return jax.device_put(state, program._shardings())


_DRAWN: dict[tuple[Any, ...], TrainState] = {}


_SHARED: list[dict[Any, Any]] = []


def forget_programs() -> None:
    """Frees all compiled programs; what is used again is compiled again."""
    for made in _SHARED:
        made.clear()
    jax.clear_caches()
    gc.collect()


def share[**P, T](make: Callable[P, T]) -> Callable[P, T]:
    """Caches `make`, whose first argument is a run or a program, for equal runs.

    Tracing and lowering a step takes longer than the few steps of a test. (A test that replaces
    parts of a program calls `make.__wrapped__`.)
    """
    made: dict[tuple[Any, ...], T] = {}
    _SHARED.append(made)

    @wraps(make)
    def make_once(*arguments: P.args, **named: P.kwargs) -> T:
        owner, *rest = arguments
        program = owner.program if isinstance(owner, Run) else owner
        config, ngram_hash = program.config, program.ngram_hash
        # The learning rate is an argument of the programs.
        optimizer = replace(config.optimizer, learning_rate=1.0, warmup_steps=0)
        facts = config.model, config.memory, optimizer, program.mesh
        key = facts, ngram_hash and ngram_hash.fingerprint, *rest, *named.items()
        if key not in made:
            made[key] = make(*arguments, **named)
        return made[key]

    return make_once


def share_programs() -> None:
    """Replaces the functions that make a run's compiled programs, and its projection: see `share`.

    Under the runtime type checks of tests, a projection takes 0.4 s.
    """
    projections: dict[str, VocabularyProjection] = {}

    def project_once(tokenizer: Tokenizer) -> VocabularyProjection:
        if tokenizer.fingerprint not in projections:
            projections[tokenizer.fingerprint] = project_vocabulary(tokenizer)
        return projections[tokenizer.fingerprint]

    run_folder.project_vocabulary = project_once
    for name, modules in (
        ("make_train_step", (train_step, trainer)),
        ("make_scorer", (held_out, report, trainer)),
        ("ProgramCache", (generate,)),
    ):
        shared = share(getattr(modules[0], name))
        for module in modules:
            setattr(module, name, shared)


def plain_pass(run: Run, weights: Weights) -> PlainPass:
    """A function (tokens, segments, positions) → (logits, gates) of the decoder alone.

    Rows are read by row number, without a plan, padding or a mesh.
    """
    decoder = nnx.merge(
        run.program.graph, jax.tree.map(jnp.asarray, jax.device_get(weights.params))
    )
    tables = {
        layer: np.asarray(
            jax.jit(jax.device_get(run.program.row_adam).current)(
                *jax.device_get((table.unpack(), weights.step))
            )
        )
        for layer, table in weights.tables.items()
    }
    decode = nnx.jit(lambda decoder, *inputs, **named: decoder(*inputs, **named))

    def apply(tokens: Tokens, segments: Tokens, positions: Tokens) -> tuple[Array, Gates]:
        memory = {}
        for layer, table in tables.items():
            numbers = run.program.ngram_hash.hash_tokens(layer, tokens, segments)
            memory[layer] = table[stored_places(numbers, len(table))].reshape(*tokens.shape, -1)
        inputs = jax.tree.map(jnp.asarray, (tokens, memory, segments, positions))
        logits, report = decode(decoder, *inputs, expert_bias=jax.device_get(weights.expert_bias))
        return logits, report.gates

    return apply


def scale_rows(table: Table, factor: float) -> Table:
    """The table with values and first moments multiplied by a factor."""
    rows = jax.device_get(table.unpack())
    rows = rows._replace(value=factor * rows.value, mean=factor * rows.mean)
    return _with_rows(table, rows)


def use_rows(table: Table, steps: int) -> Table:
    """The table as if each row was last written by one of these steps, or never."""
    rows, generator = jax.device_get(table.unpack()), np.random.default_rng(5)
    clock = generator.integers(0, steps + 1, len(rows.clock), dtype=np.int32)
    written = np.float32(clock > 0)[:, None]
    mean = written * generator.normal(size=rows.mean.shape).astype(np.float32)
    square = (mean**2)[:, : rows.square.shape[1]]
    return _with_rows(table, rows._replace(mean=mean, square=square, clock=clock))


def _with_rows(table: Table, rows: RowState) -> Table:
    records = table.layout.pack(jax.tree.map(jnp.asarray, rows))
    return replace(table, records=jax.device_put(records, table.records.sharding))


@contextmanager
def on_devices(*sizes: int) -> Iterator[None]:
    """Runs start on a mesh of these sizes (data, fsdp, …), of the first of the eight devices."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "make_mesh", lambda *_: mesh)
        yield


def vary(config: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with fields of its sections replaced."""
    changed = {name: replace(getattr(config, name), **new) for name, new in sections.items()}
    return replace(config, **changed)


def with_backbone(config: Config, *, layers: Literal[1, 4] = 4) -> Config:
    """The paper's backbone: a dense layer with Engram, then three with experts, in one loop.

    With one layer, which compiles in less than half of the time, Engram is in a layer with experts.
    """
    config = vary(
        config,
        model={
            "layers": 4,
            "attention": LatentAttentionConfig(
                heads=2, latent_width=16, head_width=8, rotary_width=8, value_width=8
            ),
            "experts": ExpertsConfig(routed=5, shared=1, active=2, width=16, multiple=2),
            "hyper_connections": HyperConnectionsConfig(branches=2),
            "tie_embeddings": False,
            "remat": "experts_saveable",
            "scan": True,
        },
        memory={"layers": (0,)},
        optimizer={"matrices": "muon", "decay": "steps", "warmup_steps": 2},
    )
    if layers == 4:
        return config
    experts = replace(config.model.experts, leading_dense=0)
    return vary(config, model={"layers": 1, "experts": experts, "scan": False, "remat": None})


def losses(folder: Path, kind: str = "train") -> list[tuple[int, float]]:
    """Step and loss of every line of the metrics."""
    return [(line["step"], line["loss"]) for line in read_metrics(folder, kind)]


def assert_identical(one: PyTree, other: PyTree) -> None:
    """Compares two trees of arrays bit for bit."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
