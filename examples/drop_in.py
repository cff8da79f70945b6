"""Engram inside another model: a small byte model memorizes a sentence.

Run it: `python examples/drop_in.py`. The model's input is only the current byte. So without the
memory it can only learn how often each byte follows another. With the memory of the last two and
three bytes it can learn the sentence. Both losses are training losses; no text is held out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from engram_jax import EngramConfig, EngramWithTable, HashSpec, NgramHash, VocabularyProjection

TEXT = b"It is a truth universally acknowledged, that a single man in possession of a good fortune "
WIDTH = 32


class SomeoneElsesModel(nnx.Module):
    """Predicts the next byte from the current byte, and optionally from the memory."""

    def __init__(self, ngram_hash: NgramHash, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(256, WIDTH, rngs=rngs)
        self.engram = EngramWithTable(WIDTH, 8, ngram_hash, 0, EngramConfig(), rngs=rngs)
        self.mlp = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array, rows: jax.Array, use_memory: bool) -> jax.Array:
        """Logits of the next byte."""
        x = self.embed(tokens)
        if use_memory:
            fused, _ = self.engram(x[:, :, None], rows)  # one residual branch
            x += fused[:, :, 0]
        return self.head(x + nnx.gelu(self.mlp(x)))


def train(use_memory: bool, steps: int = 200) -> float:
    """Trains for some steps, and returns the last loss in nats per byte."""
    tokens = np.frombuffer(TEXT, np.uint8).astype(np.int32)[None]
    spec = HashSpec(layers=(0,), max_order=3, heads=2, rows_per_head=(500, 500))
    ngram_hash = NgramHash.build(spec, VocabularyProjection.identity(256))
    rows = jnp.asarray(ngram_hash.hash_tokens(0, tokens[:, :-1]))  # on the host, once

    model = SomeoneElsesModel(ngram_hash, nnx.Rngs(0))
    graph, params = nnx.split(model)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(
        params: nnx.State, state: optax.OptState
    ) -> tuple[nnx.State, optax.OptState, jax.Array]:
        def loss(params: nnx.State) -> jax.Array:
            logits = nnx.merge(graph, params)(jnp.asarray(tokens[:, :-1]), rows, use_memory)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return losses.mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for _ in range(steps):
        params, state, value = step(params, state)
    return float(value)


if __name__ == "__main__":
    print(f"without memory: {train(use_memory=False):.3f} nats per byte")
    print(f"with Engram:    {train(use_memory=True):.3f} nats per byte")
