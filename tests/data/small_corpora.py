import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32


class ByteTokenizer:
    """One token per byte. Counts the texts that it encodes."""

    name = "bytes"
    vocab_size = 259
    pad_id, bos_id, eos_id = 0, 1, 2
    file, suffix = b"", ".model"

    def __init__(self, fingerprint: str = "bytes"):
        self.fingerprint = fingerprint
        self.encoded = 0

    def encode(self, text: str) -> Int32[np.ndarray, "_"]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
        self.encoded += len(texts)
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(int(token) - 3 for token in ids if token >= 3).decode()

    def decode_each(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        return [self.decode([token_id]) for token_id in ids]

    def piece(self, token_id: int) -> str:
        return str(token_id)

    def is_special(self, token_id: int) -> bool:
        return token_id < 3


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def random_texts(count: int, longest: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, count)
    return ["".join(generator.choice(list("abcdefgh"), length)) for length in lengths]
