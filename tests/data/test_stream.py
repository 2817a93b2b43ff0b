"""Rows packed while documents are read: every token, in full rows, from any place, by whatever reads."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

from absl import flags
import grain
import jax
import numpy as np
import pytest

from glm5_jax.data import packing, stream
from glm5_jax.data.sources import Document, Synthetic, packaged_text
from glm5_jax.text.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).parents[2]
METHODS = ["random_truncation", "best_fit"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.packaged()


def numbered(sizes):
    """Token document d holds 1000 d, 1000 d + 1, ..."""
    return grain.MapDataset.source([np.arange(1000 * d, 1000 * d + size) for d, size in enumerate(sizes)])


def take(iterator, count):
    return [jax.tree.leaves(row) for row in itertools.islice(iterator, count)]


def assert_same(one, other):
    for leaves, other_leaves in zip(one, other, strict=True):
        for leaf, other_leaf in zip(leaves, other_leaves, strict=True):
            np.testing.assert_array_equal(leaf, other_leaf)


@pytest.mark.parametrize("method", METHODS)
def test_every_token_once_when_the_documents_end(method):
    sizes = [3, 40, 1, 7, 7, 19, 2, 30]
    rows = list(stream.PackedRows(numbered(sizes), 8, method=method, window_rows=3))
    tokens = np.concatenate([row.tokens[row.segment_ids > 0] for row in rows])
    assert sorted(tokens) == [1000 * d + i for d, size in enumerate(sizes) for i in range(size)]
    assert sum(row.weights.sum() for row in rows) == sum(sizes) - len(sizes)
    assert {row.tokens.shape for row in rows} == {(8,)}


def test_best_fit_keeps_documents_whole_and_random_truncation_cuts_elsewhere_in_each_window():
    documents = numbered([8] * 40)
    whole = stream.PackedRows(documents, 8, method="best_fit", window_rows=4)
    assert {tuple(np.diff(row.tokens)) for row in whole} == {(1,) * 7}
    cut = [int(row.positions.argmin() if row.positions[0] else np.argmax(row.segment_ids > 1))
           for row in stream.PackedRows(documents, 8, window_rows=4)]
    assert len(set(cut)) > 2


def test_the_rows_of_a_window_are_mixed_but_those_of_two_are_not():
    rows = stream.PackedRows(numbered([8] * 64), 8, method="best_fit", window_rows=32)
    documents = [int(row.tokens[0]) // 1000 for row in rows]
    assert sorted(documents[:32]) == list(range(32)) and sorted(documents[32:]) == list(range(32, 64))
    assert documents[:32] != sorted(documents[:32]) and np.argsort(documents[:32]).tolist() != \
        np.argsort(documents[32:]).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides(method):
    def rows(seed):
        return [row.tokens.tolist() for row in stream.PackedRows(numbered([5, 9, 2] * 9), 8, method=method, seed=seed)]
    assert rows(1) == rows(1) != rows(2)


@pytest.mark.parametrize("length", [512, 2048])
@pytest.mark.parametrize("method", METHODS)
def test_98_percent_of_the_slots_are_filled_on_the_packaged_text(tokenizer, method, length):
    documents = grain.MapDataset.source(packing.tokenise(packaged_text(), tokenizer)).shuffle(seed=0).repeat()
    rows = itertools.islice(stream.PackedRows(documents, length, method=method), 128)
    assert np.mean([row.segment_ids > 0 for row in rows]) >= 0.98


def test_token_documents_are_endless_and_each_epoch_has_its_order(tokenizer):
    texts = [Document(str(number), "x" * number) for number in range(1, 9)]
    documents = stream.token_documents(texts, tokenizer, seed=3)
    epochs = [[len(tokenizer.decode(documents[8 * epoch + i][:-1])) for i in range(8)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(1, 9)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    in_order = stream.token_documents(texts, tokenizer)
    assert [len(tokenizer.decode(in_order[i][:-1])) for i in range(10)] == [*range(1, 9), 1, 2]
    with pytest.raises(ValueError, match="documents: expected at least one, found none"):
        stream.token_documents([], tokenizer)


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("method", METHODS)
def test_resume_is_exact_anywhere_and_threads_change_nothing(tokenizer, method, threads):
    def fresh(threads):
        documents = stream.token_documents(Synthetic(20, median_words=8), tokenizer, seed=4)
        return iter(stream.PackedRows(documents, 32, method=method, window_rows=5, read_options=grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=4)))
    iterator, states = fresh(0), []
    for _ in range(24):
        states.append(json.dumps(iterator.get_state()))
        next(iterator)
    whole = take(fresh(0), 30)
    assert len({json.loads(state)["document"] for state in states}) > 3
    for done, state in enumerate(states):
        resumed = fresh(threads)
        resumed.set_state(json.loads(state))
        assert json.dumps(resumed.get_state()) == state
        assert_same(take(resumed, 6), whole[done:done + 6])
        resumed.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_resume_is_exact_where_grain_filters_documents(threads):
    documents = numbered([8] * 60).filter(lambda tokens: tokens[0] % 3000 == 0)
    dataset = stream.PackedRows(documents, 8, method="best_fit", window_rows=3, read_options=grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=2))
    whole = take(iter(dataset), 100)
    assert len(whole) == 20
    iterator = iter(dataset)
    for done in range(20):
        resumed = iter(dataset)
        resumed.set_state(iterator.get_state())
        assert_same(take(resumed, 100), whole[done:])
        next(iterator)


def test_a_state_can_be_set_in_the_middle_of_reading(tokenizer):
    iterator = iter(stream.PackedRows(numbered([5, 9, 2] * 9), 8, window_rows=3))
    first = take(iterator, 4)
    state = iterator.get_state()
    rest = take(iterator, 100)
    assert next(iterator, None) is None
    iterator.set_state(state)
    assert_same(take(iterator, 100), rest)
    iterator.set_state({"document": 0, "row": 0})
    assert_same(take(iterator, 4), first)


def test_a_state_of_other_documents_is_an_error():
    with pytest.raises(ValueError, match="state: expected a row of the 3 that begin with document 0, found 9"):
        iter(stream.PackedRows(numbered([8] * 3), 8, method="best_fit")).set_state({"document": 0, "row": 9})


@pytest.mark.parametrize("field, value, error", [
    ("length", 0, "length: expected at least 1, found 0"),
    ("window_rows", 0, "window_rows: expected at least 1, found 0"),
    ("workers", -1, "workers: expected at least 0, found -1"),
    ("method", "first_fit", "method: expected 'random_truncation' or 'best_fit', found 'first_fit'"),
])
def test_what_is_out_of_range_is_an_error(field, value, error):
    with pytest.raises(ValueError, match=error):
        stream.PackedRows(numbered([3]), **{"length": 4, field: value})


WORKERS = """
import grain, json, sys
from glm5_jax.data import mixture, stream
from glm5_jax.data.sources import Synthetic
from glm5_jax.text.tokenizer import Tokenizer

