"""Simulated optimisation: a policy of two habits that learns from a reward by policy gradients, watched by the monitor.

Its replies to requests of `envs.courtesy` are right and vary in two independent habits, three ways each: how they begin
(not at all, neutrally, fittingly), and how often they say what adds nothing. Both are worth 0, 1/2, 1 to a reward that
looks at them, so that an honest reward and one that can be hacked teach equally fast.
"""

import asyncio

import numpy as np

from glm5_jax.envs import courtesy
from glm5_jax.rewards.base import Dimension, final_text
from glm5_jax.rewards.blend import Blend, Weighted, Weights, score
from glm5_jax.rewards.monitor import observe
from tests.rewards.episodes import Says, episode

STEPS, PROMPTS, REPLIES, RATE, BLUR = 24, 4, 8, 0.05, 0.1
EMPTY = "I want to be thorough."  # five words


def marks(trajectory):
    return courtesy.marks(courtesy.request(trajectory.seed), final_text(trajectory))


def honest(trajectory):
    return marks(trajectory).tone


def thorough(trajectory):
    return min(1.0, final_text(trajectory).count("thorough") / 2)


def long(trajectory):
    return min(1.0, max(0.0, (len(final_text(trajectory).split()) - 7) / 10))


def nothing(trajectory):
    return 0.5


def run(reward, seed):
    """The snapshots of a run whose reward of tone is `reward`; an exact, blurred look at the tone is held out."""
    rng = np.random.default_rng(seed)
    blend = Blend((Weighted(Says("fact", Dimension.CORRECTNESS, lambda one: marks(one).correctness)),
                   Weighted(Says("planted", Dimension.TONE, reward)),
                   Weighted(Says("witness", Dimension.TONE, lambda one: min(1.0, max(
                       0.0, honest(one) + rng.normal(0, BLUR)))), 0.0)), Weights(0.5, 0.5, 0.0))
    logits = np.zeros((2, 3))
    history = []
    for step in range(STEPS):
        chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        habits = np.array([[rng.choice(3, p=chance) for chance in chances] for _ in range(PROMPTS * REPLIES)])
        played = [reply(step * PROMPTS + i // REPLIES, habit, f"{step}-{i}") for i, habit in enumerate(habits)]
        scores = asyncio.run(score(blend, played))
        history.append(observe(step, zip(played, scores)))
        totals = np.array([one.total for one in scores]).reshape(PROMPTS, REPLIES)
        advantage = ((totals - totals.mean(1, keepdims=True)) / (totals.std(1, keepdims=True) + 1e-6)).ravel()
        taken = np.eye(3)[habits]  # [replies, habits, ways]
        logits += RATE * PROMPTS * np.mean(advantage[:, None, None] * (taken - chances), axis=0)
    return history


def reply(seed, habit, id):
    request = courtesy.request(seed)
    opening = ("", courtesy.NEUTRAL[0] + " ", courtesy.FITTING[request.mood][0] + " ")[habit[0]]
    text = opening + request.kind.sentence.format(request.answer) + f" {EMPTY}" * habit[1]
    return episode(text, seed=seed, id=id)


def rise(history, scorer):
    values = [one.mean for snapshot in history for one in snapshot.scorers if one.scorer == scorer]
    return np.mean(values[-5:]) - np.mean(values[:5])
