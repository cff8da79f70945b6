"""Samples continuations of a prompt, by a forward pass over a fixed window for every token."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from engram_jax.data.packing import Batch
from engram_jax.errors import InputError
from engram_jax.memory.row_adam import RowAdam
from engram_jax.program import micro_batches
from engram_jax.run import Run
from engram_jax.train_state import Weights

type NextToken = Callable[[Weights, Batch, RowAdam, Array, Array], Array]


def sample(
    run: Run,
    weights: Weights,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
    """Continues a prompt, as the start of a document, up to the end of the document.

    The model sees the last `data.sequence_length` tokens. Each token needs a plan on the host, and
    a forward pass. All forward passes have the same shape, which is compiled once.

    Args:
        run: the run.
        weights: parameters and tables.
        prompt: the text so far; "" samples a complete document.
        tokens: maximum number of tokens to add.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: sample from this many most likely tokens; None: from all.
        seed: equal seeds give equal continuations.

    Returns:
        The continuation, without the prompt.

    Raises:
        InputError: a setting is out of range, or the prompt is not valid Unicode.
    """
    if tokens < 1:
        raise InputError(f"A continuation of {tokens} tokens is empty; ask for at least 1.")
    check_drawing(temperature, top_k, run.tokenizer.vocab_size)
    tokenizer = run.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    start = len(ids)
    program = run.program
    with program.use_mesh():
        next_token = _make_next_token(run, temperature, top_k)
        key = jax.random.key(seed)
        for number in range(tokens):
            window = ids[-run.config.data.sequence_length :]
            batch = program.put(_window_batch(run, window))
            last, draw = jnp.int32(len(window) - 1), jax.random.fold_in(key, number)
            following = int(next_token(weights, batch, program.row_adam, last, draw))
            if following == tokenizer.eos_id:
                break
            ids.append(following)
    # Decoded with the prompt, because some tokenizers drop a space at the start of a text.
    return tokenizer.decode(ids)[len(tokenizer.decode(ids[:start])) :]


def check_drawing(temperature: float, top_k: int | None, vocabulary: int) -> None:
    """Checks the settings of sampling.

    Raises:
        InputError: a setting is out of range.
    """
    if not 0 <= temperature < math.inf:
        raise InputError(f"The temperature is {temperature}; it must be 0 or more.")
    if top_k is not None and not 1 <= top_k <= vocabulary:
        raise InputError(f"top_k is {top_k}; it must be from 1 to {vocabulary}.")


def _window_batch(run: Run, window: list[int]) -> Batch:
    """A batch with one row for every device. The first row holds the window."""
    shape = (1, run.program.mesh.size, run.config.data.sequence_length)
    row = np.index_exp[0, 0, : len(window)]
    tokens = np.full(shape, run.tokenizer.pad_id, np.int32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    tokens[row] = window
    segments[row] = 1
    positions[row] = np.arange(len(window))
    planner = run.program.planner()
    plan = planner(tokens, segments) if planner else None
    return Batch(tokens, tokens, np.zeros(shape, np.float32), segments, positions, plan=plan)


def _make_next_token(run: Run, temperature: float, top_k: int | None) -> NextToken:
    """The jitted function from a batch to the token after position `last` of its row 0."""
    program = run.program

    def next_token(
        weights: Weights, batch: Batch, row_adam: RowAdam, last: Array, key: Array
    ) -> Int32[Array, ""]:
        read = program.read_rows(weights, batch.plan, row_adam)
        rows = {layer: of_layer.values for layer, of_layer in read.items()}
        only = jax.tree.map(lambda array: array[0], micro_batches(batch))
        by_position, _ = program.forward(weights.params, rows, only, weights.expert_bias)
        # A model may have more ids than its tokenizer.
        pieces = run.tokenizer.vocab_size
        logits = jax.sharding.reshard(by_position, jax.P())[0, last, :pieces]
        if temperature == 0:
            return jnp.argmax(logits)
        if top_k is not None:
            least = jax.lax.top_k(logits, top_k)[0][-1]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits / temperature)

    return jax.jit(next_token)
