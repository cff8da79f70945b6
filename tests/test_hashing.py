"""Row numbers: golden vectors, the formula in Python's integers, documents, and the hash file."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import golden_hash, load_golden, qwen_hash, released_hash
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_jax.compression import VocabularyProjection
from engram_jax.errors import InputError
from engram_jax.hashing import DEAD, HashSpec, HashVariant, NgramHash

SMALL = HashSpec(layers=(1, 3), max_order=4, heads=2, rows_per_head=(11, 13, 17), pad_id=2)


def projection_of(lookup: Any) -> VocabularyProjection:
    return VocabularyProjection(np.asarray(lookup, np.int32))


def rows_in_python(
    ngram_hash: NgramHash, layer: int, tokens: list[int], segments: list[int]
) -> list[list[int]]:
    """Equations 1 and 2 for one row of tokens, one position at a time, in unbounded integers."""
    spec = ngram_hash.spec
    index = spec.layers.index(layer)
    multipliers = [int(m) for m in ngram_hash.multipliers[index]]
    lookup = [int(i) for i in ngram_hash.projection.lookup]
    pad = lookup[spec.pad_id]
    rows = []
    for here in range(len(tokens)):
        window, visible = [], True
        for back in range(spec.max_order):
            there = here - back
            visible = visible and there >= 0 and segments[there] == segments[here]
            visible = visible and tokens[there] != DEAD
            if spec.variant == "qwen" and back > 0 and visible:
                visible = tokens[there] != spec.pad_id
            window.append(lookup[tokens[there]] if visible else pad)
        row, offset = [], 0
        for order in range(2, spec.max_order + 1):
            mix = 0
            for token, multiplier in zip(window[:order], multipliers, strict=False):
                mix ^= token * multiplier
            for prime in ngram_hash.primes[index, order - 2]:
                row.append(mix % int(prime) + offset)
                offset += int(prime)
        rows.append(row)
    return rows


@pytest.mark.parametrize("name", ["a_small", "b_small", "c_demo_scale", "d_paper_scale"])
def test_rows_are_those_of_the_demo(name: str) -> None:
    golden, sizes = load_golden(name)
    ngram_hash = golden_hash(golden, sizes)
    assert ngram_hash.projection.size == sizes["compressed_vocab"]
    for index, layer in enumerate(sizes["layers"]):
        np.testing.assert_array_equal(ngram_hash.multipliers[index], golden[f"multipliers_{layer}"])
        np.testing.assert_array_equal(ngram_hash.primes[index], golden[f"table_sizes_{layer}"])
        rows = ngram_hash.hash_tokens(layer, golden["ids"])
        np.testing.assert_array_equal(
            rows - ngram_hash.offsets[index].reshape(-1), golden[f"hash_{layer}"]
        )


def test_documents_and_dead_positions() -> None:
    golden, sizes = load_golden("e_documents")
    ngram_hash = golden_hash(golden, sizes)
    ids, segments = golden["compressed_ids"], golden["segment_ids"]
    for index, layer in enumerate(sizes["layers"]):
        np.testing.assert_array_equal(ngram_hash.multipliers[index], golden[f"multipliers_{layer}"])
        offsets = ngram_hash.offsets[index].reshape(-1)
        rows = ngram_hash.hash_tokens(layer, ids, segments)
        np.testing.assert_array_equal(rows - offsets, golden[f"hash_{layer}"])
        rows = ngram_hash.hash_tokens(layer, np.where(golden["dead"], DEAD, ids), segments)
        np.testing.assert_array_equal(rows - offsets, golden[f"hash_dead_{layer}"])


def test_released_miniature() -> None:
    golden, sizes = load_golden("f_v41_mini")
    ngram_hash = released_hash(golden, sizes)
    assert ngram_hash.projection.size == sizes["engram_compressed_vocab_size"]
    assert ngram_hash.rows == sizes["engram_num_embeddings"]
    masked = np.where(golden["token_mask"], golden["ids"], DEAD)
    for layer in sizes["engram_layer_ids"]:
        rows = ngram_hash.hash_tokens(layer, golden["ids"])
        np.testing.assert_array_equal(rows, golden[f"rows_{layer}"])
        rows = ngram_hash.hash_tokens(layer, masked)
        np.testing.assert_array_equal(rows, golden[f"rows_masked_{layer}"])


def test_released_layout() -> None:
    golden, _ = load_golden("f_v41_mini")
    spec = HashSpec(layers=(1, 14), max_order=4, heads=8, rows_per_head=(16_000_000,) * 3, pad_id=2)
    ngram_hash = NgramHash.build(spec, VocabularyProjection.identity(99_092))
    assert ngram_hash.rows == [384_006_168, 384_016_682] == golden["released_rows"].tolist()
    np.testing.assert_array_equal(ngram_hash.multipliers, golden["released_multipliers"])
    for layer, rows in zip(spec.layers, golden["released_row_ids"], strict=True):
        hashed = ngram_hash.hash_tokens(layer, golden["released_compressed_ids"])
        np.testing.assert_array_equal(hashed, rows)


def test_qwen_miniature() -> None:
    golden, sizes = load_golden("g_qwen_mini")
    ngram_hash = qwen_hash(golden, sizes)
    for index, layer in enumerate(ngram_hash.spec.layers):
        multipliers = golden[f"layer_multipliers_{index}"]
        np.testing.assert_array_equal(ngram_hash.multipliers[index], multipliers)
        primes = golden[f"ngram_heads_vocab_sizes_{index}"]
        np.testing.assert_array_equal(ngram_hash.primes[index].reshape(-1), primes)
        rows = ngram_hash.hash_tokens(layer, golden["ids"])
        np.testing.assert_array_equal(rows, golden[f"rows_{index}"])


def test_qwen_released_layout() -> None:
    """The constants that the released checkpoint stores."""
    base = (20_000_000,) * 2
    spec = HashSpec(layers=(1,), rows_per_head=base, pad_id=9, seed=1234, variant="qwen")
    ngram_hash = NgramHash.build(spec, VocabularyProjection.identity(248_320))
    assert ngram_hash.rows == [320_001_446]
    multipliers = [[23703573157769, 20109073645365, 8052911324071]]
    assert ngram_hash.multipliers.tolist() == multipliers


def test_the_variant_is_a_part_of_the_identity(tmp_path: Path) -> None:
    """Fingerprints and files of the paper's hash are those of version 0.1.0."""
    projection = VocabularyProjection.identity(9)
    ours = NgramHash.build(SMALL, projection)
    assert ours.fingerprint == "5c773b4fd3ea0dd3"
    ours.save(tmp_path / "hash.json")
    assert "variant" not in (tmp_path / "hash.json").read_text()
    qwen = NgramHash.build(replace(SMALL, variant="qwen"), projection)
    # Also with equal multipliers, since it looks back differently.
    equal = replace(ours, spec=replace(SMALL, variant="qwen"))
    assert len({ours.fingerprint, qwen.fingerprint, equal.fingerprint}) == 3
    qwen.save(tmp_path / "hash.json")
    loaded = NgramHash.load(tmp_path / "hash.json")
    assert loaded.spec == qwen.spec and loaded.fingerprint == qwen.fingerprint