def batches(workers):
    documents = stream.token_documents(Synthetic(20, median_words=20), Tokenizer.packaged(), seed=4)
    rows = {"all": stream.PackedRows(documents, 32, window_rows=5, workers=workers)}
    return iter(mixture.batches(rows, [mixture.Stage({"all": 1})], length=32, batch_size=3))

def take(iterator, count):
    return [[next(iterator).tokens.tolist(), iterator.get_state()] for _ in range(count)]

if __name__ == "__main__":
    threads, processes = batches(0), batches(2)
    first = take(threads, 7)
    assert take(processes, 4) == first[:4]
    processes.set_state(json.loads(json.dumps(first[1][1])))
    assert take(processes, 2) == first[2:4]
    threads.set_state(processes.get_state())
    assert take(threads, 3) == first[4:7]
    processes.close()
    print("equal")
"""


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_and_states_in_a_plain_script(tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout == "equal\n", done.stderr


def test_workers_read_where_flags_are_not_parsed(monkeypatch):
    asked = []
    monkeypatch.setattr(grain.IterDataset, "mp_prefetch", lambda self, options: asked.append(options) or self)
    flags.FLAGS.unparse_flags()
    rows = stream.PackedRows(numbered([8] * 3), 8, method="best_fit", workers=2)
    assert [len(row.tokens) for row in rows] == [8, 8, 8]
    assert [options.num_workers for options in asked] == [2] and flags.FLAGS.is_parsed()
