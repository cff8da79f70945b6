"""Engram: language models with hashed N-gram memory in JAX (arXiv 2601.07372)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram_jax.compression import VocabularyProjection, project_vocabulary
    from engram_jax.config import Config
    from engram_jax.decoding.generate import Generator
    from engram_jax.decoding.settings import GenerationSettings
    from engram_jax.errors import InputError
    from engram_jax.hashing import HashSpec, NgramHash
    from engram_jax.layers.engram import Engram, EngramConfig
    from engram_jax.layers.engram_with_table import EngramWithTable
    from engram_jax.memory.plan import Planner
    from engram_jax.model import Decoder, DecoderConfig
    from engram_jax.run import Run
    from engram_jax.tokenizer import load_tokenizer

_HOMES = {
    "Config": "config",
    "Decoder": "model",
    "DecoderConfig": "model",
    "Engram": "layers.engram",
    "EngramConfig": "layers.engram",
    "EngramWithTable": "layers.engram_with_table",
    "GenerationSettings": "decoding.settings",
    "Generator": "decoding.generate",
    "HashSpec": "hashing",
    "InputError": "errors",
    "NgramHash": "hashing",
    "Planner": "memory.plan",
    "Run": "run",
    "VocabularyProjection": "compression",
    "load_tokenizer": "tokenizer",
    "project_vocabulary": "compression",
}

__all__ = [
    "Config",
    "Decoder",
    "DecoderConfig",
    "Engram",
    "EngramConfig",
    "EngramWithTable",
    "GenerationSettings",
    "Generator",
    "HashSpec",
    "InputError",
    "NgramHash",
    "Planner",
    "Run",
    "VocabularyProjection",
    "load_tokenizer",
    "project_vocabulary",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # Imported on demand, so that data workers, which import parts of this package, do not load JAX.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
