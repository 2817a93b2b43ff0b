"""The algorithms by name: their losses against the formulas, their advantages, and when weights move."""

import numpy as np
import pytest

from glm5_jax.losses import policy
from glm5_jax.rl import algorithms
from glm5_jax.rl.schedule import Async, Sync
from tests.losses import reference

LOSSES = {"reasoning": "icepop", "agentic": "double_sided_is", "general": "icepop", "distillation": "distillation"}


@pytest.fixture(autouse=True, scope="module")
def wide():
    with reference.float64(True):
        yield


def value(loss, arrays, **options):
    """The loss, asked for as a training step does, and the names of its metrics."""
    found, metrics = loss(arrays["logp"], **{name: x for name, x in arrays.items() if name != "logp"}, **options)
    return float(found), set(metrics)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_that_of_the_formula(name):
    arrays, algorithm = reference.batch(0, packed=True, spread=0.7), getattr(algorithms, name)()
    on = arrays["mask"]
    ratio, mismatch, both = (np.exp(arrays[x] - arrays[y])[on] for x, y in (
        ("logp", "logp_old"), ("logp_old", "logp_behaviour"), ("logp", "logp_behaviour")))
    for found, low, high in ((ratio, 0.8, 1.28), (mismatch, 1 / 2, 2), (both, 0.8, 1.28)):
        assert (found < low).any() and (found > high).any() and ((low < found) & (found < high)).any()
    loss, metrics = value(algorithm.loss, arrays, aggregation=algorithm.aggregation)
    assert loss == pytest.approx(reference.loss(LOSSES[name], arrays), rel=1e-12)
    assert ("teacher_kl" in metrics) == (name == "distillation")


@pytest.mark.parametrize("name", LOSSES)
def test_every_bound_can_be_another(name):
    arrays, make = reference.batch(0, packed=True, spread=0.5), getattr(algorithms, name)
    own = policy.double_sided_is if name == "agentic" else policy.icepop
    for bound in ({"clip_low": 0.05}, {"clip_high": 0.1}) + (() if name == "agentic" else ({"beta": 1.2},)):
        changed = value(make(**bound).loss, arrays)[0]
        assert changed == value(own, arrays, **bound)[0] != value(make().loss, arrays)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_advantages_are_rewards_beside_those_of_the_group(name):
    rewards, groups = np.array([1.0, 0.0, 0.0, 3.0, 2.0, 5.0]), np.array([0, 0, 0, 0, 1, 1])
    centred = np.array([0.0, -1.0, -1.0, 2.0, -1.5, 1.5])
    deviation = np.array([1.5 ** 0.5] * 4 + [1.5] * 2)
    wanted = centred if name == "agentic" else centred / (deviation + 1e-6)
    np.testing.assert_allclose(getattr(algorithms, name)().advantage(rewards, groups), wanted, rtol=1e-12)


def test_what_else_distinguishes_them():
    for algorithm in (algorithms.reasoning(), algorithms.general()):
        assert algorithm.scheduler(3) == Sync(3) and not algorithm.teachers and not algorithm.reset_optimizer
    distillation, agentic = algorithms.distillation(), algorithms.agentic(bound=2)
    assert distillation.scheduler(3) == Sync(3) and distillation.teachers and not distillation.reset_optimizer
    assert agentic.scheduler(3) == Async(3, 2) and not agentic.teachers and agentic.reset_optimizer
    assert {name: getattr(algorithms, name)().aggregation for name in LOSSES} == {
        name: "token_mean" if name == "agentic" else "sequence_mean_of_token_means" for name in LOSSES}
