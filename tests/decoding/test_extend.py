"""The cached decoder gives the logits of the training forward pass, for every form and split."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lively import enliven

from engram_jax.command_line import load_named_config
from engram_jax.decoder_config import DecoderConfig, MemorySites
from engram_jax.layers import slots
from engram_jax.layers.attention import AttentionConfig
from engram_jax.layers.engram import EngramConfig
from engram_jax.layers.hyper_connections import HyperConnectionsConfig
from engram_jax.layers.latent_attention import LatentAttentionConfig
from engram_jax.layers.mixture_of_experts import ExpertsConfig
from engram_jax.layers.positions import YarnConfig
from engram_jax.model import Decoder

LENGTH, CAPACITY = 70, 80
CHUNKS = (1, 2, 3, 7, LENGTH)
SITES = MemorySites(layers=(0, 1), width=12, orders=2)
PLAIN = DecoderConfig(
    vocabulary=50,
    width=16,
    layers=2,
    attention=AttentionConfig(heads=4, kv_heads=2, head_width=8),
    feed_forward=24,
)
LATENT = LatentAttentionConfig(
    heads=2,
    query_rank=8,
    latent_width=16,
    head_width=8,
    rotary_width=4,
    value_width=6,
    yarn=YarnConfig(trained_length=20),
)
BACKBONE = replace(
    PLAIN,
    layers=3,
    attention=LATENT,
    experts=ExpertsConfig(routed=5, shared=1, active=2, width=8, multiple=2),
    hyper_connections=HyperConnectionsConfig(branches=2),
    tie_embeddings=False,
    scan=True,
    remat="experts_saveable",
)
V41 = EngramConfig(bias=False, convolution=False, norm_epsilon=1e-20, signed_root="copysign")
FORMS = {
    "default": (PLAIN, SITES),
    "backbone": (BACKBONE, replace(SITES, layers=(0,))),
    "over_encoding": (PLAIN, MemorySites(input="over_encoding", width=12, orders=2)),
    "dense": (replace(PLAIN, tie_embeddings=False), MemorySites()),
    "v41": (replace(BACKBONE, engram=V41), replace(SITES, layers=(1,))),
    "single_fusion": (
        replace(PLAIN, single_fusion=True, hyper_connections=HyperConnectionsConfig(branches=2)),
        SITES,
    ),
    "ungated": (replace(PLAIN, engram=EngramConfig(gated=False)), SITES),
    "added": (PLAIN, MemorySites(input="added", width=32, orders=2)),
    "cross_documents": (replace(PLAIN, engram=EngramConfig(cross_documents=True)), SITES),
}
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention visits five blocks."""
    monkeypatch.setattr(slots, "BLOCK", 16)
    yield


def make(config: DecoderConfig, sites: MemorySites) -> Decoder:
    """A decoder without zeros in its parameters."""
    make = partial(Decoder, config, sites)
    graph, params = nnx.split(make(rngs=nnx.Rngs(0, memory=1)))
    return nnx.merge(graph, enliven(nnx.to_pure_dict(params)))


