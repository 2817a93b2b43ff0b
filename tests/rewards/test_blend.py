import asyncio
import dataclasses
import itertools

import pytest

from glm5_jax.records import FailureReason, from_json, to_json
from glm5_jax.rewards.base import Dimension, ScorerFailed
from glm5_jax.rewards.blend import Blend, Score, Weighted, Weights, as_reward, at_least, proportional, score
from glm5_jax.rewards.rules import Rule
from glm5_jax.rl.ledger import Order
from glm5_jax.rl.orchestrator import Orchestrator, Service
from tests.rewards.episodes import Says, episode

CORRECTNESS, TONE, QUALITY = Dimension


def blend(correctness=1.0, tone=1.0, quality=1.0, **options):
    values = zip(Dimension, (correctness, tone, quality))
    return Blend(tuple(Weighted(Says(dimension.value, dimension, value)) for dimension, value in values), **options)


def scored(blend, *replies):
    return asyncio.run(score(blend, [episode(reply, id=reply) for reply in replies]))


@pytest.mark.parametrize("correctness, tone, quality, total", [
    (1, 1, 1, 1.0), (1, 0, 0, 0.5), (1, 1, 0, 0.75), (1, 0, 0.5, 0.625),
    (0, 1, 1, 0.0), (0.49, 1, 1, 0.245), (0.5, 1, 1, 0.75)])
def test_correctness_gates_the_rest(correctness, tone, quality, total):
    (found,) = scored(blend(correctness, tone, quality), "a")
    assert found.total == pytest.approx(total)
    assert (found.correctness, found.tone, found.quality) == (correctness, tone, quality)
    assert (found.gate, found.highest) == (float(correctness >= 0.5), 1.0)


def test_a_soft_gate_and_other_weights():
    (found,) = scored(blend(0.5, 1, 0.5, weights=Weights(1, 2, 4), gate=proportional), "a")
    assert (found.total, found.highest) == (0.5 * (2 + 2) + 0.5, 7)
    assert at_least(1)(0.999) == 0 and at_least(1)(1) == 1


def test_no_wrong_reply_is_better_than_a_right_one():
    """With a threshold of 1 and a weight of correctness that is not below the others' sum."""
    levels = (0.0, 0.5, 1.0)
    totals = {values: scored(blend(*values, gate=at_least(1)), "a")[0].total
              for values in itertools.product(levels, levels, levels)}
    assert max(total for values, total in totals.items() if values[0] < 1) \
        < min(total for values, total in totals.items() if values[0] == 1)


def test_scorers_of_a_dimension_are_averaged_by_weight_and_a_held_out_one_is_kept():
    scorers = (Weighted(Says("fact", CORRECTNESS, 1)), Weighted(Says("warm", TONE, 1.0), 3),
               Weighted(Says("cool", TONE, 0.2), 1), Weighted(Says("witness", TONE, 0.0), 0),
               Weighted(Says("form", QUALITY, 0.5)))
    (found,) = scored(Blend(scorers), "a")
    assert found.tone == pytest.approx(0.8) and found.total == pytest.approx(0.5 + 0.25 * 0.8 + 0.25 * 0.5)
    assert [(part.judgement.scorer, part.judgement.value, part.weight) for part in found.parts] == [
        ("fact", 1, 1), ("warm", 1, 3), ("cool", 0.2, 1), ("witness", 0, 0), ("form", 0.5, 1)]
    assert from_json(Score, to_json(found)) == found


def test_a_dimension_that_nobody_judges():
    (found,) = scored(Blend((Weighted(Says("fact", CORRECTNESS, 1)),), Weights(1, 0, 0)), "a")
    assert (found.total, found.tone, found.quality) == (1, None, None)
    held_out = Blend((Weighted(Says("fact", CORRECTNESS, 1)), Weighted(Says("witness", TONE, 1), 0)), Weights(1, 0, 0))
    assert scored(held_out, "a")[0].tone is None


