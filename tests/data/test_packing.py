"""Packing against a token-by-token walk, and batches: every row once an epoch, exact resume."""

import functools
import itertools
import json

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.core.batch import Batch
from glm5_jax.data import packing
from glm5_jax.data.sources import Document, packaged_text
from glm5_jax.text.tokenizer import Tokenizer

INTEGER_FIELDS = ("tokens", "targets", "segment_ids", "positions")


def walk(token_docs, length):
    """What `pack` must give, one cell (token, target, weight, segment, position) after the other."""
    row, rows = [], []
    for document in token_docs:
        segment, position = (row[-1][3] + 1 if row else 1), 0
        for i, token in enumerate(document):
            if len(row) == length:
                rows.append(row)
                row, segment, position = [], 1, 0
            last = i + 1 == len(document)
            row.append((token, 0 if last else document[i + 1], 0 if last else 1, segment, position))
            position += 1
        if len(row) == length:
            rows.append(row)
            row = []
    if row:
        rows.append(row + [(0, 0, 0, 0, 0)] * (length - len(row)))
    return np.array(rows)


def recovered(rows):
    """Documents read back from rows: padding dropped, cut after each position without a target."""
    real = rows.segment_ids.ravel() > 0
    tokens, weights = rows.tokens.ravel()[real], rows.weights.ravel()[real]
    return [part.tolist() for part in np.split(tokens, np.flatnonzero(weights == 0) + 1)[:-1]]


def row_numbers(batch):
    return batch.tokens[:, 0].tolist()


@pytest.fixture
def ten_rows():
    return packing.pack([np.arange(20)], 2)  # row r starts with token 2r


@pytest.fixture(scope="module")
def packaged_tokens():
    return packing.tokenise(packaged_text(), Tokenizer.packaged())


documents = st.lists(st.lists(st.integers(0, 4095), min_size=1, max_size=12), min_size=1, max_size=8)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(documents, st.integers(1, 9))
def test_pack_equals_the_walk(token_docs, length):
    rows = packing.pack([np.array(d, np.int32) for d in token_docs], length)
    expected = walk(token_docs, length)
    for index, field in enumerate(("tokens", "targets", "weights", "segment_ids", "positions")):
        np.testing.assert_array_equal(getattr(rows, field), expected[..., index], err_msg=field)
    assert rows.weights.sum() == sum(map(len, token_docs)) - len(token_docs)
    assert recovered(rows) == token_docs


def test_pack_by_hand():
    rows = packing.pack([np.array([5, 6, 9]), np.array([7, 9]), np.array([1, 2, 9])], 4)
    np.testing.assert_array_equal(rows.tokens, [[5, 6, 9, 7], [9, 1, 2, 9]])
    np.testing.assert_array_equal(rows.targets, [[6, 9, 0, 9], [0, 2, 9, 0]])  # the 7 at the border predicts the 9
    np.testing.assert_array_equal(rows.weights, [[1, 1, 0, 1], [0, 1, 1, 0]])
    np.testing.assert_array_equal(rows.segment_ids, [[1, 1, 1, 2], [1, 2, 2, 2]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 0], [0, 0, 1, 2]])


