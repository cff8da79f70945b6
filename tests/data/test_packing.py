import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_corpora import ByteTokenizer, random_texts

from benchmarks.data_at_size import write_corpus
from engram_jax.data.corpus import Corpus
from engram_jax.data.packing import PackedRows, Shuffle, pack_held_out
from engram_jax.errors import InputError

TEXTS = random_texts(40, 30)
BOS, EOS, PAD = ByteTokenizer.bos_id, ByteTokenizer.eos_id, ByteTokenizer.pad_id

# Every example makes a new corpus with `corpus_of`.
reuse_fixture = settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def packed(corpus, sequence_length, first, count, seed=0):
    return PackedRows(corpus.train, sequence_length, seed).rows(np.arange(first, first + count))


def splitmix64(state):
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def shuffled(count, *key):
    return Shuffle(count, *key)(np.arange(count)).tolist()


@given(count=st.integers(1, 300), key=st.tuples(st.integers(0, 2**70), st.integers(0, 9)))
def test_the_shuffle_in_plain_integers(count, key):
    state = 0
    for part in key:
        state = splitmix64(state ^ part % 2**64)
    drawn = [splitmix64((state + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(12)]
    bits = max(6, (count - 1).bit_length())

    def map_once(number):
        for factor, term in zip(drawn[:6], drawn[6:], strict=True):
            number = (number * (factor | 1) + term) % 2**bits
            number ^= number >> (bits + 1) // 2
        return number

    expected = []
    for number in range(count):
        number = map_once(number)
        while number >= count:
            number = map_once(number)
        expected.append(number)
    assert shuffled(count, *key) == expected and sorted(expected) == list(range(count))


@pytest.mark.parametrize("count", [1, 64, 65, 10**5, 2**16 + 1])
def test_every_item_has_one_place(count):
    assert np.array_equal(np.sort(shuffled(count, 7)), np.arange(count))
    places = np.array([count - 1, 0], np.uint32)
    assert Shuffle(count, 7)(places).tolist() == [shuffled(count, 7)[place] for place in places]


def test_splitmix64_is_the_published_one():
    # The first outputs of the reference implementation in C for the state 1234567.
    states = [(1234567 + i * 0x9E3779B97F4A7C15) % 2**64 for i in range(3)]
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix64(state) for state in states] == expected


def test_documents_land_anywhere_in_an_epoch():
    orders = np.array([shuffled(20, 0, epoch) for epoch in range(2000)])
    counts = np.stack([np.bincount(of_one, minlength=20) for of_one in orders.T])
    # 100 expected in each of the 400 cells, with a standard deviation of 9.7.
    assert abs(counts - 100).max() < 50
    following = np.zeros((20, 20))
    np.add.at(following, (orders[:, :-1], orders[:, 1:]), 1)
    assert abs(following[~np.eye(20, dtype=bool)] - 100).max() < 50  # likewise


@reuse_fixture
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    sequence_length=st.integers(1, 30),
    epoch=st.integers(0, 3),
    held_out=st.sampled_from([0.0, 0.5]),
)
def test_rows_are_those_of_a_naive_packer(corpus_of, lengths, sequence_length, epoch, held_out):
    texts = [chr(ord("a") + i) * length for i, length in enumerate(lengths)]
    corpus = corpus_of(texts, held_out=held_out)
    trained = corpus.train.indices.tolist()
    if corpus.train.token_count < sequence_length + 1:
        with pytest.raises(InputError, match="too few for one row"):
            PackedRows(corpus.train, sequence_length, 0)
        return
    rows = PackedRows(corpus.train, sequence_length, seed=0)
    actual = rows.rows(epoch * rows.rows_per_epoch + np.arange(rows.rows_per_epoch))

    stream = []  # (document, token)
    for document in shuffled(len(texts), 0, 0, epoch):
        if document in trained:
            tokens = corpus.train.tokens(trained.index(document))
            stream += [(document, token) for token in tokens]
    expected_rows = (len(stream) - 1) // sequence_length
    assert rows.rows_per_epoch == expected_rows
    for number in range(expected_rows):
        row = stream[number * sequence_length :][: sequence_length + 1]
        segment, position = 0, 0
        for place in range(sequence_length):
            begins = place == 0 or row[place][0] != row[place - 1][0]
            segment, position = (segment + 1, 0) if begins else (segment, position + 1)
            assert actual.tokens[number, place] == row[place][1]
            assert actual.targets[number, place] == row[place + 1][1]
            assert actual.target_mask[number, place] == (row[place][0] == row[place + 1][0])
            assert actual.segments[number, place] == segment
            assert actual.positions[number, place] == position


