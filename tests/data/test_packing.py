"""Packing against a token-by-token walk, and batches: every row once an epoch, exact resume."""

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


def test_types_of_the_fields():
    rows = packing.pack([np.array([1, 2, 3])], 2)
    assert isinstance(rows, Batch) and rows.streams == {}
    assert all(getattr(rows, field).dtype == np.int32 for field in INTEGER_FIELDS)
    assert rows.weights.dtype == np.float32
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(rows))


def test_pack_errors():
    with pytest.raises(ValueError, match="length: expected at least 1"):
        packing.pack([np.array([1])], 0)
    with pytest.raises(ValueError, match="at least one document"):
        packing.pack([], 4)
    with pytest.raises(ValueError, match=r"token_docs\[1\]"):
        packing.pack([np.array([1]), np.array([], np.int32)], 4)


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