def cells(rows):
    """{document: [(token, target, weight) of each of its cells]} in document order, where tokens name their document
    and place: token 100 d + i is number i of document d."""
    real = rows.segment_ids > 0
    found = {}
    for token, target, weight in sorted(zip(rows.tokens[real], rows.targets[real], rows.weights[real], strict=True)):
        found.setdefault(int(token) // 100, []).append((int(token), int(target), float(weight)))
    return found


def segments(rows):
    """The tokens of each segment of each row, in order."""
    return [[int(t) for t in row_tokens[ids == segment]] for row_tokens, ids in zip(rows.tokens, rows.segment_ids)
            for segment in range(1, ids.max() + 1)]


def numbered(sizes):
    return [np.arange(100 * d, 100 * d + size) for d, size in enumerate(sizes)]


PACKERS = {"best fit": packing.pack_best_fit, "end to end": packing.pack,
           "offset": functools.partial(packing.pack, offset=13)}


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 15))
def test_every_token_is_in_one_cell_with_its_own_target(pack, sizes, length):
    rows = pack(numbered(sizes), length)
    for document, size in enumerate(sizes):
        inside = [(100 * document + i, 100 * document + i + 1, 1.0) for i in range(size - 1)]
        assert cells(rows)[document] == [*inside, (100 * document + size - 1, 0, 0.0)]
    padding = rows.segment_ids == 0
    assert not any(leaf[padding].any() for leaf in jax.tree.leaves(rows))


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 15))
def test_a_segment_is_a_run_of_one_document_and_positions_count_it(pack, sizes, length):
    rows = pack(numbered(sizes), length)
    for ids, positions in zip(rows.segment_ids, rows.positions):
        assert list(ids[ids > 0]) == sorted(ids[ids > 0]) and not ids[np.count_nonzero(ids):].any()
        for segment in range(1, ids.max() + 1):
            assert positions[ids == segment].tolist() == list(range(np.count_nonzero(ids == segment)))
    for tokens in segments(rows):
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))


def test_offset_moves_the_cuts_by_hand():
    rows = packing.pack(numbered([5, 3]), 4, offset=2)
    np.testing.assert_array_equal(rows.tokens, [[2, 3, 4, 100], [101, 102, 0, 1]])
    np.testing.assert_array_equal(rows.targets, [[3, 4, 0, 101], [102, 0, 1, 2]])
    np.testing.assert_array_equal(rows.segment_ids, [[1, 1, 1, 2], [1, 1, 2, 2]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 0], [0, 1, 0, 1]])


def test_best_fit_by_hand():
    rows = packing.pack_best_fit(numbered([3, 9, 2, 2, 1]), 4)  # 9 = 4 + 4 + 1
    assert segments(rows) == [[100, 101, 102, 103], [104, 105, 106, 107], [0, 1, 2], [108], [200, 201], [300, 301],
                              [400]]
    np.testing.assert_array_equal(rows.segment_ids[2:], [[1, 1, 1, 2], [1, 1, 2, 2], [1, 0, 0, 0]])
    assert packing.fill(rows) == 17 / 20


def best_fit_walk(sizes, length):
    """The segments of each row that best-fit decreasing must give, by trying every row for every piece."""
    pieces = [list(range(100 * d + start, 100 * d + min(start + length, size)))
              for d, size in enumerate(sizes) for start in range(0, size, length)]
    rows = []
    for piece in sorted(pieces, key=len, reverse=True):
        fitting = [row for row in rows if sum(map(len, row)) + len(piece) <= length]
        if not fitting:
            rows.append([])
        max(fitting, key=lambda row: sum(map(len, row)), default=rows[-1]).append(piece)
    return rows


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 15))
def test_best_fit_equals_the_walk(sizes, length):
    rows = packing.pack_best_fit(numbered(sizes), length)
    assert segments(rows) == sum(best_fit_walk(sizes, length), [])
    assert rows.segment_ids.max(axis=1).tolist() == list(map(len, best_fit_walk(sizes, length)))


