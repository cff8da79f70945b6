from collections.abc import Callable, Sequence

import pytest
from small_corpora import ByteTokenizer, write_jsonl

from engram_jax.data.corpus import Corpus
from engram_jax.data.token_cache import build_corpus


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def corpus_of(tmp_path) -> Callable[..., Corpus]:
    """Build a corpus of these texts."""

    def build(texts: Sequence[str], held_out: float = 0.0, name: str = "texts") -> Corpus:
        path = write_jsonl(tmp_path / f"{name}.jsonl", texts)
        return build_corpus(path, ByteTokenizer(), tmp_path / "cache", held_out)

    return build
