"""The compiled programs of generation: reading prompts, and drawing tokens in a loop."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from engram_jax.decoding.extend import BY_SEQUENCE, extend, on_all_devices
from engram_jax.decoding.sampling import DrawSettings, draw
from engram_jax.decoding.state import DecodeState
from engram_jax.decoding.weights import DecodeWeights
from engram_jax.program import Program
from engram_jax.sharding import TOKEN_AXES

BURST = 16  # tokens of a sequence between two looks of the host
_PROMPT_TOKENS = 2048  # of all sequences of a device, in a call
_PROMPT_CHUNK = 256


class Drawing(NamedTuple):
    """What a burst of the loop changes, besides the state.

    Attributes:
        logits: of every sequence's next token.
        drawn: number of tokens drawn so far.
        done: whether a sequence has ended.
    """

    logits: Float[Array, "B V"]
    drawn: Int32[Array, "B"]
    done: Bool[Array, "B"]


class Limits(NamedTuple):
    """Constants of the loop, as runtime values: the ids that can be drawn are below `pieces`."""

    pieces: Int32[Any, ""]
    end_id: Int32[Any, ""]


class Programs(NamedTuple):
    """The compiled programs of one batch size and capacity.

    Attributes:
        empty: gives a state without tokens, and logits to be replaced.
        prefill: see `make_prefill`.
        burst: see `make_burst`.
        chunk: number of tokens of a prompt in a call of `prefill`.
    """

    empty: jax.stages.Compiled
    prefill: jax.stages.Compiled
    burst: jax.stages.Compiled
    chunk: int


def make_prefill(program: Program) -> jax.stages.Wrapped:
    """The jitted function that appends a chunk of the prompts.

    Its arguments are prepared weights, state, tokens [B, T], their counts [B], and the logits after
    the chunks before, which are kept for sequences without further tokens. It returns state and
    logits [B, V].
    """

    def prefill(
        weights: DecodeWeights, state: DecodeState, tokens: Array, count: Array, before: Array
    ) -> tuple[DecodeState, Array]:
        logits, state = extend(program, weights, state, tokens, count)
        return state, jnp.where(count[:, None] > 0, logits, before)

    return on_all_devices(prefill, [True] * 4, donate=(1,))


def make_burst(program: Program) -> jax.stages.Wrapped:
    """The jitted loop: draws up to `BURST` tokens of every sequence, until all have ended.

    Its arguments are prepared weights, state, drawing, settings, maximum number of tokens [B], and
    limits. It returns state, drawing, tokens [B, BURST] (−1: none) and their log-probabilities.
    """

    def burst(
        weights: DecodeWeights,
        state: DecodeState,
        drawing: Drawing,
        settings: DrawSettings,
        most: Array,
        limits: Limits,
    ) -> tuple[DecodeState, Drawing, Array, Array]:
        def is_going(carry: Any) -> Array:
            return (carry[0] < BURST) & carry[1]

        def step(carry: Any) -> Any:
            number, _, state, (logits, drawn, done), tokens, log_probabilities = carry
            token, log_probability = draw(logits, limits.pieces, settings, drawn)
            tokens = tokens.at[:, number].set(jnp.where(done, -1, token))
            log_probabilities = log_probabilities.at[:, number].set(log_probability)
            drawn = jnp.where(done, drawn, drawn + 1)
            done |= (token == limits.end_id) | (drawn >= most)
            count = jnp.where(done, 0, 1)
            logits, state = extend(program, weights, state, token[:, None], count)
            drawing = Drawing(logits, drawn, done)
            return number + 1, _any(~done), state, drawing, tokens, log_probabilities

        shape = (len(most), BURST)
        carry = (
            *(jnp.int32(0), _any(~drawing.done), state, drawing),
            *(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape)),
        )
        return jax.lax.while_loop(is_going, step, carry)[2:]

    return on_all_devices(burst, [True] * 4 + [False], donate=(1,))


def _any(flags: Bool[Array, "B"]) -> Bool[Array, ""]:
    """Whether a flag is set on any device. Devices that left the loop earlier would not answer."""
    return jax.lax.pmax(jnp.any(flags).astype(jnp.int32), TOKEN_AXES) > 0


class ProgramCache:
    """The programs of a configuration, each compiled at its first use.

    Args:
        program: the computations of the configuration.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._prefill, self._burst = make_prefill(program), make_burst(program)
        self._compiled: dict[Any, Programs] = {}

    def get(self, weights: DecodeWeights, batch: int, capacity: int) -> Programs:
        """The programs for prepared weights, B sequences and a number of slots.

        Call it inside `program.use_mesh()`.
        """
        key = jax.tree.structure(weights), batch, capacity
        if key not in self._compiled:
            self._compiled[key] = self._compile(weights, batch, capacity)
        return self._compiled[key]

    def _compile(self, weights: DecodeWeights, batch: int, capacity: int) -> Programs:
        """Compiles the programs of a shape."""
        sharding = jax.NamedSharding(self.program.mesh, BY_SEQUENCE)
        chunk = min(_PROMPT_CHUNK, max(_PROMPT_TOKENS * self.program.mesh.size // batch, 1))

        def make_empty() -> tuple[DecodeState, Array]:
            decoder = nnx.merge(self.program.graph, weights.params)
            logits = jnp.zeros((batch, weights.head.shape[1]))
            return decoder.empty_state(batch, capacity), logits

        def shape(dtype: Any, *rest: int) -> Any:
            return jax.ShapeDtypeStruct((batch, *rest), dtype, sharding=sharding)

        state, logits = jax.tree.map(
            lambda leaf: shape(leaf.dtype, *leaf.shape[1:]), jax.eval_shape(make_empty)
        )
        whole, number = shape(np.int32), shape(np.float32)
        ways = DrawSettings(number, whole, number, number, shape(np.uint32))
        limits = Limits(np.int32(0), np.int32(0))
        lowered = (
            jax.jit(make_empty, out_shardings=sharding).lower(),
            self._prefill.lower(weights, state, shape(np.int32, chunk), whole, logits),
            self._burst.lower(
                weights, state, Drawing(logits, whole, shape(bool)), ways, whole, limits
            ),
        )
        # Not in threads: after parallel loads from the compilation cache, programs that were loaded
        # later computed wrong numbers, or hung (jax 0.12.0, CPU).
        empty, prefill, burst = (program.compile() for program in lowered)
        return Programs(empty, prefill, burst, chunk)
