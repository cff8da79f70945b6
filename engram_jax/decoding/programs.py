"""The compiled programs of generation: reading prompts, and drawing tokens in a loop."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int32

from engram_jax.decoding.extend import BY_SEQUENCE, FetchedRecords, extend, on_all_devices
from engram_jax.decoding.sampling import DrawSettings, draw
from engram_jax.decoding.weights import DecodeWeights
from engram_jax.layers.decode_state import DecodeState
from engram_jax.memory.store_table import called_tables
from engram_jax.program import Program
from engram_jax.progress import say_if_slow
from engram_jax.sharding import TOKEN_AXES

BURST = 16  # tokens of a sequence between two reads by the host
_PROMPT_TOKENS = 2048  # of all sequences of a device, in a call
_PROMPT_CHUNK = 256


class Drawing(NamedTuple):
    """What a burst of the loop changes, besides the state.

    Attributes:
        token: the last token of every sequence, which is not yet in the state.
        drawn: number of tokens drawn so far.
        done: whether a sequence has ended.
        given: tokens that follow instead of drawn ones, the rest of a short prompt; then −1.
    """

    token: Int32[Array, "B"]
    drawn: Int32[Array, "B"]
    done: Bool[Array, "B"]
    given: Int32[Array, "B BURST"]


class Limits(NamedTuple):
    """Constants of the loop, as runtime values: the ids that can be drawn are below `pieces`."""

    pieces: Int32[Any, ""]
    end_id: Int32[Any, ""]


def make_prefill(program: Program) -> jax.stages.Wrapped:
    """The jitted function that appends a chunk of the prompts.

    Its arguments are prepared weights, state, tokens [B, T], their counts [B], and the records of
    their rows, if programs cannot read the tables. It returns the state.
    """

    def prefill(
        weights: DecodeWeights,
        state: DecodeState,
        tokens: Array,
        count: Array,
        fetched: FetchedRecords | None,
    ) -> DecodeState:
        return extend(program, weights, state, tokens, count, fetched=fetched)[1]

    return on_all_devices(prefill, [True] * 4, donate=(1,))


def make_burst(program: Program) -> jax.stages.Wrapped:
    """The jitted loop: appends up to `BURST` tokens to every sequence, until all have ended.

    Its arguments are prepared weights, state, drawing, settings, maximum number of tokens [B], and
    limits. It returns state, drawing, drawn tokens [B, BURST] (−1: none) and their
    log-probabilities. A step appends the last token, and draws the next one if none is given. So
    the last token of all is not appended.
    """

    def burst(
        weights: DecodeWeights,
        state: DecodeState,
        drawing: Drawing,
        settings: DrawSettings,
        max_tokens: Array,
        limits: Limits,
    ) -> tuple[DecodeState, Drawing, Array, Array]:
        def is_going(carry: Any) -> Array:
            return (carry[0] < BURST) & carry[1]

        def step(carry: Any) -> Any:
            number, _, state, (token, drawn, done, given), tokens, log_probabilities = carry
            logits, state = extend(program, weights, state, token[:, None], jnp.where(done, 0, 1))
            new, log_probability = draw(logits, limits.pieces, settings, drawn)
            draws = ~done & (given[:, number] < 0)
            tokens = tokens.at[:, number].set(jnp.where(draws, new, -1))
            log_probabilities = log_probabilities.at[:, number].set(log_probability)
            drawn += draws
            done |= draws & ((new == limits.end_id) | (drawn >= max_tokens))
            drawing = Drawing(jnp.where(draws, new, given[:, number]), drawn, done, given)
            return number + 1, _any(~done), state, drawing, tokens, log_probabilities

        shape = (len(max_tokens), BURST)
        carry = (
            *(jnp.int32(0), _any(~drawing.done), state, drawing),
            *(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape)),
        )
        _, _, state, drawing, tokens, log_probabilities = jax.lax.while_loop(is_going, step, carry)
        drawing = drawing._replace(given=jnp.full(shape, -1, jnp.int32))
        return state, drawing, tokens, log_probabilities

    return on_all_devices(burst, [True] * 4 + [False], donate=(1,))


def _any(flags: Bool[Array, "B"]) -> Bool[Array, ""]:
    """Whether a flag is set on any device. Devices that left the loop earlier would not answer."""
    return jax.lax.pmax(jnp.any(flags).astype(jnp.int32), TOKEN_AXES) > 0


class ProgramCache:
    """The programs of a configuration, each compiled at its first use.

    Call its methods inside `program.use_mesh()`, with prepared weights, the number of sequences B
    and the number of slots.

    Args:
        program: the computations of the configuration.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._prefill, self._burst = make_prefill(program), make_burst(program)
        self._compiled: dict[Any, jax.stages.Compiled] = {}
        self._by_sequence = jax.NamedSharding(program.mesh, BY_SEQUENCE)

    def chunk(self, batch: int) -> int:
        """Number of tokens of every sequence in a call that reads texts."""
        return min(_PROMPT_CHUNK, max(_PROMPT_TOKENS * self.program.mesh.size // batch, 1))

    @property
    def columns(self) -> int:
        """Rows H of every token in each layer; 0 without memory."""
        ngram_hash = self.program.ngram_hash
        return ngram_hash.columns if ngram_hash else 0

    def empty(self, weights: DecodeWeights, batch: int, capacity: int) -> DecodeState:
        """A new state without tokens."""

        def lower() -> jax.stages.Lowered:
            make = self._make_empty(weights, batch, capacity)
            return jax.jit(make, out_shardings=self._by_sequence).lower()

        return self._compile("an empty state", lower, weights, batch, capacity)()

    def prefill(self, weights: DecodeWeights, batch: int, capacity: int) -> jax.stages.Compiled:
        """The program that reads prompts: see `make_prefill`."""
        chunk = self.chunk(batch)

        def lower() -> jax.stages.Lowered:
            of = partial(self._shape, batch)
            fetched = {
                layer: of(np.uint32, chunk, self.columns, table.layout.words)
                for layer, table in called_tables(weights.outside).items()
            }
            state = self._state_shape(weights, batch, capacity)
            inputs = of(np.int32, chunk), of(np.int32), fetched or None
            return self._prefill.lower(weights, state, *inputs)

        return self._compile("reading of prompts", lower, weights, batch, capacity)

    def burst(self, weights: DecodeWeights, batch: int, capacity: int) -> jax.stages.Compiled:
        """The loop that draws tokens: see `make_burst`."""

        def lower() -> jax.stages.Lowered:
            of = partial(self._shape, batch)
            whole, number = of(np.int32), of(np.float32)
            settings = DrawSettings(number, whole, number, number, of(np.uint32))
            drawing = Drawing(whole, whole, of(bool), of(np.int32, BURST))
            state, limits = self._state_shape(weights, batch, capacity), Limits(*[np.int32(0)] * 2)
            return self._burst.lower(weights, state, drawing, settings, whole, limits)

        return self._compile("generation", lower, weights, batch, capacity)

    def _make_empty(
        self, weights: DecodeWeights, batch: int, capacity: int
    ) -> Callable[[], DecodeState]:
        def make_empty() -> DecodeState:
            return nnx.merge(self.program.graph, weights.params).empty_state(batch, capacity)

        return make_empty

    def _shape(self, batch: int, dtype: Any, *rest: int) -> Any:
        """An array that begins with B."""
        return jax.ShapeDtypeStruct((batch, *rest), dtype, sharding=self._by_sequence)

    def _state_shape(self, weights: DecodeWeights, batch: int, capacity: int) -> DecodeState:
        """Shapes, dtypes and shardings of a decode state, for lowering."""
        state: DecodeState = jax.tree.map(
            lambda leaf: self._shape(batch, leaf.dtype, *leaf.shape[1:]),
            jax.eval_shape(self._make_empty(weights, batch, capacity)),
        )
        return state

    def _compile(
        self,
        name: str,
        lower: Callable[[], jax.stages.Lowered],
        weights: DecodeWeights,
        batch: int,
        capacity: int,
    ) -> jax.stages.Compiled:
        """Compiles a program of a shape at its first use.

        Not in threads: after parallel loads from the compilation cache, programs that were loaded
        later computed wrong numbers, or hung (jax 0.12.0, CPU).
        """
        key = name, jax.tree.structure(weights), batch, capacity
        if key not in self._compiled:
            sequences = f"{batch} sequence{'s' * (batch > 1)}"
            with say_if_slow(f"Compiling {name} for {sequences} of up to {capacity} tokens."):
                self._compiled[key] = lower().compile()
        return self._compiled[key]
