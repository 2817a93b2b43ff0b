"""Shares, stages that switch at a batch, exact resume, and processes that share the global batches."""

import itertools
import json

import grain
from hypothesis import given, settings, strategies as st
import jax
import numpy as np
import pytest

from glm5_jax.core.batch import Batch
from glm5_jax.data import mixture, packing, stream
from glm5_jax.data.mixture import Stage

LENGTH = 4


def rows(tens, count=7):
    """Endless rows in which every token is `tens` plus the number of the row, one of `count`."""
    packed = packing.pack_best_fit([np.full(LENGTH, tens + number) for number in range(count)], LENGTH)
    return packing.single_rows(packed, seed=0, shuffle=False)


def first_tokens(dataset, count):
    return [batch.tokens[:, 0].tolist() for batch in itertools.islice(dataset, count)]


def sources_of(dataset, count):
    """10, 20, ... of each row of so many batches."""
    return [token // 10 * 10 for tokens in first_tokens(dataset, count) for token in tokens]


@pytest.mark.parametrize("until, first", [(1, 1), (8, 1), (9, 2), (40, 5), (41, 6), (48, 6)])
def test_a_stage_ends_with_the_first_whole_batch_at_its_end(until, first):
    """Batches of 2 rows of 4 tokens: 8 tokens each."""
    stages = [Stage({"a": 1}, until=until), Stage({"b": 1})]
    got = sources_of(mixture.batches({"a": rows(10), "b": rows(20)}, stages, length=LENGTH, batch_size=2), 8)
    assert got == [10] * 2 * first + [20] * 2 * (8 - first)


def test_shares_of_each_stage_by_hand():
    stages = [Stage({"a": 3, "b": 1}, until=8 * LENGTH), Stage({"a": 1, "b": 0, "c": 1}, until=12 * LENGTH),
              Stage({"b": 0.2})]
    both = {"a": rows(10), "b": rows(20), "c": rows(30)}
    got = sources_of(mixture.batches(both, stages, length=LENGTH, batch_size=4), 4)
    assert got == [10, 10, 20, 10, 10, 10, 20, 10, 10, 30, 10, 30, 20, 20, 20, 20]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any), st.integers(1, 150))