@st.composite
def packed_batches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T] of a vocabulary of 9, with dead positions, and the segments of documents."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 12)))
    size = shape[0] * shape[1]
    tokens = draw(st.lists(st.integers(-1, 8), min_size=size, max_size=size))
    starts = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    segments = np.cumsum(np.reshape(starts, shape), axis=1, dtype=np.int32)
    return np.array(tokens, np.int32).reshape(shape), segments


@settings(max_examples=150)
@given(
    packed_batches(),
    st.sampled_from([2, 3, 4]),
    st.integers(0, 2**31),
    st.sampled_from(["engram", "qwen"]),
)
def test_rows_follow_the_formula(
    batch: tuple[np.ndarray, np.ndarray], max_order: int, seed: int, variant: HashVariant
) -> None:
    tokens, segments = batch
    rows_per_head = SMALL.rows_per_head[: max_order - 1]
    spec = replace(
        SMALL, max_order=max_order, rows_per_head=rows_per_head, seed=seed, variant=variant
    )
    ngram_hash = NgramHash.build(spec, projection_of([0, 1, 2, 1, 3, 0, 4, 5, 2]))
    for layer in spec.layers:
        rows = ngram_hash.hash_tokens(layer, tokens, segments)
        for row, row_tokens, row_segments in zip(rows, tokens, segments, strict=True):
            expected = rows_in_python(ngram_hash, layer, row_tokens.tolist(), row_segments.tolist())
            assert row.tolist() == expected