class Text:
    """Two sequences of 70 tokens, in documents, with image placeholders, and their memory."""

    def __init__(self, decoder: Decoder, sites: MemorySites) -> None:
        generator = np.random.default_rng(3)
        starts = generator.random((2, LENGTH)) < 0.08
        starts[:, 0] = True
        self.segments = np.cumsum(starts, axis=1, dtype=np.int32)
        since = np.where(starts, np.arange(LENGTH)[None], 0)
        self.positions = np.int32(np.arange(LENGTH)[None] - np.maximum.accumulate(since, axis=1))
        self.alive = generator.random((2, LENGTH)) > 0.1
        ids = decoder.config.vocabulary
        tokens = generator.integers(0, ids, (2, LENGTH), dtype=np.int32)
        self.tokens = np.where(self.alive, tokens, -1)
        layers = sites.layers or ((0,) if sites.input else ())
        shape = (2, LENGTH, sites.width)
        self.memory = {layer: generator.normal(size=shape).astype(np.float32) for layer in layers}
        routed = decoder.config.experts.routed if decoder.config.experts else 0
        self.bias = {
            layer: jnp.asarray(generator.normal(size=routed), jnp.float32)
            for layer in decoder.config.expert_layers
        }

    def whole(self, decoder: Decoder) -> np.ndarray:
        """Logits of the training forward pass."""
        run = nnx.jit(lambda decoder, *inputs, **named: decoder(*inputs, **named)[0])
        return np.asarray(
            run(
                *(decoder, self.tokens, self.memory, self.segments, self.positions),
                expert_bias=self.bias,
                token_mask=self.alive,
            )
        )

    def part(self, begin: np.ndarray, length: int) -> tuple[dict, np.ndarray]:
        """The next tokens of both sequences from `begin` on, and how many there are."""
        index = np.minimum(begin[:, None] + np.arange(length), LENGTH - 1)
        take = lambda array: array[np.arange(2)[:, None], index]  # noqa: E731
        part = {
            "tokens": take(self.tokens),
            "memory": jax.tree.map(take, self.memory),
            "segments": take(self.segments),
            "positions": take(self.positions),
            "token_mask": take(self.alive),
        }
        return part, np.int32(np.clip(LENGTH - begin, 0, length))


def make_extend(decoder: Decoder, logits: str = "all"):
    graph, params = nnx.split(decoder)
    head = decoder.embedding if decoder.config.tie_embeddings else decoder.head

    @partial(jax.jit, donate_argnums=0)
    def extend(state, part, count, bias):
        decoder = nnx.merge(graph, params)
        state, slots = state.append(part["tokens"], part["segments"], part["positions"])
        return decoder.extend(
            *(state, slots, part["memory"]),
            head[...].astype(decoder.config.dtype).T,
            count=count,
            expert_bias=bias,
            token_mask=part["token_mask"],
            logits=logits,
        )

    return extend


def run_in_chunks(decoder: Decoder, text: Text, chunk: int, offset: int = 0) -> np.ndarray:
    """Logits of `extend`. The second sequence's chunks are shorter by `offset` at first."""
    extend, state = make_extend(decoder), decoder.empty_state(2, CAPACITY)
    logits = np.zeros((2, LENGTH, decoder.config.vocabulary), np.float32)
    begin = np.zeros(2, np.int32)
    while begin.min() < LENGTH:
        part, count = text.part(begin, chunk)
        if not begin.any():
            count[1] = max(count[1] - offset, 0)
        found, state = extend(state, part, count, text.bias)
        for row in range(2):
            ends = begin[row] + count[row]
            logits[row, begin[row] : ends] = np.asarray(found)[row, : count[row]]
        begin += count
        np.testing.assert_array_equal(state.length, begin)
    np.testing.assert_array_equal(state.tokens[:, :LENGTH], text.tokens)
    return logits


def assert_near(found: np.ndarray, expected: np.ndarray, error: float = 1e-5) -> None:
    np.testing.assert_allclose(found, expected, atol=error * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("name", ["default", *(map(slow, list(FORMS)[1:]))])
def test_every_split_gives_the_logits_of_one_pass(name: str) -> None:
    config, sites = FORMS[name]
    decoder = make(config, sites)
    text = Text(decoder, sites)
    expected = text.whole(decoder)
    for chunk in CHUNKS:
        assert_near(run_in_chunks(decoder, text, chunk), expected)


@pytest.mark.parametrize("name", list(FORMS)[1:])
def test_every_form(name: str) -> None:
    """In chunks of 9, of which the last is partly empty, with sequences of unequal lengths."""
    config, sites = FORMS[name]
    decoder = make(config, sites)
    text = Text(decoder, sites)
    assert_near(run_in_chunks(decoder, text, 9, offset=4), text.whole(decoder))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "over_encoding", "dense_2m", "moe_2m", "engram_2m"])