def test_shares_hold_at_every_row(weights, count):
    named = {str(number): rows(10 * number) for number in range(len(weights))}
    stage = Stage({str(number): weight for number, weight in enumerate(weights)})
    got = itertools.islice(mixture.Mixture(named, [stage], length=LENGTH, batch_size=1), count)
    given_rows = np.bincount([row.tokens[0] // 10 for row in got], minlength=len(weights))
    np.testing.assert_array_less(np.abs(given_rows - count * np.array(weights) / sum(weights)), 2)
    assert not given_rows[np.array(weights) == 0].any()


def test_a_source_goes_on_where_it_was_when_a_stage_brings_it_back():
    stages = [Stage({"a": 1}, until=2 * LENGTH), Stage({"b": 1}, until=4 * LENGTH), Stage({"a": 1})]
    dataset = mixture.batches({"a": rows(10), "b": rows(20)}, stages, length=LENGTH, batch_size=1)
    assert first_tokens(dataset, 7) == [[10], [11], [20], [21], [12], [13], [14]]


def example(process_index=0, process_count=1, read_ahead=0):
    documents = [grain.MapDataset.source([np.arange(start, start + size) for size in (9, 2, 5, 14)]).repeat()
                 for start in (100, 200)]
    named = {name: stream.PackedRows(source, LENGTH, window_rows=5) for name, source in zip("ab", documents)}
    stages = [Stage({"a": 2, "b": 1}, until=6 * 6 * LENGTH), Stage({"a": 1, "b": 5})]
    return iter(mixture.batches(named | {"c": rows(10)}, stages, length=LENGTH, batch_size=6, read_ahead=read_ahead,
                                process_index=process_index, process_count=process_count))


def leaves(iterator, count):
    return [jax.tree.leaves(batch) for batch in itertools.islice(iterator, count)]


@pytest.mark.parametrize("read_ahead", [0, 3])
def test_resume_is_exact_after_any_number_of_batches(read_ahead):
    iterator, states = example(read_ahead=read_ahead), []
    for _ in range(11):
        states.append(json.dumps(iterator.get_state()))
        next(iterator)
    whole = leaves(example(), 14)
    for done, state in enumerate(states):
        resumed = example(read_ahead=read_ahead)
        resumed.set_state(json.loads(state))
        assert json.dumps(resumed.get_state()) == state
        for got, expected in zip(leaves(resumed, 3), whole[done:done + 3], strict=True):
            for leaf, other in zip(got, expected, strict=True):
                np.testing.assert_array_equal(leaf, other)
        resumed.close()


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_processes_share_each_batch_and_resume_on_another_number(count):
    parts = [example(index, count) for index in range(count)]
    whole = example()
    for _ in range(8):
        shares = [next(part).tokens for part in parts]
        assert [share.shape for share in shares] == [(6 // count, LENGTH)] * count
        np.testing.assert_array_equal(np.concatenate(shares), next(whole).tokens)
    assert all(part.get_state() == whole.get_state() for part in parts)
    resumed = example()
    resumed.set_state(parts[-1].get_state())
    np.testing.assert_array_equal(next(resumed).tokens, next(whole).tokens)


def test_a_batch_is_made_of_whole_rows():
    batch = next(example())
    assert isinstance(batch, Batch) and all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(batch))
    assert {leaf.shape for leaf in jax.tree.leaves(batch)} == {(6, LENGTH)}
    assert batch.tokens.dtype == np.int32 and batch.weights.dtype == np.float32


def test_a_mixture_ends_with_the_first_source_that_ends():
    ending = stream.PackedRows(grain.MapDataset.source([np.arange(3 * LENGTH)]), LENGTH)
    dataset = mixture.batches({"a": ending, "b": rows(10)}, [Stage({"a": 1, "b": 1})], length=LENGTH, batch_size=2)
    assert len(list(dataset)) == 3


def test_stage_errors():
    with pytest.raises(ValueError, match=r"Stage.weights\['a'\]: expected a number of at least 0, found -1"):
        Stage({"a": -1})
    with pytest.raises(ValueError, match=r"Stage.weights\['a'\]: expected a number of at least 0, found nan"):
        Stage({"a": float("nan")})
    for weights in ({}, {"a": 0}):
        with pytest.raises(ValueError, match="Stage.weights: expected at least one above 0"):
            Stage(weights)
    with pytest.raises(ValueError, match="Stage.until: expected at least 1 token, or None for the last stage; found 0"):
        Stage({"a": 1}, until=0)


@pytest.mark.parametrize("ends", [[8], [None, None], [8, 8, None], [9, 8, None], [None, 8]])
def test_stages_out_of_order_are_an_error(ends):
    with pytest.raises(ValueError, match="stages: expected ends that rise, and none for the last stage"):
        mixture.Mixture({"a": rows(10)}, [Stage({"a": 1}, until=end) for end in ends], length=LENGTH, batch_size=1)


def test_other_errors():
    with pytest.raises(ValueError, match=r"stages\[0\].weights: expected sources of \['a'\], found 'b'"):
        mixture.Mixture({"a": rows(10)}, [Stage({"b": 1})], length=LENGTH, batch_size=1)
    with pytest.raises(ValueError, match="stages: expected at least 1, found 0"):
        mixture.Mixture({"a": rows(10)}, [], length=LENGTH, batch_size=1)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 4 processes, found 6"):
        example(process_count=4)
    iterator = iter(mixture.Mixture({"z": rows(10)}, [Stage({"z": 1})], length=LENGTH, batch_size=1))
    with pytest.raises(ValueError, match=r"state: expected one of the sources \['z'\], found \['a', 'b', 'c'\]"):
        iterator.set_state(example().get_state())