def test_each_trajectory_has_its_own():
    only = Blend((Weighted(Says("long", CORRECTNESS, lambda one: len(one.id) / 4)),), Weights(1, 0, 0))
    assert [one.total for one in scored(only, "a", "bbbb", "cc")] == [0.25, 1, 0.5]
    assert scored(only) == ()


def test_as_the_reward_of_an_orchestrator():
    kept = []
    reward = as_reward(blend(1, 0.5, 1), lambda trajectory, found: kept.append((trajectory.id, found.tone)))
    assert asyncio.run(reward(episode("hi", id="one"))) == 0.875 and kept == [("one", 0.5)]
    assert asyncio.run(as_reward(blend())(episode("hi"))) == 1


class Broken(Says):
    async def score(self, trajectories):
        raise TimeoutError("the judge is asleep")


class Short(Says):
    async def score(self, trajectories):
        return (await super().score(trajectories))[1:]


class Disguised(Says):
    async def score(self, trajectories):
        return await Says("other", self.dimension, self.value).score(trajectories)


def test_a_scorer_that_fails_fails_the_reward():
    with pytest.raises(TimeoutError, match="asleep") as raised:
        scored(Blend((Weighted(Says("fact", CORRECTNESS, 1)), Weighted(Broken("b", TONE, 1)),
                      Weighted(Says("q", QUALITY, 1)))), "a", "c")
    assert raised.value.__notes__ == ["while scorer b judged ['a', 'c']"]


def test_an_orchestrator_adds_the_total_or_fails_the_rollout():
    async def play(order, id, so_far, called_back):
        return dataclasses.replace(episode("hi", id=id, seed=order.seed), task="talk")

    def broken_for_one(trajectory):
        return 1.0 if trajectory.seed else 1 / 0

    async def main():
        reward = as_reward(Blend((Weighted(Rule("fact", CORRECTNESS, broken_for_one)),), Weights(0.75, 0, 0)))
        orchestrator = Orchestrator([Service("talk", 1.0, 8, 1, int, play, reward)])
        return [await orchestrator.play(Order(f"g-{seed}", "talk", seed, 1, 0), f"r-{seed}", None) for seed in (0, 1)]

    failed, done = asyncio.run(main())
    assert (done.reward, failed.reward, failed.failure.reason) == (0.75, None, FailureReason.REWARD)
    assert "scorer fact, trajectory r-0: ZeroDivisionError" in failed.failure.detail


@pytest.mark.parametrize("kind", [Short, Disguised])
def test_judgements_that_are_not_its_own(kind):
    with pytest.raises(ScorerFailed, match="scorer fact: expected 2 judgements of its own name and of correctness"):
        scored(Blend((Weighted(kind("fact", CORRECTNESS, 1)),), Weights(1, 0, 0)), "a", "b")


FACT, WARM = Weighted(Says("fact", CORRECTNESS, 1)), Weighted(Says("warm", TONE, 1))


@pytest.mark.parametrize("make, message", [
    (lambda: Blend((WARM,), Weights(0, 1, 0)), "expected one of correctness with a weight above 0"),
    (lambda: Blend((FACT, WARM)), "expected one of quality .*set Weights.quality to 0"),
    (lambda: Blend((FACT, Weighted(WARM.scorer, 0)), Weights(1, 1, 0)), "expected one of tone"),
    (lambda: Blend((FACT, FACT), Weights(1, 0, 0)), "expected a name of its own for each, .* found"),
    (lambda: Blend((Weighted(Says("total", CORRECTNESS, 1)),), Weights(1, 0, 0)), "and not 'total', found"),
    (lambda: Blend((Weighted(FACT.scorer, -1),), Weights(1, 0, 0)), "weight of 'fact': expected .* found -1"),
    (lambda: Weights(tone=float("nan")), "Weights.tone: expected a finite number, 0 or more, found nan"),
])
def test_a_blend_that_makes_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()
