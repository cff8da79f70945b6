"""Generation: the texts of plain passes, in batches, on one device and on eight."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import numpy as np
import pytest
from plainly import continue_greedily, log_probabilities_of
from tiny_runs import assert_identical, plain_pass, tiny_config, use_rows, vary

from engram_jax.checkpoint import Checkpoints
from engram_jax.costs.accounting import decode_state_bytes
from engram_jax.costs.ahead_of_time import topology_mesh
from engram_jax.decoding import batches, generate
from engram_jax.decoding import weights as decode_weights
from engram_jax.decoding.generate import Generator
from engram_jax.decoding.hot_rows import hot_rows
from engram_jax.decoding.programs import BURST, ProgramCache
from engram_jax.decoding.settings import GenerationSettings
from engram_jax.decoding.weights import prepare
from engram_jax.errors import InputError
from engram_jax.memory import store_table
from engram_jax.memory.places import stored_places
from engram_jax.memory.store_table import (
    CallbackTable,
    HotTable,
    InPlaceTable,
    PinnedTable,
    pin_table,
)
from engram_jax.placement import fill_from_tables, open_stores
from engram_jax.program import Program
from engram_jax.run import Run
from engram_jax.sharding import REPLICATED, MeshConfig, make_mesh

PROMPTS = ["Alexander the Great", "", "born in Wales and on café", "東京", "the"]
GREEDY = GenerationSettings(tokens=6, temperature=0.0)


@pytest.fixture(
    scope="module",
    params=["engram", pytest.param("over_encoding", marks=pytest.mark.slow), "dense"],
)
def model(request, untrained):
    run = Run.open(untrained(request.param).folder)  # on one device
    weights = run.restore_weights()
    return run, weights, Generator(run.program, run.tokenizer, weights)


@pytest.fixture(scope="module")
def engram(untrained):
    run = Run.open(untrained("engram").folder)
    weights = run.restore_weights()
    return run, weights, Generator(run.program, run.tokenizer, weights)


def test_greedy_texts_are_those_of_plain_passes(model) -> None:
    run, weights, generator = model
    decode = plain_pass(run, weights)
    for prompt, found in zip(PROMPTS, generator.generate(PROMPTS, GREEDY), strict=True):
        assert found.tokens == continue_greedily(run, decode, prompt, 6)
        assert found.reason == ("length" if len(found.tokens) == 6 else "end")
        expected = log_probabilities_of(run, decode, prompt, found.tokens)
        np.testing.assert_allclose(found.log_probabilities, expected, atol=1e-4)
        whole = run.tokenizer.decode([*run.tokenizer.encode(prompt).tolist(), *found.tokens])
        assert whole == prompt + found.text


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_the_loop_reads_a_single_short_prompt(engram, more: int) -> None:
    """Of up to a burst and its first token; a longer one is read before."""
    run, weights, generator = engram
    ids = run.tokenizer.encode("the " * 40)[: BURST + more]
    prompt = run.tokenizer.decode(ids.tolist())
    assert len(run.tokenizer.encode(prompt)) == BURST + more
    found = generator.generate([prompt], GREEDY)[0]
    decode = plain_pass(run, weights)
    assert found.tokens == continue_greedily(run, decode, prompt, 6) and found.tokens
    expected = log_probabilities_of(run, decode, prompt, found.tokens)
    np.testing.assert_allclose(found.log_probabilities, expected, atol=1e-4)
    assert generator.speed.prompt_tokens == BURST + more and generator.speed.prompt_seconds > 0


def test_a_sequence_that_has_ended_asks_for_no_rows(engram, tmp_path, monkeypatch) -> None:
    """Nor does an empty place of a batch, here the fourth: with copies of all rows that the texts
    need, the host is not called.
    """
    run, _, on_device = engram
    settings, ngram_hash = GenerationSettings(tokens=6, seed=3), run.program.ngram_hash
    expected = on_device.generate([""] * 3, settings)
    rows = [
        ngram_hash.hash_tokens(1, np.array([[run.tokenizer.bos_id, *one.tokens]], np.int32))
        for one in expected
    ]
    hot = np.unique(stored_places(np.concatenate(rows, axis=None), ngram_hash.padded_rows[0]))
    asked, fetch = [], CallbackTable.fetch

    def note(table: CallbackTable, places: np.ndarray) -> np.ndarray:
        asked.append(places)
        return fetch(table, places)

    monkeypatch.setattr(CallbackTable, "fetch", note)
    monkeypatch.setattr(store_table, "ALIGNMENT", 1 << 62)  # programs call the host
    with open_stores(run.program, tmp_path, "host") as stores:
        parts = run.program, run.tokenizer, run.restore_weights(None, stores), stores
        assert Generator(*parts, hot_rows={1: hot}).generate([""] * 3, settings) == expected
        assert not asked
        hot[0] = np.setdiff1d(np.arange(len(hot) + 1), hot)[0]  # another row instead
        Generator(*parts, hot_rows={1: hot}).generate([""] * 3, settings)
        assert asked


@pytest.mark.usefixtures("optimized")
def test_a_text_does_not_depend_on_the_others(untrained) -> None:
    """Bit for bit, in a batch of one shape, without experts; one needs a second block of slots."""
    run = Run.open(untrained("engram").folder)
    program, weights = run.program, run.restore_weights()
    prompts, settings = [*PROMPTS[:3], "the " * 300], GenerationSettings(tokens=6, top_p=0.9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "ProgramCache", ProgramCache)  # compiled here
        generator = Generator(program, run.tokenizer, weights)
    far = generator.generate(prompts, settings)
    # The same capacity, of which only the first block is used.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "LEAST_CAPACITY", 512)
        near = generator.generate([*PROMPTS[:3], "and"], settings)
    assert len(generator.programs._compiled) == 3  # of one batch size and capacity
    assert [one.log_probabilities for one in near[:3]] == [one.log_probabilities for one in far[:3]]
    assert near[:3] == far[:3] and near[3] != far[3]


@pytest.mark.parametrize(
    ("form", "placement", "read"),
    [
        ("engram", "host", InPlaceTable),
        ("engram", "host", HotTable),
        pytest.param("two_layers", "host", CallbackTable, marks=pytest.mark.slow),  # verified
        pytest.param("engram", "host", PinnedTable, marks=pytest.mark.slow),
        pytest.param("bfloat16", "file", InPlaceTable, marks=pytest.mark.slow),
        pytest.param("bfloat16", "file", CallbackTable, marks=pytest.mark.slow),
        pytest.param("two_layers", "file", InPlaceTable, marks=pytest.mark.slow),
        pytest.param("over_encoding", "host", InPlaceTable, marks=pytest.mark.slow),
    ],
)
def test_texts_do_not_depend_on_where_the_tables_are(
    untrained, tmp_path, monkeypatch, form, placement, read
) -> None:
    """Bit for bit: read in place or pinned, or by the host before and by callbacks in the loop.

    With hot rows, callbacks are for tokens that need other rows.
    """
    if read is PinnedTable:
        monkeypatch.setattr(decode_weights, "open_table", pin_table)
    if read in (CallbackTable, HotTable):
        monkeypatch.setattr(store_table, "ALIGNMENT", 1 << 62)  # no address is a multiple
    run = Run.open(untrained(form).folder)
    weights, settings = run.restore_weights(), GenerationSettings(tokens=20, top_p=0.9)
    prompts = [*PROMPTS, "the " * 300]
    expected = Generator(run.program, run.tokenizer, weights).generate(prompts, settings)
    if placement == "file":  # a checkpoint with files of rows, which are read in place
        run = save_rows_of(run, tmp_path)
    with open_stores(run.program, tmp_path, placement) as stores:
        dense = run.restore_weights(None, stores)
        assert not dense.tables and all(store.used for store in stores.values())
        verify = placement == "host" and read is not HotTable
        hot = None
        if read is HotTable:
            hot = hot_rows([corpus.train for corpus in run.corpora()], run.program.ngram_hash, 300)
        generator = Generator(
            *(run.program, run.tokenizer, dense, stores), verify_rows=verify, hot_rows=hot
        )
        tables = generator.weights.outside.values()
        assert {type(one.table if verify else one) for one in tables} == {read}
        assert generator.generate(prompts, settings) == expected
        without = Generator(run.program, run.tokenizer, dense, stores, memory=False)
        assert without.generate(prompts[:1], settings) != expected[:1]
        files = list(tmp_path.glob("rows/*/tables/*"))
        assert bool(files) == (placement == "file")
        for path in files[:1]:  # mapped and not read again
            os.truncate(path, 64)
            with pytest.raises(InputError, match="was truncated while its rows were in use"):
                generator.generate(prompts, settings)
            without.generate(prompts[:1], settings)


@pytest.mark.slow
def test_programs_of_a_tpu_read_pinned_memory_of_the_host(tmp_path, libtpu) -> None:
    """Compiled for four chips: the host sends rows within the loop, and no chip has a table.

    A TPU stores lines of 128 words one after another, but tiles of wider arrays.
    """
    config = vary(tiny_config(tmp_path), memory={"row_width": 85, "rows_per_head": (20_000,) * 2})
    mesh = topology_mesh("v5p:2x2x1", MeshConfig())
    program = Program.of_sizes(config, mesh)
    assert program.ngram_hash is not None
    (rows,) = program.ngram_hash.padded_rows

    def on_chips(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        place = jax.NamedSharding(mesh, REPLICATED, memory_kind=leaf.sharding.memory_kind)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    here = Program.of_sizes(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    state = here.initial_state()
    with open_stores(here, tmp_path, "host") as stores, pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_weights, "open_table", pin_table)
        fill_from_tables(stores, {layer: use_rows(t, 2) for layer, t in state.tables.items()})
        weights = prepare(here, replace(state.weights, tables={}), stores)
    with jax.set_mesh(mesh):
        of_shape, cache = (jax.tree.map(on_chips, weights), 4, 128), ProgramCache(program)
        programs = cache.prefill(*of_shape), cache.burst(*of_shape)
    table = rows * 4 * config.memory.layout.words
    for compiled in programs:
        memory = compiled.memory_analysis()
        assert memory.host_argument_size_in_bytes >= table
        assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < table / 3
        lines, text = rows * config.memory.layout.words // 128, compiled.as_text()
        assert "HostExecute" in text
        assert f"u32[{lines},128]" in text and f"u32[{rows},256]" not in text


def save_rows_of(run: Run, folder: Path) -> Run:
    """The run with a checkpoint in another folder, as of a run with tables in host memory."""
    identity = run.checkpoints._identity
    other = replace(run, checkpoints=Checkpoints(folder / "rows", keep=1, identity=identity))
    state = run.restore()
    with open_stores(run.program, folder, "host") as stores:
        fill_from_tables(stores, state.tables)
        other.save(state, stores)
    return other


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """The names of what is compiled meanwhile."""
    names: list[str] = []

    def listen(event: str, *_: object, **__: object) -> None:
        if "compile" in event:
            names.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_no_prompt_and_no_setting_compiles_anything(engram) -> None:
    generator = engram[2]
    generator.generate(PROMPTS, GREEDY)
    with counted_compilations() as compiled:
        for settings in (
            replace(GREEDY, tokens=3),
            GenerationSettings(tokens=40, temperature=0.5, seed=8),
            GenerationSettings(tokens=5, top_k=7, top_p=0.5, min_p=0.1, stop=("and",)),
        ):
            generator.generate(["Alexander was born on the"] * 6, settings)
        generator.generate(["in Wales and " * 40] * 8, GREEDY)
    assert not compiled
    for prompt in ("", "Alexander the Great was born in Wales and " * 3):  # both programs
        generator.generate([prompt], GREEDY)
    with counted_compilations() as compiled:
        for prompt in ("Alexander", "Alexander the Great was born on " * 3):
            generator.generate([prompt], GREEDY)
    assert not compiled
    with counted_compilations() as compiled:
        jax.jit(lambda x: x + 1)(1.5)
    assert compiled


def test_seeds_and_stop_strings(engram) -> None:
    generator, hot = engram[2], GenerationSettings(tokens=30, seed=3)
    first = generator.generate(["Alexander"], hot)[0]
    assert generator.generate(["Alexander"], hot)[0] == first
    assert generator.generate(["Alexander"], replace(hot, seed=4))[0] != first
    # Prompt n has seed + n. (The logits of a batch of two differ by rounding.)
    second = generator.generate(["the", "Alexander"], replace(hot, seed=2))[1]
    assert second.tokens == first.tokens
    middle = first.text[len(first.text) // 2 :][:3]
    stopped = generator.generate(["Alexander"], replace(hot, stop=(middle,)))[0]
    assert stopped.reason == "stop" and stopped.text == first.text[: first.text.index(middle)]
    assert stopped.tokens == first.tokens[: len(stopped.tokens)]


def test_one_stop_string_can_be_given_alone(engram) -> None:
    """And is not a sequence of characters."""
    assert GenerationSettings(stop="END").stop_strings == ("END",)
    hot = GenerationSettings(tokens=30, seed=3)
    text = engram[2].generate(["Alexander"], hot)[0].text
    stopped = engram[2].generate(["Alexander"], replace(hot, stop=text[3:6]))[0]
    assert stopped.reason == "stop" and stopped.text == text[: text.index(text[3:6])]


def test_shown_parts_make_the_text(engram) -> None:
    shown: dict[int, str] = {}

    def show(number: int, text: str) -> None:
        shown[number] = shown.get(number, "") + text

    found = engram[2].generate(PROMPTS, GenerationSettings(tokens=40), show=show)
    assert [shown[number] for number in range(len(PROMPTS))] == [one.text for one in found]


def test_the_capacity_ends_a_text(engram) -> None:
    generator = engram[2]
    prompt = [engram[0].tokenizer.bos_id, *engram[0].tokenizer.encode("Alexander the Great")]
    settings = GenerationSettings(tokens=100, temperature=0.0, capacity=len(prompt) + 4)
    found = generator.generate(["Alexander the Great"], settings)[0]
    assert len(found.tokens) == 4 and found.reason == "length"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"min_p": 0.1}, {"top_p": 0.5}])
def test_logits_that_are_not_finite_are_refused(engram, bad: float, wrong) -> None:
    run, weights, _ = engram
    params = weights.params | {
        "norm": jax.tree.map(lambda leaf: bad * leaf, weights.params["norm"])
    }
    generator = Generator(run.program, run.tokenizer, replace(weights, params=params))
    with pytest.raises(InputError, match="The logits of prompt 1 are not finite"):
        generator.generate(["the"], GenerationSettings(tokens=3, **wrong))


def test_batches_have_similar_lengths_and_bounded_states(engram, monkeypatch) -> None:
    """Results are in the order of the prompts; only the longest prompt has a large capacity."""
    run, _, generator = engram
    prompts = ["the " * 400, "the", "the " * 100, "in Wales", "Alexander"]
    settings = GenerationSettings(tokens=3)

    def split(**bounds: int) -> list[tuple[list[int], int]]:
        for name, bound in bounds.items():
            monkeypatch.setattr(batches, name, bound)
        made = batches.make_batches(run.config, run.tokenizer, prompts, settings, devices=2)
        return [(batch.numbers, batch.capacity) for batch in made]

    assert split() == [([0, 1, 2, 3, 4], 512)]
    assert split(MOST_SEQUENCES=1) == [([0, 2], 512), ([3, 4], 256), ([1], 256)]
    of_one = decode_state_bytes(run.config, sequences=1, slots=512)
    assert split(MOST_SEQUENCES=64, STATE_BYTES=of_one + 4) == [([0, 2], 512), ([1, 3, 4], 256)]
    with pytest.raises(InputError, match=r"The state of 4.. tokens has .* GB"):
        split(STATE_BYTES=of_one - 1)
    prompts, settings = ["the", "in Wales and on café", "Alexander"], GREEDY
    expected = generator.generate(prompts, settings)
    monkeypatch.setattr(batches, "MOST_SEQUENCES", 1)
    assert [one.tokens for one in generator.generate(prompts, settings)] == [
        one.tokens for one in expected
    ]


def test_the_last_token_is_not_appended(engram, monkeypatch) -> None:
    """Nothing needs its logits, so a continuation takes one step per token."""
    generator, states = engram[2], []
    compile_burst = generator.programs.burst

    def record(*arguments: Any) -> Callable[..., Any]:
        compiled = compile_burst(*arguments)

        def burst(*arguments: Any) -> Any:
            results = compiled(*arguments)
            states.append(results[0])
            return results

        return burst

    monkeypatch.setattr(generator.programs, "burst", record)
    found = generator.generate(["the"], replace(GREEDY, tokens=3))[0]
    prompt = generator.tokenizer.encode("the")
    assert found.reason == "length"
    assert int(states[0].length[0]) == 1 + len(prompt) + 2


def test_it_stops_at_the_end_of_the_document(engram) -> None:
    """With an output head that always predicts eos."""
    run, weights, _ = engram
    params = jax.tree.map(lambda leaf: leaf, weights.params)
    embedding = 0 * params["embedding"] + 1
    params["embedding"] = embedding.at[run.tokenizer.eos_id].set(2)
    reasons = []
    for sign in (1, -1):  # the final norm of equal entries is ±1
        signed = params | {"norm": jax.tree.map(lambda leaf, s=sign: s * leaf, params["norm"])}
        generator = Generator(run.program, run.tokenizer, replace(weights, params=signed))
        found = generator.generate([""], replace(GREEDY, tokens=9))[0]
        reasons.append((found.reason, found.text))
    assert ("end", "") in reasons


def test_without_memory_it_is_the_model_without_tables(engram) -> None:
    run, weights, generator = engram
    without = Generator(run.program, run.tokenizer, weights, memory=False)
    found = without.generate(PROMPTS, GREEDY)
    decode = plain_pass(run, replace(weights, tables={}))
    expected = [continue_greedily(run, decode, prompt, 6) for prompt in PROMPTS]
    assert [one.tokens for one in found] == expected
    assert found != generator.generate(PROMPTS, GREEDY)


def test_generating_writes_nothing(engram) -> None:
    _, weights, generator = engram
    before = jax.device_get(weights)
    generator.generate(PROMPTS, GenerationSettings(tokens=3))
    assert_identical(before, jax.device_get(weights))


def test_bytes_of_the_state_are_those_of_the_accounting(model) -> None:
    run, _, generator = model
    with run.program.use_mesh():
        state = generator.programs.empty(generator.weights, 8, 256)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert size == decode_state_bytes(run.config, sequences=8, slots=256)


def test_eight_devices_generate_the_texts_of_one(engram, untrained) -> None:
    """With the tables split over the devices, and sequences that end at different steps."""
    run, settings = untrained("engram"), replace(GREEDY, tokens=10)
    assert run.program.mesh.size == 8
    generator = Generator(run.program, run.tokenizer, run.restore_weights())
    expected = engram[2].generate(PROMPTS, settings)
    for ours, theirs in zip(generator.generate(PROMPTS, settings), expected, strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.log_probabilities, theirs.log_probabilities, atol=1e-4)


def test_text_beyond_the_trained_length_is_announced_once(engram, capsys, monkeypatch) -> None:
    monkeypatch.setattr(engram[2], "_has_warned", False)
    engram[2].generate(["the"], replace(GREEDY, tokens=10))
    assert not capsys.readouterr().err
    engram[2].generate(["the"], replace(GREEDY, tokens=23))
    assert "trained on rows of 24" in capsys.readouterr().err
    engram[2].generate(["the"], replace(GREEDY, tokens=23))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"tokens": 0}, "--tokens is 0"),
        ({"temperature": -1.0}, "--temperature is -1"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"top_k": 0}, "--top-k is 0"),
        ({"top_k": 8193}, "--top-k is 8193"),
        ({"top_p": 0.0}, "--top-p is 0"),
        ({"top_p": 1.5}, "--top-p is 1.5"),
        ({"top_p": float("nan")}, "--top-p is nan"),
        ({"min_p": 2.0}, "--min-p is 2"),
        ({"stop": ("a", "")}, "--stop"),
        ({"seed": -1}, "--seed is -1"),
        ({"capacity": 2}, "Prompt 1 has .* --capacity is 2"),
        ({"tokens": 10**9}, r"1,000,000,00. tokens of prompt and continuation are more than"),
        ({"temperature": float("inf")}, "--temperature is inf; it must be finite"),
    ],
)
def test_settings_out_of_range_are_refused(engram, wrong, named) -> None:
    with pytest.raises(InputError, match=named):
        engram[2].generate(["Alexander"], GenerationSettings(**wrong))


def test_a_prompt_with_half_a_surrogate_pair_is_refused(engram) -> None:
    with pytest.raises(InputError, match=r"Prompt 2 is not valid: .* surrogate"):
        engram[2].generate(["the", "\ud800"], GREEDY)