def test_an_epoch_holds_every_token_once_but_the_tail(corpus_of):
    # No two documents have a letter in common, so a token identifies its document.
    texts = [chr(0x4E00 + i) * (1 + i % 7) for i in range(100)]
    corpus = corpus_of(texts)
    rows = PackedRows(corpus.train, 16, seed=3)
    once = np.sort(corpus.ids)
    orders = []
    for epoch in range(3):
        tokens = rows.rows(epoch * rows.rows_per_epoch + np.arange(rows.rows_per_epoch)).tokens
        counts = np.bincount(tokens.ravel(), minlength=259)
        missing = np.bincount(once, minlength=259) - counts
        assert missing.min() >= 0 and 1 <= missing.sum() <= 16
        orders.append(tokens)
    assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[1], orders[2])


def test_rows_are_those_of_earlier_versions(corpus_of):
    """Runs are paired by the order of documents, and resume in it; see `packing.ORDER`."""
    texts = [chr(ord("a") + i % 26) * (1 + i * 7919 % 50) for i in range(1000)]
    corpus = corpus_of(texts, held_out=0.1)
    rows = PackedRows(corpus.train, 64, seed=3, source=1)
    of_two_epochs = rows.rows(rows.rows_per_epoch + np.arange(-100, 100))
    assert [zlib.crc32(field.tobytes()) for field in of_two_epochs[:5]] == [
        *(1884436884, 3296229018, 1712679123),
        *(2943036488, 1946954670),
    ]
    held_out = list(pack_held_out(corpus.held_out, 16, 32))
    fields = [np.concatenate([batch[index] for batch in held_out]) for index in range(6)]
    assert [zlib.crc32(field.tobytes()) for field in fields] == [
        *(2351816109, 2965551158, 123954909),
        *(1951801422, 2261150473, 1704965379),
    ]


def test_rows_may_be_asked_for_in_any_order(corpus_of):
    corpus = corpus_of(TEXTS)
    rows = PackedRows(corpus.train, 8, seed=0)
    count = 3 * rows.rows_per_epoch
    whole = rows.rows(np.arange(count))
    order = np.random.default_rng(0).permutation(count)
    for field, again in zip(whole[:5], PackedRows(corpus.train, 8, 0).rows(order)[:5], strict=True):
        assert np.array_equal(field[order], again)


def test_an_epoch_takes_no_memory_for_its_documents(tmp_path):
    """Of each group of 64 documents, only a sum of tokens: 8 bytes."""
    count = 200_000
    write_corpus(tmp_path, count)
    tracemalloc.start()
    rows = PackedRows(Corpus(tmp_path, 0.01).train, 64, seed=0)
    rows.rows(np.array([0, rows.rows_per_epoch]))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2 * (count / 64 * 8) + 100_000  # two epochs


def test_seed_and_source_change_the_order(corpus_of):
    corpus = corpus_of(TEXTS)
    orders = {
        PackedRows(corpus.train, 8, seed, source).rows(np.arange(20)).tokens.tobytes()
        for seed in (0, 1)
        for source in (0, 1)
    }
    assert len(orders) == 4


def test_training_never_reads_a_held_out_document(corpus_of):
    corpus = corpus_of([chr(ord("A") + i % 50) * 9 for i in range(50)], held_out=0.4)
    rows = PackedRows(corpus.train, 8, seed=0)
    held_out = {corpus.held_out.tokens(i)[1] for i in range(len(corpus.held_out))}
    assert held_out and held_out.isdisjoint(rows.rows(np.arange(100)).tokens.ravel())


@pytest.mark.parametrize(("sequence_length", "batch_size"), [(1, 1), (8, 3), (1000, 2)])
def test_held_out_rows_hold_every_document_once(corpus_of, sequence_length, batch_size):
    view = corpus_of(TEXTS, held_out=0.5).held_out
    batches = list(pack_held_out(view, sequence_length, batch_size))
    assert all(batch.tokens.shape == (batch_size, sequence_length) for batch in batches)
    targets, mask, documents, segments, tokens = (
        np.concatenate([getattr(batch, name) for batch in batches]).ravel()
        for name in ("targets", "target_mask", "documents", "segments", "tokens")
    )
    for number in range(len(view)):
        of_document = (documents == number) & (mask == 1)
        assert np.array_equal(targets[of_document], view.tokens(number)[1:])
    assert mask.sum() == view.token_count - len(view)
    assert set(tokens[segments == 0]) <= {PAD}
    assert not mask[segments == 0].any() and not documents[segments == 0].any()
    assert (segments == 0).sum() < batch_size * sequence_length


def test_held_out_rows_need_held_out_documents(corpus_of):
    with pytest.raises(InputError, match="no held-out documents"):
        pack_held_out(corpus_of(TEXTS, held_out=0.0).held_out, 8, 2)


def test_a_corpus_of_too_short_documents_is_refused(corpus_of):
    corpus = corpus_of(["a", "b"])  # 6 tokens with bos and eos
    assert PackedRows(corpus.train, 5, 0).rows_per_epoch == 1
    with pytest.raises(InputError, match="texts has 6 tokens to train on, too few for one row"):
        PackedRows(corpus.train, 6, 0)
    with pytest.raises(InputError, match="0 tokens to train on"):
        PackedRows(corpus_of(["a", "b"], held_out=1.0).train, 1, 0)
