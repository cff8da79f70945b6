"""The state of decoding: what is cached of every position of a batch of sequences.

Everything is stored by slot, and a sequence's slots are its positions in the order of arrival. So
removing the last n tokens of a sequence is lowering its length by n: later tokens overwrite them.
"""

from dataclasses import dataclass, replace
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from engram_jax.layers.block import BlockCache
from engram_jax.layers.slots import Slots, write


@no_type_check  # no checks at run time: as a pytree it may also hold shapes or shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """The state of B sequences. Slots from a sequence's length on are unused.

    Attributes:
        tokens: token ids.
        segments: document numbers.
        positions: positions within the documents.
        caches: of the blocks, in order.
        length: number of used slots of every sequence.
    """

    tokens: Int32[Array, "B slots"]
    segments: Int32[Array, "B slots"]
    positions: Int32[Array, "B slots"]
    caches: tuple[BlockCache, ...]
    length: Int32[Array, "B"]

    @classmethod
    def empty(cls, batch: int, capacity: int, caches: tuple[BlockCache, ...]) -> "DecodeState":
        """A state without tokens."""
        tokens, segments, positions = (jnp.zeros((batch, capacity), jnp.int32) for _ in range(3))
        return cls(tokens, segments, positions, caches, jnp.zeros(batch, jnp.int32))

    @property
    def capacity(self) -> int:
        """Number of slots of a sequence."""
        return self.tokens.shape[1]

    def append(
        self,
        tokens: Int32[Array, "B T"],
        segments: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
    ) -> tuple["DecodeState", Slots]:
        """Writes T tokens after every sequence, and returns their slots; lengths do not change."""
        new = self.length[:, None] + jnp.arange(tokens.shape[1])[None]
        ids = (self.tokens, tokens), (self.segments, segments), (self.positions, positions)
        written = [write(cache, new, values) for cache, values in ids]
        state = replace(self, tokens=written[0], segments=written[1], positions=written[2])
        return state, Slots(self.length, written[1], new)

    def rewind(self, count: Int32[Array, "B"]) -> "DecodeState":
        """Removes the last `count` tokens of every sequence, at most its length.

        It is for speculative decoding and for editing a text, where `Decoder.extend` verifies
        several tokens and some are refused. `Generator` does not need it: after a stop string, the
        sequence has ended, and its state is not used again.
        """
        return replace(self, length=self.length - count)
