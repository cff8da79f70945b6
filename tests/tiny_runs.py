"""Runs that cost seconds: a tiny model with random tables on a few documents, as it begins."""

import json
from dataclasses import replace
from pathlib import Path

from engram_jax.config import Config, DataConfig, MemoryConfig, TrainConfig
from engram_jax.layers.attention import AttentionConfig
from engram_jax.model import DecoderConfig
from engram_jax.run import Run

WORDS = ("Alexander", "the", "Great", "was", "born", "in", "Wales", "and", "café", "東京", "on")


def tiny_config(folder: Path) -> Config:
    """A model with random rows, so that its memory matters; 40 documents in two files."""
    sources = []
    for name, stride in (("first", 3), ("second", 7)):
        path = folder / f"{name}.jsonl"
        texts = [
            " ".join(WORDS[(start + stride * place) % len(WORDS)] for place in range(5 + start))
            for start in range(20)
        ]
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


def make_run(folder: Path, memory: str) -> Run:
    """Starts a run with "engram", "over_encoding" or no memory ("dense") and saves step 0."""
    config = tiny_config(folder)
    layers = {"engram": (1,), "over_encoding": (0,), "dense": ()}[memory]
    fusion = "over_encoding" if memory == "over_encoding" else "engram"
    config = replace(config, memory=replace(config.memory, layers=layers, fusion=fusion))
    run = Run.start(config, folder / "run")
    run.save(run.initial_state())
    return run
