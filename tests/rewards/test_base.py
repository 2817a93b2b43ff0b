import pytest

from glm5_jax.records import Trajectory, Turn, extend, from_json, to_json
from glm5_jax.rewards.base import Dimension, Judgement, ScorerFailed, asked, final_text, text
from tests.rewards.episodes import NOTHING, episode


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_judgement_is_from_0_to_1(value):
    with pytest.raises(ValueError, match="Judgement.value: expected"):
        Judgement("tone", "tone", value)


def test_a_judgement_is_a_record():
    one = Judgement("tone", Dimension.TONE, 0.1 + 0.2, "why")
    assert from_json(Judgement, to_json(one)) == one
    with pytest.raises(ValueError, match="Judgement.dimension: expected one of .*, found 'style'"):
        Judgement("tone", "style", 1)


@pytest.mark.parametrize("content, found", [
    ("Hi.", "Hi."), (None, ""), (3, ""),
    ([{"type": "text", "text": "a"}, {"type": "image"}, "b", {"text": "c"}], "ac")])
def test_text_of_a_message(content, found):
    assert text({"role": "assistant", "content": content, "reasoning_content": "hidden"}) == found


def test_the_last_reply_and_what_it_answers():
    question, answer = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
    turns = [Turn([question], answer)]
    turns.append(extend(turns, [question, answer, {"role": "user", "content": "Sure?"}],
                        {"role": "assistant", "content": "Yes."}))
    both = Trajectory("a", "talk", 0, turns, "done")
    assert final_text(both) == "Yes." and asked(both) == "user: 1 + 1?\nassistant: 2\nuser: Sure?"
    assert asked(episode("2")) == "user: 1 + 1?"


@pytest.mark.parametrize("function", [final_text, asked])
def test_an_episode_without_a_reply_cannot_be_judged(function):
    with pytest.raises(ScorerFailed, match="trajectory empty: expected a turn"):
        function(NOTHING)