@pytest.mark.parametrize("length", [128, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("pack", [packing.pack, packing.pack_best_fit])
def test_98_percent_of_the_slots_are_filled_on_the_packaged_text(packaged_tokens, pack, length):
    rows = pack(packaged_tokens, length)
    assert packing.fill(rows) >= 0.98
    assert np.count_nonzero(rows.segment_ids) == sum(map(len, packaged_tokens))


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_loss_weights_follow_the_token_they_are_of(pack):
    token_docs = numbered([5, 17, 1, 3])
    weights = [np.where(tokens % 3 == 0, 0.0, tokens / 8) for tokens in token_docs]
    rows = pack(token_docs, 6, loss_weights=weights)
    for document, found in cells(rows).items():
        assert [weight for _, _, weight in found] == [*weights[document][1:], 0.0]
    assert rows.weights.dtype == np.float32


def test_streams_stand_where_their_token_is_predicted():
    token_docs = numbered([3, 2, 4])
    rows = packing.pack_best_fit(token_docs, 6, streams={"tenth": [tokens / 10 for tokens in token_docs]})
    np.testing.assert_array_equal(rows.streams["tenth"], (rows.targets / 10).astype(np.float32))
    assert rows.streams["tenth"].dtype == np.float32 and rows.streams["tenth"].any()
    with pytest.raises(ValueError, match=r"streams\['tenth'\]\[0\]: expected one value .* shape \(3,\), found \(1,\)"):
        packing.pack_best_fit(token_docs, 6, streams={"tenth": [tokens[:1] for tokens in token_docs]})


def test_loss_weights_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="expected one array per document, 2, found 1"):
        packing.pack(numbered([2, 3]), 4, loss_weights=[np.ones(2)])
    with pytest.raises(ValueError, match=r"loss_weights\[1\]: expected one .* shape \(3,\), found \(2,\)"):
        packing.pack_best_fit(numbered([2, 3]), 4, loss_weights=[np.ones(2), np.ones(2)])


def test_a_negative_offset_is_an_error():
    with pytest.raises(ValueError, match="offset: expected at least 0, found -1"):
        packing.pack(numbered([2]), 4, offset=-1)


def test_types_of_the_fields():
    rows = packing.pack([np.array([1, 2, 3])], 2)
    assert isinstance(rows, Batch) and rows.streams == {}
    assert all(getattr(rows, field).dtype == np.int32 for field in INTEGER_FIELDS)
    assert rows.weights.dtype == np.float32
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(rows))


@pytest.mark.parametrize("pack", [packing.pack, packing.pack_best_fit])
def test_pack_errors(pack):
    with pytest.raises(ValueError, match="length: expected at least 1"):
        pack([np.array([1])], 0)
    with pytest.raises(ValueError, match="at least one document"):
        pack([], 4)
    with pytest.raises(ValueError, match=r"token_docs\[1\]"):
        pack([np.array([1]), np.array([], np.int32)], 4)


def test_tokenise_ends_documents_and_recovers_the_text():
    tokenizer = Tokenizer.packaged()
    texts = ["import os\n", "", "a <|endoftext|> in a text ends nothing"]
    token_docs = packing.tokenise([Document(str(i), text) for i, text in enumerate(texts)], tokenizer)
    for tokens, text in zip(token_docs, texts, strict=True):
        assert tokens.dtype == np.int32
        assert np.flatnonzero(tokens == tokenizer.eos_id).tolist() == [len(tokens) - 1]
        assert tokenizer.decode(tokens, skip_specials=True) == text


def test_the_packaged_text_survives_packing():
    tokenizer = Tokenizer.packaged()
    rows = packing.pack(packing.tokenise(packaged_text(), tokenizer), 512)
    assert [tokenizer.decode(ids[:-1]) for ids in recovered(rows)] == [d.text for d in packaged_text()]


def test_every_row_once_an_epoch_in_a_new_order(ten_rows):
    got = itertools.islice(packing.batches(ten_rows, batch_size=2, seed=3), 20)
    epochs = np.reshape([row_numbers(batch) for batch in got], (4, 10))
    np.testing.assert_array_equal(np.sort(epochs), [range(0, 20, 2)] * 4)
    assert len(np.unique(epochs, axis=0)) == 4


def test_seed_decides_the_order(ten_rows):
    def order(seed):
        return [row_numbers(b) for b in itertools.islice(packing.batches(ten_rows, batch_size=3, seed=seed), 10)]
    assert order(0) == order(0)
    assert order(0) != order(1)


def test_without_shuffle_rows_come_in_order_and_straddle_epochs(ten_rows):
    got = itertools.islice(packing.batches(ten_rows, batch_size=4, seed=0, shuffle=False), 3)
    assert [row_numbers(batch) for batch in got] == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18, 0, 2]]


