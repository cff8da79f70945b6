"""N-gram hashing: from token ids to row numbers (paper §2.2, equations 1 and 2). Pure NumPy.

Row numbers depend only on token ids. So the input pipeline computes them on the host, before any
device work. This file defines them for all of the project.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt32, UInt64
from sympy import nextprime

from engram_jax.compression import VocabularyProjection
from engram_jax.errors import InputError
from engram_jax.files import atomic_write, parse_json, read_regular

# The token id of an image placeholder (a dead position). The data sources here produce none.
DEAD = -1
ROW_MULTIPLE = 4096  # a table is padded to a multiple of this, whatever the mesh

# Conventions that row numbers depend on, in addition to the arithmetic. The fingerprint includes
# these strings, so a changed word makes every saved hash unreadable.
CONVENTIONS = (
    "layer ids are zero-based",
    "columns are order-major: all heads of 2-grams first",
    "look-back stops at document starts, row starts and dead positions; beyond reads as pad",
    "a dead position reads as pad",
)

type HashVariant = Literal["engram", "qwen"]

# What a variant adds to the conventions.
_VARIANT_CONVENTIONS: dict[HashVariant, tuple[str, ...]] = {
    "engram": (),
    "qwen": ("look-back also stops after end of text, which is the pad id",),
}

# Elements hashed at a time: few enough for their 64-bit buffers (128 KiB) to stay in the cache,
# enough to make the overhead of a NumPy call small.
_BLOCK = 16_384
_MOST_SIZES = 65_536  # primes, which are searched one by one


@dataclass(frozen=True)
class HashSpec:
    """The parameters that define a hash, except the vocabulary projection.

    Attributes:
        layers: zero-based ids of the layers that have a table. A layer's seed depends on its id.
        max_order: largest n-gram order N; the orders are 2…N.
        heads: hash heads K per order.
        rows_per_head: for each order 2…N, the minimum number of rows of a head (the actual number
            is the next unused prime). 1 means one row, which all n-grams share.
        pad_id: token id (before projection) that is read where no token exists.
        seed: seed of the multipliers.
        variant: "engram": of the paper, its demo, and DeepSeek-V4.1. "qwen": of the memory ("PLE")
            of Qwen3.8-Flash-Next. Its multipliers are from splitmix64, and depend on the index of
            the layer among the layers with a table, not on the layer's id. Its `pad_id` is the id
            that ends a text, and the look-back also stops after such a token.
    """

    layers: tuple[int, ...] = (1,)
    max_order: int = 3
    heads: int = 8
    rows_per_head: tuple[int, ...] = (200_000, 200_000)
    pad_id: int = 0
    seed: int = 0
    variant: HashVariant = "engram"

    def __post_init__(self) -> None:
        if self.max_order < 2:
            raise InputError(f"max_order is {self.max_order}; n-gram orders start at 2.")
        if len(self.rows_per_head) != self.max_order - 1:
            raise InputError(
                f"rows_per_head has {len(self.rows_per_head)} entries for the orders "
                f"2…{self.max_order}; give one number per order."
            )
        if self.heads < 1 or min(self.rows_per_head) < 1:
            raise InputError("A hash needs at least one head and one row per head.")
        if self.seed < 0:
            raise InputError(f"The hash seed is {self.seed}; it must not be negative.")
        if (sizes := len(self.layers) * self.heads * len(self.rows_per_head)) > _MOST_SIZES:
            raise InputError(
                f"A hash with {sizes:,} heads in all layers is not supported; at most "
                f"{_MOST_SIZES:,} are. Lower heads or max_order."
            )
        if not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0:
            raise InputError(
                f"Layer ids {self.layers} must be distinct, zero-based and at least one."
            )
        _check_rows(self.layers[0], self.heads * sum(self.rows_per_head))


@dataclass(frozen=True, eq=False)
class NgramHash:
    """The hash of every memory layer: spec, projection, multipliers and primes.

    Create it with `NgramHash.build`, or read it with `NgramHash.load`. A loaded hash uses the
    stored multipliers, so a future change of NumPy's random stream does not affect it.
    """

    spec: HashSpec
    projection: VocabularyProjection
    multipliers: Int64[np.ndarray, "L N"]
    primes: Int64[np.ndarray, "L orders K"]

    @classmethod
    def build(cls, spec: HashSpec, projection: VocabularyProjection) -> "NgramHash":
        """Draws the multipliers and chooses the primes.

        Layer ℓ's multipliers are drawn from `default_rng(seed + 10007·ℓ)`, or by splitmix64. They
        are odd, and small enough that a product with a projected id is below 2⁶³. The size of a
        head is the next prime that no earlier head of the model uses, in the order layers, orders,
        heads.
        """
        if not 0 <= spec.pad_id < len(projection.lookup):
            raise InputError(
                f"pad_id {spec.pad_id} is outside the vocabulary of {len(projection.lookup)} ids."
            )
        half_bound = max(1, (2**63 - 1) // projection.size // 2)
        draw = {"engram": _draw_multipliers, "qwen": _mix_multipliers}[spec.variant]
        used: set[int] = set()
        primes = [
            [
                _unused_primes(rows, spec.heads, used) if rows > 1 else [1] * spec.heads
                for rows in spec.rows_per_head
            ]
            for _ in spec.layers
        ]
        return cls(spec, projection, draw(spec, half_bound), np.array(primes, np.int64))

    def __post_init__(self) -> None:
        for layer, rows in zip(self.spec.layers, self.rows, strict=True):
            _check_rows(layer, rows)

    @property
    def columns(self) -> int:
        """Hash columns H = (N−1)·K."""
        return (self.spec.max_order - 1) * self.spec.heads

    @property
    def rows(self) -> list[int]:
        """Rows of each layer's table, without padding."""
        return [int(sizes.sum()) for sizes in self.primes]

    @property
    def padded_rows(self) -> list[int]:
        """Rows R of each layer's stored table: a multiple of 4,096."""
        return [-(-rows // ROW_MULTIPLE) * ROW_MULTIPLE for rows in self.rows]

    @cached_property
    def offsets(self) -> Int64[np.ndarray, "L orders K"]:
        """First row of every head in its layer's table."""
        flat = self.primes.reshape(len(self.primes), -1)
        return (np.cumsum(flat, axis=1) - flat).reshape(self.primes.shape)

    @property
    def pad(self) -> int:
        """The projected pad id."""
        return int(self.projection.lookup[self.spec.pad_id])

    @property
    def end_of_text(self) -> int | None:
        """The id after which the look-back stops; None: only the documents' boundaries stop it."""
        return self.spec.pad_id if self.spec.variant == "qwen" else None

    def look_back(
        self,
        tokens: Int[np.ndarray, "*batch T"],
        segments: Int[np.ndarray, "*batch T"] | None = None,
    ) -> list[UInt64[np.ndarray, "*batch T"]]:
        """Projected ids x, x₋₁, … x₋₍ₙ₋₁₎ of every position.

        Args:
            tokens: token ids; `DEAD` (−1) marks image placeholders.
            segments: document number of every position, different for all documents of a row; None:
                each row is one document.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        ids = self.projection(tokens)
        dead = ids == DEAD
        # A position sees an older one only if these numbers are equal at both.
        documents = [] if segments is None else [segments]
        if dead.any():
            ids = np.where(dead, self.pad, ids)
            documents.append(np.cumsum(dead, axis=-1))
        if self.end_of_text is not None:
            ends = tokens == self.end_of_text
            documents.append(np.cumsum(ends, axis=-1) - ends)  # an end belongs to what it ends
        ids = ids.astype(np.uint64)
        window = [ids]
        for back in range(1, self.spec.max_order):
            older = np.full_like(ids, self.pad)
            here, there = (..., slice(back, None)), (..., slice(None, -back))
            older[here] = ids[there]
            for numbers in documents:
                older[here][numbers[here] != numbers[there]] = self.pad
            window.append(older)
        return window

    def hash_window(
        self, layer: int, window: Sequence[UInt64[np.ndarray, "G"]]
    ) -> Int32[np.ndarray, "H G"]:
        """Table rows of the n-grams in a window, one line per column, order-major.

        Equations 1 and 2: mixₙ = x·m₀ ⊕ x₋₁·m₁ ⊕ … ⊕ x₋₍ₙ₋₁₎·mₙ₋₁, row = mixₙ mod prime + offset.

        Args:
            layer: layer id, one of `spec.layers`.
            window: x, x₋₁, … from `look_back`, flattened. If it has fewer than N entries, only the
                orders up to that number are hashed.
        """
        index = self.spec.layers.index(layer)
        multipliers = self.multipliers[index].astype(np.uint64)
        count, heads = len(window[0]), self.spec.heads
        rows = np.empty((len(window) - 1, heads, count), np.uint32)
        for start in range(0, count, _BLOCK):
            block = slice(start, start + _BLOCK)
            mix = window[0][block] * multipliers[0]
            for back in range(1, len(window)):
                mix ^= window[back][block] * multipliers[back]
                primes, offsets = self.primes[index, back - 1], self.offsets[index, back - 1]
                _reduce(mix, primes, offsets, out=rows[back - 1, :, block])
        return rows.reshape(len(rows) * heads, count).view(np.int32)

    def hash_tokens(
        self,
        layer: int,
        tokens: Int[np.ndarray, "*batch T"],
        segments: Int[np.ndarray, "*batch T"] | None = None,
    ) -> Int32[np.ndarray, "*batch T H"]:
        """Table rows of every position: the row within the head plus the head's offset.

        To hash only a part of T, include the N − 1 tokens before it.

        Args and errors are those of `look_back`; `layer` is one of `spec.layers`.
        """
        window = [ids.reshape(-1) for ids in self.look_back(tokens, segments)]
        rows = self.hash_window(layer, window)
        return rows.reshape(self.columns, *tokens.shape).transpose(*range(1, tokens.ndim + 1), 0)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify the hash: they change if any possible row number changes."""
        facts = self._facts()
        facts["projection"] = self.projection.fingerprint
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Writes the hash as JSON: spec, conventions, multipliers, primes, projection.

        The file is replaced atomically.
        """
        document = self._facts() | {
            "projection": self.projection.to_json(),
            "fingerprint": self.fingerprint,
        }
        with atomic_write(Path(path)) as partial:
            partial.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "NgramHash":
        """Reads what `save` wrote.

        Raises:
            InputError: the file is missing, damaged, or uses other conventions.
        """
        try:
            document = parse_json(read_regular(Path(path)))
            spec: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in document["spec"].items()
            }
            loaded = cls(
                HashSpec(**spec),
                VocabularyProjection.from_json(document["projection"]),
                np.array(document["multipliers"], np.int64),
                np.array(document["primes"], np.int64),
            )
            conventions, fingerprint = document["conventions"], document["fingerprint"]
        except OSError as error:
            raise InputError(
                f"No hash file at {path} ({error.strerror}); is this a run folder?"
            ) from error
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{path} is not a readable hash file ({error}).") from error
        if conventions != loaded._facts()["conventions"]:
            raise InputError(f"{path} uses other hashing conventions than this version.")
        if loaded.fingerprint != fingerprint:
            raise InputError(
                f"{path} is damaged: its content has fingerprint {loaded.fingerprint}, but the "
                f"stored fingerprint is {fingerprint}."
            )
        return loaded

    def _facts(self) -> dict[str, Any]:
        spec = asdict(self.spec)
        if self.spec.variant == "engram":  # older versions have only this
            del spec["variant"]
        return {
            "spec": spec,
            "conventions": [*CONVENTIONS, *_VARIANT_CONVENTIONS[self.spec.variant]],
            "multipliers": self.multipliers.tolist(),
            "primes": self.primes.tolist(),
        }


def _check_rows(layer: int, rows: int) -> None:
    """Refuses tables that are too large for 32-bit row numbers, of which some are kept free."""
    if rows > 2**30:
        raise InputError(
            f"Layer {layer}'s table has {rows:,} rows; at most 1,073,741,824 are possible with "
            "32-bit row numbers. Lower rows_per_head or heads."
        )


def _draw_multipliers(spec: HashSpec, half_bound: int) -> Int64[np.ndarray, "L N"]:
    """The multipliers of the paper's demo."""
    generators = (np.random.default_rng(spec.seed + 10007 * layer) for layer in spec.layers)
    drawn = [
        generator.integers(0, half_bound, spec.max_order, dtype=np.int64)
        for generator in generators
    ]
    return np.stack(drawn) * 2 + 1


def _mix_multipliers(spec: HashSpec, half_bound: int) -> Int64[np.ndarray, "L N"]:
    """The multipliers of Qwen's variant: number j of layer index i is number j of a stream."""
    streams = (spec.seed + 10007 * index for index in range(len(spec.layers)))
    drawn = [
        [_splitmix64(stream + _PHI * (j + 1)) % half_bound for j in range(spec.max_order)]
        for stream in streams
    ]
    return np.array(drawn, np.int64) * 2 + 1


_PHI = 0x9E3779B97F4A7C15


def _splitmix64(state: int) -> int:
    """The generator of Steele, Lea and Flood (OOPSLA 2014): 64 random bits from a 64-bit state."""
    bits = (state + _PHI) % 2**64
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return bits ^ bits >> 31


def _unused_primes(least: int, count: int, used: set[int]) -> list[int]:
    """The smallest `count` primes ≥ `least` that are not in `used`; adds them to `used`."""
    primes: list[int] = []
    candidate = least - 1
    while len(primes) < count:
        candidate = int(nextprime(candidate))
        if candidate not in used:
            used.add(candidate)
            primes.append(candidate)
    return primes


def _reduce(
    mix: UInt64[np.ndarray, "G"],
    primes: Int64[np.ndarray, "K"],
    offsets: Int64[np.ndarray, "K"],
    out: UInt32[np.ndarray, "K G"],
) -> None:
    """Writes mix mod prime + offset, for every prime.

    NumPy divides 64-bit integers by a scalar with SIMD, but has no SIMD for remainders. So the
    remainder is computed as mix − quotient·prime. It fits in 32 bits, so product and difference
    are computed modulo 2³², on twice as many SIMD lanes.
    """
    low, quotient = mix.astype(np.uint32), np.empty_like(mix)
    for row, prime, offset in zip(out, primes, offsets, strict=True):
        np.floor_divide(mix, np.uint64(prime), out=quotient)
        np.copyto(row, quotient, casting="unsafe")
        np.multiply(row, np.uint32(prime), out=row)
        np.subtract(low, row, out=row)
        np.add(row, np.uint32(offset), out=row)
