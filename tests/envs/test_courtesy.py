import itertools
import statistics

import pytest

from glm5_jax.envs import courtesy
from glm5_jax.envs.courtesy import COUNT, FITTING, FLAWS, KINDS, NEUTRAL, Courtesy, Marks, marks, read, request
from glm5_jax.envs.episode import run_episode
from glm5_jax.records import EndReason
from glm5_jax.text import mask
from glm5_jax.text.tokenizer import Tokenizer

SEEDS = range(0, COUNT, 29)
HOT = read("My sister lost the keys. What is the opposite of hot?")
BEST = Marks(1.0, 1.0, 1.0)


def test_thousands_of_prompts_and_none_twice():
    prompts = {request(seed).prompt for seed in range(COUNT)}
    assert len(prompts) == COUNT == 9792
    assert request(COUNT + 3) == request(3) == read(request(3).prompt)


def test_a_seed_is_the_same_problem_everywhere():
    assert [request(seed).prompt for seed in (0, 1, 5)] == [
        "Our neighbour wants to be a singer. What is the capital of Peru?",
        "My son sang very well. What is a young cow called?",
        "My uncle found a job. How many legs has a cat?"]
    assert courtesy.good(5) == courtesy.good(5) != courtesy.good(6)


def test_it_fits_a_tiny_model():
    tokenizer = Tokenizer.packaged()
    for seed in SEEDS:
        for messages in (courtesy.good(seed), courtesy.mediocre(seed)):
            prompt, _ = mask.encode(tokenizer, messages[:1], add_generation_prompt=True, enable_thinking=False)
            assert len(prompt) < 40 and len(tokenizer.encode(messages[1]["content"])) < 25


@pytest.mark.parametrize("reply, correctness, tone, quality", [
    ("I am sorry. It is cold.", 1, 1, 3),
    ("What a pity. The opposite of hot is cold.", 1, 1, 2),  # too long
    ("That is sad. Hot and cold.", 1, 1, 3),
    ("I am sorry. It is Cold.", 1, 1, 3),
    ("I am sorry. It is small.", 0, 1, 3),
    ("I am sorry. It is cold or small.", 0, 1, 3),  # not every answer at once
    ("I am sorry. It is coldish.", 0, 1, 3),
    ("How nice! It is cold.", 1, 0, 3),
    ("I see. It is cold.", 1, 0.5, 3),
    ("It is cold. I am sorry.", 1, 0, 3),
    ("it is cold", 1, 0, 2),
    ("I see. It is cold, it is cold.", 1, 0.5, 2),  # repeats itself
    ("I am sorry. I am sorry. It is cold.", 1, 1, 0),
    ("I am sorry. It is cold. Very cold.", 1, 1, 2),  # a sentence too many
    ("", 0, 0, 0),
    ("cold", 1, 0, 1),
], ids=repr)
def test_marks(reply, correctness, tone, quality):
    assert marks(HOT, reply) == Marks(correctness, tone, quality / 3)


def test_what_the_prompt_names_is_no_answer():
    """Every day is the answer to another question."""
    monday = read("My son is sick. Which day comes after Monday?")
    assert marks(monday, "I am sorry. After Monday comes Tuesday.") == BEST
    assert marks(monday, "I am sorry. After Monday comes Sunday.").correctness == 0


def test_a_good_demonstration_is_the_best_there_is():
    for seed in SEEDS:
        user, assistant = courtesy.good(seed)
        assert user["content"] == request(seed).prompt and marks(request(seed), assistant["content"]) == BEST
    openings = {courtesy.good(seed)[1]["content"].split(" It ")[0] for seed in SEEDS}
    assert openings == set(itertools.chain(*FITTING.values()))


@pytest.mark.parametrize("flaw, field", list(zip(FLAWS, ["tone", "tone", "correctness", "quality", "quality"])))
def test_a_flaw_costs_its_mark(flaw, field):
    for seed in SEEDS:
        found = marks(request(seed), courtesy.flawed(seed, flaw)[1]["content"])
        assert getattr(found, field) < 1 and (flaw == "wrong") == (found.correctness == 0)


def test_mediocre_ones_lie_in_the_middle():
    found = [marks(request(seed), courtesy.mediocre(seed)[1]["content"]) for seed in SEEDS]
    assert BEST not in found
    assert 0.6 < statistics.mean(one.correctness for one in found) < 0.9
    assert 0.1 < statistics.mean(one.tone for one in found) < 0.5
    with pytest.raises(ValueError, match="flaws: expected some of .*, found .'rude'"):
        courtesy.flawed(0, "cold", "rude")


def test_acknowledgements_and_answers_do_not_mix():
    """No acknowledgement begins another mood's, and none names an answer."""
    openings = [(mood, text) for mood, texts in (FITTING | {"": NEUTRAL}).items() for text in texts]
    assert not [(one, other) for (mood, one), (its, other) in itertools.permutations(openings, 2)
                if mood != its and one.startswith(other)]
    answers = {answer.lower() for kind in KINDS for answer in kind.answers.values()}
    assert not answers & {word.strip(".!").lower() for _, text in openings for word in text.split()}


def test_the_environment_rewards_nothing_and_tells_the_marks():
    played = run_episode(Courtesy(), lambda *_: courtesy.good(7)[1], task="courtesy", seed=7, id="a")
    assert (played.end, played.reward) == (EndReason.DONE, 0.0)
    assert played.turns[0].messages[0]["content"] == request(7).prompt
    assert played.turns[0].info == {"correctness": 1.0, "tone": 1.0, "quality": 1.0}


def test_a_reply_without_text_is_a_bad_one():
    env = Courtesy()
    with pytest.raises(RuntimeError, match="expected a reset"):
        env.step({"role": "assistant", "content": "Hi."})
    env.reset(0)
    assert env.step({"role": "assistant", "content": None}).info == {"correctness": 0.0, "tone": 0.0, "quality": 0.0}
    env.close()


def test_a_prompt_of_another_task():
    with pytest.raises(ValueError, match="prompt: expected one of envs.courtesy, found 'Hi'"):
        read("Hi")
