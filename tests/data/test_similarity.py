"""Shingles against a loop over Python integers, the estimate against the exact share, and who counts as a duplicate."""

import numpy as np
import pytest

from glm5_jax.data import similarity
from glm5_jax.data.sources import packaged_text

PROSE = next(document.text for document in packaged_text() if document.name == "strings")


def finalised(value):
    """SplitMix64's finaliser on a Python integer."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def exact(one, other):
    first, second = (set(similarity.shingles(text).tolist()) for text in (one, other))
    return len(first & second) / len(first | second)


def test_shingles_equal_the_loop():
    text, size = "naïve \U0001F600 日本語のテキスト ok", 5
    expected = []
    for start in range(len(text) - size + 1):
        value = 0
        for character in text[start:start + size]:
            value = (value * 0x9E3779B97F4A7C15 + ord(character)) % 2**64
        expected.append(finalised(value))
    assert similarity.shingles(text, size).tolist() == expected


def test_shingles_of_short_and_empty_texts_and_of_case_and_space():
    assert len(similarity.shingles("abc")) == 1 and len(similarity.shingles(" \n")) == 0
    assert similarity.shingles("abc") != similarity.shingles("abd")
    one, other = (similarity.shingles(text) for text in ("The  Quick\nbrown fox", "the quick brown fox "))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.7])
def test_the_estimate_is_near_the_exact_share(share):
    cut = int(len(PROSE) * share)
    other = PROSE[cut:] + "".join(chr(0x4E00 + i) for i in range(cut))
    estimate = similarity.jaccard(similarity.signature(PROSE), similarity.signature(other))
    assert abs(estimate - exact(PROSE, other)) < 0.12  # three standard errors of 128 hashes


def test_the_signature_is_pinned():
    np.testing.assert_array_equal(similarity.signature(PROSE)[:2], [1538577831814366, 750480849339295])
    assert (similarity.signature("") == 2**64 - 1).all()


def test_the_first_of_each_group_stays():
    other = next(document.text for document in packaged_text() if document.name == "numbers")
    changed = PROSE.replace("escape", "ESCAPE sequence", 1)
    texts = [PROSE, other, changed, PROSE[: len(PROSE) // 2], other.upper(), "", "x", ""]
    assert similarity.near_duplicates(texts) == [None, None, 0, None, 1, None, None, 5]
    assert similarity.near_duplicates(texts, threshold=0.3)[3] == 0


def test_texts_are_compared_with_those_that_stay():
    size = len(PROSE)
    chain = [PROSE, PROSE[size // 10:], PROSE[size // 5:]]  # about 0.9 alike each, first and last 0.7
    assert similarity.near_duplicates(chain) == [None, 0, None]
    assert similarity.near_duplicates(chain[1:]) == [None, 0]


def test_the_packaged_text_has_no_near_duplicates():
    assert set(similarity.near_duplicates(document.text for document in packaged_text())) == {None}


@pytest.mark.parametrize("threshold", [0.0, 1.1, float("nan")])
def test_a_threshold_out_of_range_is_an_error(threshold):
    with pytest.raises(ValueError, match="threshold: expected a number above 0, at most 1"):
        similarity.near_duplicates([], threshold)
