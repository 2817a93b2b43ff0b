import asyncio
import math

import pytest

from glm5_jax.envs import courtesy
from glm5_jax.rewards.anchors import Anchors, AnchorScorer, chosen, closeness, distance, for_judge, profiles
from glm5_jax.rewards.base import Dimension
from tests.rewards.episodes import episode

SPARE = ("We left early. The road was wet.", "It rained, so we stayed in and read.", "He is late again; no surprise.",
         "Ask her. She was there, I was not.", "The shop shuts at five. Go now.", "No, thank you. I have had enough.")
PLAIN = "The bus was full, so I walked home."
WORDY = ("Certainly! I would be absolutely delighted to provide comprehensive assistance regarding your fascinating "
         "question! Furthermore, it's important to note that numerous considerations necessarily apply!")
ANCHORS = Anchors(SPARE)


def test_profiles_by_hand():
    found = profiles(["The cat's out! It is."])
    assert found["function"] == {"the": 1, "*": 2, "it": 1, "is": 1}
    assert found["word"] == {"3": 2, "5": 1, "2": 2}
    assert found["sign"] == {"": 3, "!": 1, ".": 1}
    assert found["length"] == {"3": 1}  # 4 to 7 words
    assert found["pairs"]["is"] == 1 and found["pairs"][" I"] == 1 and found["pairs"].total() == 22


def test_a_distance_by_hand():
    """Two texts of one word each that share function word class, sign and length, half of a pair profile, no word
    length."""
    found = distance(["ab"], ["abc"])
    p, q = {" a": 1 / 3, "ab": 1 / 3, "b ": 1 / 3}, {" a": 1 / 4, "ab": 1 / 4, "bc": 1 / 4, "c ": 1 / 4}
    entropy = lambda one: -sum(x * math.log2(x) for x in one.values() if x)
    middle = {key: (p.get(key, 0) + q.get(key, 0)) / 2 for key in p | q}
    pairs = math.sqrt(entropy(middle) - (entropy(p) + entropy(q)) / 2)
    assert found == pytest.approx((pairs + 0 + 1 + 0 + 0) / 5)


def test_a_distance_is_a_distance():
    texts = (*SPARE, PLAIN, WORDY)
    for one in texts:
        assert distance([one], [one]) == 0
        for other in texts:
            assert 0 <= distance([one], [other]) <= 1
            assert distance([one], [other]) == pytest.approx(distance([other], [one]))
    assert distance(["Hm"], [""]) == 1


def test_the_style_counts_and_not_the_topic():
    assert closeness(ANCHORS, PLAIN) > 0.85 > 0.7 > closeness(ANCHORS, WORDY) > 0
    assert closeness(ANCHORS, "") < closeness(ANCHORS, WORDY)
    assert all(closeness(ANCHORS, one) == 1 for one in SPARE)


def test_what_is_typical_is_the_distance_from_the_others():
    by_hand = [distance([one], [other for other in SPARE if other != one]) for one in SPARE]
    assert ANCHORS.typical == pytest.approx(sum(by_hand) / len(SPARE))


def test_the_distance_to_the_references_shrinks_as_replies_take_their_style():
    """A hundred replies, of which more and more are good ones."""
    references = [courtesy.good(seed)[1]["content"] for seed in range(5000, 5100)]
    good, bad = ([make(seed)[1]["content"] for seed in range(100)]
                 for make in (courtesy.good, lambda seed: courtesy.flawed(seed, "wordy", "cold")))
    found = [distance(good[:count] + bad[count:], references) for count in range(0, 101, 20)]
    assert found == sorted(found, reverse=True) and found[-1] < 0.3 * found[0]


def test_as_a_scorer():
    found = asyncio.run(AnchorScorer("style", Dimension.TONE, ANCHORS).score([episode(PLAIN), episode(WORDY)]))
    assert [(one.scorer, one.dimension, one.value) for one in found] == [
        ("style", "tone", closeness(ANCHORS, text)) for text in (PLAIN, WORDY)]


def test_references_for_a_judge():
    assert len(set(chosen(ANCHORS, 3, 0))) == 3 and set(chosen(ANCHORS, 3, 0)) < set(SPARE)
    assert chosen(ANCHORS, 3, 0) == chosen(ANCHORS, 3, 0) == for_judge(ANCHORS, 3)(episode("Hi.", seed=0))
    assert len({chosen(ANCHORS, 3, seed) for seed in range(20)}) > 10
    with pytest.raises(ValueError, match="count: expected 1 to 6, found 7"):
        chosen(ANCHORS, 7, 0)


@pytest.mark.parametrize("references", [(), ("One.",), ("One.", ""), ("One.", " ?!")])
def test_too_few_references(references):
    with pytest.raises(ValueError, match="Anchors.references: expected two or more, each with a word in it"):
        Anchors(references)


def test_references_with_nothing_in_common():
    with pytest.raises(ValueError, match="Anchors.references: expected texts that have something in common"):
        Anchors(("the", "Wonderful! Extraordinary! Magnificent! Unbelievable!"))