def test_the_shipped_models(name: str) -> None:
    config = load_named_config(name)
    decoder = make(config.model, config.memory.sites)
    text = Text(decoder, config.memory.sites)
    expected = text.whole(decoder)
    for chunk in (1, 7, LENGTH):
        assert_near(run_in_chunks(decoder, text, chunk), expected)


def test_a_capacity_that_is_no_multiple_of_the_blocks() -> None:
    """It is rounded up: a last block that begins earlier would see slots twice."""
    decoder = make(*FORMS["dense"])
    text, capacity = Text(decoder, FORMS["dense"][1]), LENGTH + 3
    extend, state = make_extend(decoder), decoder.empty_state(2, capacity)
    assert state.capacity % slots.BLOCK == 0 and capacity <= state.capacity < capacity + slots.BLOCK
    for begin in range(0, LENGTH, 10):
        part, count = text.part(np.full(2, begin, np.int32), 10)
        found, state = extend(state, part, count, {})
    assert_near(np.asarray(found), text.whole(decoder)[:, begin : begin + 10])


def test_any_number_of_tokens_can_be_taken_back() -> None:
    """A whole text is rewound by n, by another n in each sequence, and continued."""
    decoder = make(*FORMS["default"])
    text = Text(decoder, SITES)
    expected, extend = text.whole(decoder), make_extend(decoder)
    state = decoder.empty_state(2, CAPACITY)
    for _ in range(8):
        part, count = text.part(np.asarray(state.length), 9)
        _, state = extend(state, part, count, text.bias)
    assert (np.asarray(state.length) == LENGTH).all()
    for taken in range(1, LENGTH + 1):
        back = np.array([taken, LENGTH + 1 - taken], np.int32)
        copy = jax.tree.map(jnp.copy, state).rewind(back)
        part, count = text.part(LENGTH - back, 9)
        found, _ = extend(copy, part, count, text.bias)
        for row, begin in enumerate(LENGTH - back):
            ours = np.asarray(found)[row, : count[row]]
            assert_near(ours, expected[row, begin : begin + count[row]])


def test_the_last_logits_are_those_of_the_last_token() -> None:
    decoder = make(*FORMS["default"])
    text = Text(decoder, SITES)
    part, _ = text.part(np.zeros(2, np.int32), 9)
    count = np.array([9, 4], np.int32)
    found, _ = make_extend(decoder, "last")(decoder.empty_state(2, CAPACITY), part, count, {})
    whole = text.whole(decoder)
    assert_near(np.asarray(found), np.stack([whole[0, 8], whole[1, 3]]))


def test_a_full_state_keeps_its_tokens() -> None:
    """Slots beyond the capacity are dropped."""
    decoder = make(*FORMS["default"])
    text = Text(decoder, SITES)
    extend, state = make_extend(decoder), decoder.empty_state(2, 16)
    for begin in (0, 9):
        part, count = text.part(np.full(2, begin, np.int32), 9)
        found, state = extend(state, part, count, {})
    np.testing.assert_array_equal(state.tokens, text.tokens[:, :16])
    assert_near(np.asarray(found)[:, :7], text.whole(decoder)[:, 9:16])


@pytest.mark.parametrize("name", ["default", slow("backbone")])
def test_bfloat16_is_as_near_to_float32_as_the_training_pass(name: str) -> None:
    config, sites = FORMS[name]
    decoder = make(config, sites)
    text = Text(decoder, sites)
    exact = text.whole(decoder)
    _, params = nnx.split(decoder)
    graph, _ = nnx.split(make(replace(config, dtype="bfloat16"), sites))
    rounded = nnx.merge(graph, params)
    trained = text.whole(rounded) - exact
    decoded = run_in_chunks(rounded, text, 9) - exact
    assert np.sqrt(np.mean(decoded**2)) < 1.5 * np.sqrt(np.mean(trained**2))