def test_rows_follow_the_formula_across_blocks() -> None:
    """16,384 positions are hashed at a time; products come close to 2⁶³ here."""
    ngram_hash = NgramHash.build(
        HashSpec(layers=(2,), rows_per_head=(640_000, 2_262_400), heads=2, seed=5),
        VocabularyProjection.identity(129_280),
    )
    tokens = np.random.default_rng(0).integers(0, 129_280, 16_384 + 50, dtype=np.int32)
    tokens[-3:] = 129_279
    rows = ngram_hash.hash_tokens(2, tokens)
    expected = rows_in_python(ngram_hash, 2, tokens.tolist(), [0] * len(tokens))
    assert rows.tolist() == expected


@settings(max_examples=25)
@given(packed_batches(), st.data())
def test_a_part_of_the_tokens_needs_those_just_before_it(
    batch: tuple[np.ndarray, np.ndarray], data: st.DataObject
) -> None:
    """A process that builds a part of T also hashes the N − 1 tokens before it."""
    tokens, segments = batch
    ngram_hash = NgramHash.build(SMALL, VocabularyProjection.identity(9))
    start = data.draw(st.integers(0, tokens.shape[1] - 1))
    before = min(start, SMALL.max_order - 1)
    part = slice(start - before, None)
    rows = ngram_hash.hash_tokens(1, tokens[:, part], segments[:, part])[:, before:]
    whole = ngram_hash.hash_tokens(1, tokens, segments)
    np.testing.assert_array_equal(rows, whole[:, start:])


@settings(max_examples=50)
@given(packed_batches(), st.data())
def test_a_row_depends_on_no_future_token_and_no_other_document(
    batch: tuple[np.ndarray, np.ndarray], data: st.DataObject
) -> None:
    tokens, segments = batch
    ngram_hash = NgramHash.build(SMALL, VocabularyProjection.identity(9))
    place = data.draw(st.integers(0, tokens.shape[1] - 1))
    row = data.draw(st.integers(0, len(tokens) - 1))
    changed = tokens.copy()
    changed[row, place] = data.draw(st.integers(-1, 8))
    differs = ngram_hash.hash_tokens(1, tokens, segments) != ngram_hash.hash_tokens(
        1, changed, segments
    )
    allowed = np.zeros(tokens.shape, bool)
    allowed[row, place : place + SMALL.max_order] = True
    allowed[row] &= segments[row] == segments[row, place]
    assert not differs[~allowed].any()


def test_heads_are_distinct_primes_from_the_configured_size_up() -> None:
    ngram_hash = NgramHash.build(
        HashSpec(layers=(0, 5), heads=4, rows_per_head=(100, 101)),
        VocabularyProjection.identity(50),
    )
    # Every order starts at its own size, and skips primes that earlier heads use.
    assert ngram_hash.primes.tolist() == [
        [[101, 103, 107, 109], [113, 127, 131, 137]],
        [[139, 149, 151, 157], [163, 167, 173, 179]],
    ]
    assert ngram_hash.padded_rows == [4096, 4096]
    assert ngram_hash.offsets[0].reshape(-1).tolist() == [0, 101, 204, 311, 420, 533, 660, 791]


