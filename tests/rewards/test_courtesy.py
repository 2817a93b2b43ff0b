import asyncio
import statistics

import pytest

from glm5_jax.envs import courtesy
from glm5_jax.rewards import courtesy as rewards
from glm5_jax.rewards.blend import score
from glm5_jax.rewards.judge import MalformedVerdict
from tests.rewards.episodes import episode

SEEDS = range(0, 300, 4)


@pytest.fixture(scope="module")
def blend():
    return rewards.blend()


def scored(blend, make, seeds=SEEDS):
    played = [make(seed) for seed in seeds]
    return asyncio.run(score(blend, [episode(reply, asked=user["content"], seed=seed)
                                     for seed, (user, reply) in zip(seeds, played)]))


def of(scores, scorer):
    return statistics.mean(part.judgement.value for one in scores for part in one.parts
                           if part.judgement.scorer == scorer)


def total(scores):
    return statistics.mean(one.total for one in scores)


def test_a_good_reply_earns_nearly_all_and_every_flaw_costs(blend):
    good = total(scored(blend, courtesy.good))
    assert 0.9 < good <= 1
    for flaw in courtesy.FLAWS:
        assert total(scored(blend, lambda seed: courtesy.flawed(seed, flaw))) < good - 0.08, flaw
    assert total(scored(blend, lambda seed: courtesy.flawed(seed, "wrong"))) == 0
    assert 0.3 < total(scored(blend, courtesy.mediocre)) < 0.7


@pytest.mark.parametrize("flaw, scorers", [
    ("cold", ["tone_model", "tone_judge", "style", "exact_tone"]), ("unfitting", ["tone_model", "tone_judge"]),
    ("wrong", ["fact"]), ("wordy", ["form", "style", "exact_quality"]), ("sloppy", ["form", "exact_quality"])])
def test_the_scorers_see_what_is_theirs(blend, flaw, scorers):
    good, flawed = scored(blend, courtesy.good), scored(blend, lambda seed: courtesy.flawed(seed, flaw))
    for scorer in scorers:
        assert of(flawed, scorer) < of(good, scorer) - 0.1, scorer


def test_all_three_dimensions_have_a_scorer_and_the_exact_marks_are_held_out(blend):
    weights = {one.scorer.name: (one.scorer.dimension.value, one.weight) for one in blend.scorers}
    assert weights == {"fact": ("correctness", 1), "tone_model": ("tone", 1), "tone_judge": ("tone", 1),
                       "form": ("quality", 1), "style": ("quality", 1),
                       "exact_tone": ("tone", 0), "exact_quality": ("quality", 0)}


def test_a_judge_and_a_model_of_ones_own(blend):
    async def silent(messages):
        return "No comment."

    model = next(one.scorer.model for one in blend.scorers if one.scorer.name == "tone_model")
    with pytest.raises(MalformedVerdict):
        scored(rewards.blend(model, silent), courtesy.good, range(1))


def test_training_examples_are_far_from_the_first_seeds():
    prompts = {better.asked for better, _ in rewards.tone_pairs()}
    assert len(prompts) == rewards.EXAMPLES
    assert not prompts & {f"user: {courtesy.request(seed).prompt}" for seed in range(courtesy.COUNT - rewards.EXAMPLES)}
