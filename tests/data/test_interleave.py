"""Similar documents in one sequence: each whole and in order, the like together, borders without weight."""

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from glm5_jax.data import interleave as module, packing
from glm5_jax.data.interleave import cosines, groups, interleave
from glm5_jax.data.sources import Document, packaged_text
from glm5_jax.text.tokenizer import Tokenizer

FRUIT = "Apples and pears ripen late in the orchard behind the mill. "
METAL = "Forged brackets, bolts and rivets rust unless they are oiled! "


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.packaged()


def documents():
    return [Document("a", FRUIT * 3), Document("b", METAL * 3), Document("c", FRUIT * 2 + "Pears taste best."),
            Document("d", "0123456789"), Document("e", METAL * 4 + "Bolts hold.")]


@settings(max_examples=25)
@given(length=st.integers(1, 400), chunk=st.integers(1, 60), at_least=st.sampled_from([-1.0, 0.0, 0.1, 0.9]))
def test_every_document_is_whole_once_and_in_order(tokenizer, length, chunk, at_least):
    expected = packing.tokenise(documents(), tokenizer)
    found = interleave(documents(), tokenizer, length, chunk=chunk, at_least=at_least)
    members = [set(each.documents.tolist()) for each in found]
    assert sorted(index for group in members for index in group) == list(range(5))
    for each, group in zip(found, members):
        assert len(each.tokens) == len(each.weights) == len(each.documents)
        assert len(each.tokens) <= length or len(group) == 1
        for index in group:
            assert np.array_equal(each.tokens[each.documents == index], expected[index])


def test_the_like_are_woven_chunk_by_chunk(tokenizer):
    sizes = [len(tokens) for tokens in packing.tokenise(documents(), tokenizer)]
    first, second, third = interleave(documents(), tokenizer, 1000, chunk=10)
    assert [set(each.documents.tolist()) for each in (first, second, third)] == [{0, 2}, {1, 4}, {3}]
    left, turns = {0: sizes[0], 2: sizes[2]}, []
    while any(left.values()):
        for index in left:
            turns += [index] * min(10, left[index])
            left[index] -= min(10, left[index])
    assert first.documents.tolist() == turns
    assert first.weights.tolist() == [1.0] + [float(a == b) for a, b in zip(turns, turns[1:])]
    assert third.weights.all()


def test_sequences_go_through_the_one_door(tokenizer):
    found = interleave(documents(), tokenizer, 128, chunk=16)
    rows = packing.pack_best_fit([each.tokens for each in found], 128, loss_weights=[each.weights for each in found])
    assert rows.weights.sum() == sum(each.weights[1:].sum() for each in found)


def test_a_document_prefers_its_other_half(tokenizer):
    topics = [document for document in packaged_text() if len(document.text) > 4000][:8]
    halves = [Document(f"{document.name}/{part}", text) for document in topics for part, text in
              enumerate((document.text[:len(document.text) // 2], document.text[len(document.text) // 2:]))]
    likeness = cosines([half.text for half in halves])
    np.fill_diagonal(likeness, 0)
    right = sum(int(best) == index ^ 1 for index, best in enumerate(likeness.argmax(1)))
    assert right >= 12  # of 16, where guessing gives 1


def test_cosines_written_out(monkeypatch):
    monkeypatch.setattr(module, "SHINGLE", 1)
    texts = ["aab", "abc", "", "ddd"]
    rarity = {"a": 1 + np.log(5 / 3), "b": 1 + np.log(5 / 3), "c": 1 + np.log(5 / 2), "d": 1 + np.log(5 / 2)}
    vectors = np.array([[np.log1p(text.count(letter)) * rarity[letter] for letter in "abcd"] for text in texts])
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.where(norms == 0, 1, norms)
    np.testing.assert_allclose(cosines(texts), vectors @ vectors.T, atol=2e-5)
    assert cosines(texts).dtype == np.float32


def test_groups_written_out():
    likeness = np.array([[1, .2, .9, .8], [.2, 1, .2, .2], [.9, .2, 1, .1], [.8, .2, .1, 1]], np.float32)
    assert groups(likeness, [1, 1, 1, 1], 4, at_least=0.3) == [[0, 2, 3], [1]]  # 3 is like its group: (0.8 + 0.1) / 2
    assert groups(likeness, [1, 1, 1, 1], 4, at_least=0.46) == [[0, 2], [1], [3]]
    assert groups(likeness, [1, 1, 1, 1], 2, at_least=0.3) == [[0, 2], [1], [3]]
    assert groups(likeness, [1, 1, 5, 1], 4, at_least=0.0) == [[0, 3, 1], [2]]  # what does not fit makes way
    assert groups(likeness, [9, 1, 1, 1], 4, at_least=0.3) == [[0], [1], [2], [3]]
    assert groups(np.ones((3, 3)), [1, 1, 1], 2, at_least=1) == [[0, 1], [2]]  # the first of equals


def test_errors(tokenizer):
    with pytest.raises(ValueError, match="length: expected at least 1 token, found 0"):
        interleave(documents(), tokenizer, 0, chunk=1)
    with pytest.raises(ValueError, match="chunk: expected at least 1 token, found 0"):
        interleave(documents(), tokenizer, 1, chunk=0)
    with pytest.raises(ValueError, match="documents: expected at least one"):
        interleave([], tokenizer, 1, chunk=1)
