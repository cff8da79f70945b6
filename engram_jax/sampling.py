"""Sampled continuations of a prompt: a full forward pass over a fixed window for every token."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int32

from engram_jax.data.packing import Batch
from engram_jax.errors import InputError
from engram_jax.memory import lookup
from engram_jax.run import Run
from engram_jax.train_state import Weights

type NextToken = Callable[[Weights, Batch, Array, Array], Array]


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
    """Continues a prompt, as the beginning of a document, up to the document's end.

    The model sees the last `data.sequence_length` tokens. Rows are found on the host, so each
    token costs one plan and one forward pass of a single compiled shape.

    Args:
        run: the run.
        weights: parameters and tables.
        prompt: the text so far; "" samples a document from its beginning.
        tokens: how many tokens to add at most.
        temperature: what logits are divided by; 0 takes the likeliest token.
        top_k: draw among that many likeliest tokens; None: among all.
        seed: equal seeds give equal continuations.

    Returns:
        The continuation, without the prompt.

    Raises:
        InputError: a setting is out of range, or the prompt is no valid Unicode.
    """
    if tokens < 1:
        raise InputError(f"A continuation of {tokens} tokens is none; ask for at least 1.")
    check_drawing(temperature, top_k, run.tokenizer.vocab_size)
    tokenizer = run.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    start = len(ids)
    with jax.set_mesh(run.mesh):
        next_token = _make_next_token(run, temperature, top_k)
        key = jax.random.key(seed)
        for number in range(tokens):
            window = ids[-run.config.data.sequence_length :]
            batch = run.put(_window_batch(run, window))
            last = jnp.int32(len(window) - 1)
            following = int(next_token(weights, batch, last, jax.random.fold_in(key, number)))
            if following == tokenizer.eos_id:
                break
            ids.append(following)
    # Decoded with the prompt: some tokenizers drop the space that begins a text.
    return tokenizer.decode(ids)[len(tokenizer.decode(ids[:start])) :]


def check_drawing(temperature: float, top_k: int | None, vocabulary: int) -> None:
    """Looks whether tokens can be drawn so.

    Raises:
        InputError: they cannot.
    """
    if not 0 <= temperature < math.inf:
        raise InputError(f"The temperature is {temperature}; it must be 0 or more.")
    if top_k is not None and not 1 <= top_k <= vocabulary:
        raise InputError(f"top_k is {top_k}; the vocabulary allows 1 to {vocabulary}.")


def _window_batch(run: Run, window: list[int]) -> Batch:
    """A batch whose first row holds the window, with one row for every device."""
    shape = (1, run.mesh.size, run.config.data.sequence_length)
    row = np.index_exp[0, 0, : len(window)]
    tokens = np.full(shape, run.tokenizer.pad_id, np.int32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    tokens[row] = window
    segments[row] = 1
    positions[row] = np.arange(len(window))
    planner = run.planner()
    plan = planner(tokens, segments) if planner else None
    return Batch(tokens, tokens, np.zeros(shape, np.float32), segments, positions, plan)


def _make_next_token(run: Run, temperature: float, top_k: int | None) -> NextToken:
    """A jitted function (weights, batch, last, key) → the token after position `last` of row 0."""

    def next_token(weights: Weights, batch: Batch, last: Array, key: Array) -> Int32[Array, ""]:
        memory = {}
        for layer, table in weights.tables.items():
            gather = run.config.memory.gather
            rows = lookup.read_rows(
                table, batch.plan.rows[layer], run.row_adam, weights.step, gather
            ).values
            slots = jax.tree.map(lambda array: array[0], batch.plan.slots[layer])
            memory[layer] = lookup.expand(rows, slots, gather)
        decoder = nnx.merge(run.graph, weights.params)
        by_position, _ = decoder(
            *(batch.tokens[0], memory, batch.segments[0], batch.positions[0]), weights.expert_bias
        )
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