def test_heads_of_one_row_are_shared_by_all_ngrams() -> None:
    spec = HashSpec(heads=3, rows_per_head=(1, 7))
    ngram_hash = NgramHash.build(spec, VocabularyProjection.identity(50))
    rows = ngram_hash.hash_tokens(1, np.random.default_rng(0).integers(50, size=(4, 20)))
    assert ngram_hash.primes.tolist() == [[[1, 1, 1], [7, 11, 13]]]
    assert (rows[..., :3] == [0, 1, 2]).all()
    assert np.unique(rows[..., 3:]).size == 7 + 11 + 13


def test_a_prime_size_is_taken_itself() -> None:
    ngram_hash = NgramHash.build(
        HashSpec(heads=1, max_order=2, rows_per_head=(7,)), VocabularyProjection.identity(5)
    )
    assert ngram_hash.primes.tolist() == [[[7]]]


def test_file_round_trip(tmp_path: Path) -> None:
    ngram_hash = NgramHash.build(SMALL, projection_of([0, 1, 2, 1, 3, 0, 4, 5, 2]))
    ngram_hash.save(tmp_path / "hash.json")
    loaded = NgramHash.load(tmp_path / "hash.json")
    assert loaded.fingerprint == ngram_hash.fingerprint
    assert loaded.spec == ngram_hash.spec
    tokens = np.array([[3, 1, -1, 4, 8, 5]])
    for layer in SMALL.layers:
        np.testing.assert_array_equal(
            loaded.hash_tokens(layer, tokens), ngram_hash.hash_tokens(layer, tokens)
        )


def test_a_loaded_hash_uses_the_stored_multipliers(tmp_path: Path) -> None:
    """As if saved with a NumPy version that has another random stream."""
    built = NgramHash.build(SMALL, VocabularyProjection.identity(9))
    foreign = replace(built, multipliers=built.multipliers + 2)
    foreign.save(tmp_path / "hash.json")
    loaded = NgramHash.load(tmp_path / "hash.json")
    tokens = np.arange(9)
    np.testing.assert_array_equal(loaded.multipliers, built.multipliers + 2)
    np.testing.assert_array_equal(loaded.hash_tokens(1, tokens), foreign.hash_tokens(1, tokens))
    assert (loaded.hash_tokens(1, tokens) != built.hash_tokens(1, tokens)).any()
    assert loaded.fingerprint == foreign.fingerprint != built.fingerprint


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("multipliers", [[1, 3, 5, 7], [1, 3, 5, 7]]),
        ("primes", [[[11, 13], [17, 19], [23, 29]], [[31, 37], [41, 43], [47, 51]]]),
        ("conventions", ["layer ids are one-based"]),
        ("fingerprint", "0123456789abcdef"),
        ("projection", None),
        ("spec", {"layers": [1], "heads": 2}),
    ],
)
def test_a_tampered_file_is_refused(tmp_path: Path, part: str, value: object) -> None:
    path = tmp_path / "hash.json"
    NgramHash.build(SMALL, VocabularyProjection.identity(9)).save(path)
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {part: value}))
    with pytest.raises(InputError, match=r"hash\.json"):
        NgramHash.load(path)


@pytest.mark.parametrize(
    "part", ["spec", "conventions", "multipliers", "primes", "projection", "fingerprint"]
)
def test_a_file_without_a_part_is_refused(tmp_path: Path, part: str) -> None:
    path = tmp_path / "hash.json"
    NgramHash.build(SMALL, VocabularyProjection.identity(9)).save(path)
    document = json.loads(path.read_text())
    del document[part]
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"hash\.json"):
        NgramHash.load(path)


def test_a_changed_projection_in_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hash.json"
    NgramHash.build(SMALL, VocabularyProjection.identity(9)).save(path)
    document = json.loads(path.read_text())
    # Valid by itself, so only the fingerprint of the hash detects it.
    document["projection"] = projection_of([0, 1, 2, 1, 3, 0, 4, 5, 8]).to_json()
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="damaged"):
        NgramHash.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00"])