def test_a_batch_is_made_of_rows_with_all_their_fields():
    rows = packing.pack([np.arange(1, 8), np.arange(11, 14)], 3).replace(streams={"advantage": np.ones((4, 3))})
    batch = next(iter(packing.batches(rows, batch_size=6, seed=0)))
    assert isinstance(batch, Batch)
    for number in range(6):
        row = int(np.flatnonzero(rows.tokens[:, 0] == batch.tokens[number, 0])[0])
        for got, whole in zip(jax.tree.leaves(batch), jax.tree.leaves(rows), strict=True):
            assert type(got) is np.ndarray and got.shape == (6, 3) and got.dtype == whole.dtype
            np.testing.assert_array_equal(got[number], whole[row])


@pytest.mark.parametrize("done", [0, 1, 4, 13])
def test_resume_is_exact(ten_rows, done):
    def fresh():
        return iter(packing.batches(ten_rows, batch_size=3, seed=5))
    iterator = fresh()
    for _ in range(done):
        next(iterator)
    state = json.dumps(iterator.get_state())
    expected = [row_numbers(next(iterator)) for _ in range(7)]
    resumed = fresh()
    resumed.set_state(json.loads(state))
    assert [row_numbers(next(resumed)) for _ in range(7)] == expected


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_each_batch_in_order(ten_rows, count):
    whole = packing.batches(ten_rows, batch_size=6, seed=2)
    parts = [packing.batches(ten_rows, batch_size=6, seed=2, process_index=index, process_count=count)
             for index in range(count)]
    for batch, *shares in itertools.islice(zip(whole, *parts), 7):
        assert [len(share.tokens) for share in shares] == [6 // count] * count
        assert sum(map(row_numbers, shares), []) == row_numbers(batch)


def test_a_state_resumes_on_another_number_of_processes(ten_rows):
    one = iter(packing.batches(ten_rows, batch_size=4, seed=2, process_index=0, process_count=2))
    whole = iter(packing.batches(ten_rows, batch_size=4, seed=2))
    for _ in range(3):
        next(one), next(whole)
    resumed = iter(packing.batches(ten_rows, batch_size=4, seed=2))
    resumed.set_state(json.loads(json.dumps(one.get_state())))
    assert row_numbers(next(resumed)) == row_numbers(next(whole))


def test_process_rows_errors():
    with pytest.raises(ValueError, match="process_index: expected 0 to 1, found 2"):
        packing.process_rows(4, 2, 2)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 3 processes, found 4"):
        packing.process_rows(4, 0, 3)


def test_single_rows_come_in_the_order_of_the_batches(ten_rows):
    batch = next(iter(packing.batches(ten_rows, batch_size=10, seed=4)))
    rows = list(itertools.islice(packing.single_rows(ten_rows, seed=4), 10))
    assert [row.tokens[0] for row in rows] == row_numbers(batch)
    assert all(isinstance(row, Batch) and row.tokens.shape == (2,) for row in rows)


def test_held_out_batches_cover_all_rows_once_in_one_shape(ten_rows):
    batches = packing.held_out_batches(ten_rows, 4)
    assert [batch.tokens.shape for batch in batches] == [(4, 2)] * 3
    np.testing.assert_array_equal(np.concatenate([b.tokens for b in batches])[:10], ten_rows.tokens)
    assert sum(batch.weights.sum() for batch in batches) == ten_rows.weights.sum()
    assert not any(leaf[2:].any() for leaf in jax.tree.leaves(batches[-1]))
    assert len(packing.held_out_batches(ten_rows, 5)) == 2  # nothing to fill up


@pytest.mark.parametrize("make", [packing.held_out_batches, lambda r, n: packing.batches(r, batch_size=n, seed=0)])
def test_batch_size_below_one_is_an_error(ten_rows, make):
    with pytest.raises(ValueError, match="batch_size: expected at least 1, found 0"):
        make(ten_rows, 0)


def test_a_batch_enters_jit(ten_rows):
    batch = packing.held_out_batches(ten_rows, 4)[0]
    total = jax.jit(lambda b: jnp.sum(b.tokens * b.weights))(batch)
    assert total == np.sum(batch.tokens * batch.weights)
