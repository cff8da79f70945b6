"""Vocabulary projection V → V′: ids whose texts differ only in case, accents or spacing are merged.

Engram paper (arXiv 2601.07372), §2.2 and appendix C.
"""

import base64
import hashlib
import re
import unicodedata
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer

from engram_jax.errors import InputError
from engram_jax.tokenizer import Tokenizer

_SPACES = re.compile(r"[ \t\r\n]+")


@dataclass(frozen=True, eq=False)
class VocabularyProjection:
    """Projected id of every token id; compare two by `fingerprint`.

    Attributes:
        lookup: projected id in [0, V′) of each id in [0, V); read-only.
    """

    lookup: Int32[np.ndarray, "V"]

    def __post_init__(self) -> None:
        """Keep a read-only copy of the lookup array."""
        lookup = self.lookup.copy()
        lookup.setflags(write=False)
        object.__setattr__(self, "lookup", lookup)

    @classmethod
    def identity(cls, vocab_size: int) -> "VocabularyProjection":
        """Return the projection that maps every id to itself."""
        return cls(np.arange(vocab_size, dtype=np.int32))

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids."""
        return self.lookup.size

    @cached_property
    def size(self) -> int:
        """V′, the number of projected ids."""
        return int(self.lookup.max()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of `lookup` as little-endian int32."""
        return hashlib.sha256(self._table_bytes()).hexdigest()[:16]

    def __call__(self, ids: Integer[np.ndarray, "..."]) -> Int32[np.ndarray, "..."]:
        """Return the projected ids, in the same shape; −1 (an image placeholder) stays −1.

        Raises:
            InputError: an id is outside [−1, V), or the ids are not integers.
        """
        if ids.dtype.kind not in "iu":
            raise InputError(f"token ids of dtype {ids.dtype} are not integers; convert them.")
        if ids.size and not (ids.min() >= -1 and ids.max() < self.vocab_size):
            wrong = ids.min() if ids.min() < -1 else ids.max()
            raise InputError(
                f"token id {wrong} is outside the vocabulary of {self.vocab_size} ids; use the "
                "tokenizer of this projection (−1 marks an image placeholder)."
            )
        return np.asarray(self._lookup_and_dead[ids])

    @cached_property
    def _lookup_and_dead(self) -> np.ndarray:
        # Index −1 reads the last entry.
        return np.append(self.lookup, np.int32(-1))

    def _table_bytes(self) -> bytes:
        return self.lookup.astype("<i4").tobytes()

    def to_json(self) -> dict[str, Any]:
        """Return JSON-serializable content: sizes, fingerprint and the compressed `lookup`."""
        return {
            "vocab_size": self.vocab_size,
            "size": self.size,
            "fingerprint": self.fingerprint,
            "lookup": base64.b64encode(zlib.compress(self._table_bytes(), 9)).decode("ascii"),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "VocabularyProjection":
        """Restore a projection from the content that `to_json` returned.

        Raises:
            InputError: a part is missing, or the fingerprint does not match.
        """
        try:
            table = zlib.decompress(base64.b64decode(content["lookup"], validate=True))
            expected = (content["vocab_size"], content["size"], content["fingerprint"])
            projection = cls(np.frombuffer(table, "<i4").astype(np.int32))
            found = (projection.vocab_size, projection.size, projection.fingerprint)
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise InputError(
                f"the stored vocabulary projection is damaged ({error!r}); restore the file it "
                "came from."
            ) from error
        if found != expected:
            raise InputError(
                f"the stored vocabulary projection is damaged: V, V′ and fingerprint are {found}, "
                f"but {expected} were stored; restore the file it came from."
            )
        return projection


def project_vocabulary(tokenizer: Tokenizer) -> VocabularyProjection:
    """Return the projection of a tokenizer: ids with equal keys get one projected id.

    The key of an id is its text, decoded alone and normalized (`normalize`). If the text is not
    valid UTF-8, the key is the raw piece. For control, unknown and padding pieces, SentencePiece
    decodes nothing or the same text for all, so their key is the piece's name. Projected ids are
    numbered by first appearance.
    """
    new_ids: dict[str, int] = {}
    lookup = np.empty(tokenizer.vocab_size, np.int32)
    for token_id, key in enumerate(tokenizer.decode_each(range(tokenizer.vocab_size))):
        unnamed = tokenizer.is_special(token_id) and key != tokenizer.piece(token_id)
        key = tokenizer.piece(token_id) if unnamed or "\ufffd" in key else normalize(key)
        lookup[token_id] = new_ids.setdefault(key, len(new_ids))
    return VocabularyProjection(lookup)


def normalize(text: str) -> str:
    """Remove case, marks, compatibility forms and outer spaces from a text.

    The steps are: NFKC; NFD; remove category M; lowercase; replace each run of spaces, tabs and
    line ends by one space; strip, unless the result is a single space. If nothing is left, return
    the original text.
    """
    decomposed = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    bare = "".join(c for c in decomposed if not unicodedata.category(c).startswith("M"))
    spaced = _SPACES.sub(" ", bare.lower())
    return (spaced if spaced == " " else spaced.strip()) or text