def test_a_file_that_is_no_hash_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "hash.json").write_bytes(content)
    with pytest.raises(InputError, match=r"hash\.json"):
        NgramHash.load(tmp_path / "hash.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"hash\.json.*run folder"):
        NgramHash.load(tmp_path / "hash.json")


def test_the_fingerprint_changes_with_every_fact() -> None:
    projection = VocabularyProjection.identity(9)
    specs = [
        SMALL,
        replace(SMALL, layers=(1, 2)),
        replace(SMALL, layers=(3, 1)),
        replace(SMALL, max_order=3, rows_per_head=(11, 13)),
        replace(SMALL, heads=3),
        replace(SMALL, rows_per_head=(11, 13, 18)),
        replace(SMALL, pad_id=3),
        replace(SMALL, seed=1),
    ]
    hashes = [NgramHash.build(spec, projection) for spec in specs]
    hashes.append(NgramHash.build(SMALL, projection_of([0, 1, 2, 1, 4, 5, 6, 7, 8])))
    assert len({ngram_hash.fingerprint for ngram_hash in hashes}) == len(hashes)


@pytest.mark.parametrize("token", [9, 2**31 - 1, -2])
def test_an_id_outside_the_vocabulary_is_refused(token: int) -> None:
    ngram_hash = NgramHash.build(SMALL, VocabularyProjection.identity(9))
    with pytest.raises(InputError, match=f"{token}.*9"):
        ngram_hash.hash_tokens(1, np.array([[1, token, 2]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_order": 1, "rows_per_head": ()}, "max_order"),
        ({"rows_per_head": (11, 13)}, "rows_per_head"),
        ({"heads": 0}, "head"),
        ({"rows_per_head": (11, 0, 17)}, "one row"),
        ({"layers": ()}, "Layer ids"),
        ({"layers": (1, 1)}, "Layer ids"),
        ({"layers": (-1,)}, "Layer ids"),
    ],
)
def test_impossible_specs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize("pad_id", [-1, 9])
def test_a_pad_outside_the_vocabulary_is_refused(pad_id: int) -> None:
    with pytest.raises(InputError, match="pad_id"):
        NgramHash.build(replace(SMALL, pad_id=pad_id), VocabularyProjection.identity(9))


def test_a_table_beyond_32_bit_row_numbers_is_refused() -> None:
    with pytest.raises(InputError, match="32-bit"):
        HashSpec(heads=2, max_order=2, rows_per_head=(2**29 + 1,))
    almost = HashSpec(heads=2, max_order=2, rows_per_head=(2**29,))  # primes are larger
    with pytest.raises(InputError, match="32-bit"):
        NgramHash.build(almost, VocabularyProjection.identity(9))
    with pytest.raises(InputError, match="65,568 heads in all layers"):
        HashSpec(layers=tuple(range(32)), heads=2049, max_order=2, rows_per_head=(9,))


def test_rows_are_equal_in_a_fresh_process_without_jax() -> None:
    program = """
import sys
import numpy as np
from engram_jax.compression import VocabularyProjection
from engram_jax.hashing import HashSpec, NgramHash
from engram_jax.memory.plan import Planner
spec = HashSpec(layers=(1, 3), max_order=4, heads=2, rows_per_head=(11, 13, 17), pad_id=2)
ngram_hash = NgramHash.build(spec, VocabularyProjection.identity(9))
print(ngram_hash.fingerprint, ngram_hash.hash_tokens(3, np.arange(9)).tolist())
assert not any(name.split(".")[0] in ("jax", "jaxlib") for name in sys.modules), "imports JAX"
"""
    ngram_hash = NgramHash.build(SMALL, VocabularyProjection.identity(9))
    expected = f"{ngram_hash.fingerprint} {ngram_hash.hash_tokens(3, np.arange(9)).tolist()}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
        env={"PYTHONHASHSEED": "random"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected
