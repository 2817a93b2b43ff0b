import asyncio
import dataclasses

import numpy as np
import pytest
import safetensors.numpy

from glm5_jax.envs import courtesy
from glm5_jax.rewards.base import Dimension, Judgement, ScorerFailed
from glm5_jax.rewards.outcome import (Example, OutcomeModel, OutcomeScorer, TokenScorer, Training, example, fit_labels,
                                      fit_pairs, load, logits, save)
from tests.rewards.episodes import NOTHING, episode

SMALL = Training(features=512, steps=60)


def pair(seed, flaw):
    return example(courtesy.good(seed)), example(courtesy.flawed(seed, flaw))


@pytest.fixture(scope="module")
def fitting():
    """Of pairs where the better reply fits what was told, and the worse one fits something else."""
    return fit_pairs([pair(seed, "unfitting") for seed in range(600)])


def test_it_learns_what_fits_and_generalises(fitting):
    """Each opening stands in better and in worse replies: only together with the prompt does it say anything."""
    held_out = [pair(seed, "unfitting") for seed in range(6000, 6200)]
    better, worse = (logits(fitting, [one[i] for one in held_out]) for i in (0, 1))
    assert np.mean(better > worse) > 0.9
    shuffled = [one if seed % 2 else one[::-1] for seed, one in enumerate(held_out)]
    blind = fit_pairs(shuffled)
    assert abs(np.mean(logits(blind, [one[0] for one in held_out]) > logits(blind, [one[1] for one in held_out]))
               - 0.5) < 0.15


def test_the_fit_is_the_minimum_of_the_loss():
    """By the gradient of the stated objective, in NumPy."""
    data = [pair(seed, "cold") for seed in range(40)]
    training = Training(features=64, steps=2000, learning_rate=0.05, decay=0.1)
    model = fit_pairs(data, training=training)
    unit = [OutcomeModel(row, 0.0, 0) for row in np.eye(64, dtype=np.float32)]
    difference = np.stack([logits(one, [better for better, _ in data]) - logits(one, [worse for _, worse in data])
                           for one in unit], axis=1)
    chance = 1 / (1 + np.exp(-difference @ model.weights))
    gradient = difference.T @ (chance - 1) / len(data) + training.decay * model.weights
    assert np.abs(gradient).max() < 1e-3 < np.abs(model.weights).max()


def test_pairs_set_the_middle_and_labels_the_level():
    data = [pair(seed, "cold") for seed in range(50)]
    replies = [one for both in data for one in both]
    assert np.mean(logits(fit_pairs(data, training=SMALL), replies)) == pytest.approx(0, abs=1e-4)
    labelled = fit_labels(replies, [1.0, 0.0] * 50, training=SMALL)
    found = logits(labelled, replies)
    assert (found[::2] > 0).all() and (found[1::2] < 0).all()
    assert np.mean(logits(fit_labels(replies, [0.9] * 100, training=SMALL), replies)) == pytest.approx(
        np.log(9), abs=0.1)


def test_length_alone_is_no_merit(fitting):
    """The features of a reply have length 1, however often it repeats itself."""
    once, often = (Example("user: Hi.", "It is red. " * times) for times in (2, 50))
    assert logits(fitting, [once]) == logits(fitting, [often])


def test_the_same_data_and_seed_give_the_same_model():
    data = [pair(seed, "cold") for seed in range(20)]
    one, same, other = (fit_pairs(data, seed=seed, training=SMALL) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.weights, same.weights)
    assert one.bias == same.bias and not np.array_equal(one.weights, other.weights)


def test_a_saved_model_is_the_same(tmp_path, fitting):
    save(fitting, tmp_path / "tone.safetensors")
    found = load(tmp_path / "tone.safetensors")
    np.testing.assert_array_equal(found.weights, fitting.weights)
    assert (found.bias, found.seed) == (fitting.bias, fitting.seed)


def test_a_file_that_is_something_else(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(OSError):
        load(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="x.safetensors: expected an outcome model as safetensors"):
        load(path)
    safetensors.numpy.save_file({"weights": np.zeros(4, np.float32)}, path)
    with pytest.raises(ValueError, match="x.safetensors: expected an outcome model, kind .*, found None"):
        load(path)


def test_as_a_scorer(fitting):
    good, bad = courtesy.good(7), courtesy.flawed(7, "unfitting")
    scorer = OutcomeScorer("tone", Dimension.TONE, fitting)
    found = asyncio.run(scorer.score([episode(one[1], asked=one[0]["content"]) for one in (good, bad)]))
    np.testing.assert_allclose([one.value for one in found],
                               1 / (1 + np.exp(-logits(fitting, [example(good), example(bad)]))), rtol=1e-6)
    assert asyncio.run(scorer.score([])) == ()
    extreme = dataclasses.replace(fitting, bias=-1e6)
    assert asyncio.run(OutcomeScorer("t", Dimension.TONE, extreme).score([episode("Hi.")]))[0].value == 0
    with pytest.raises(ScorerFailed, match="trajectory empty"):
        asyncio.run(scorer.score([NOTHING]))


def test_a_function_of_tokens():
    scorer = TokenScorer("head", Dimension.QUALITY, lambda ids: sum(ids) / 100)
    found = asyncio.run(scorer.score([episode("a", ids=((1, 2), (3, 4))), episode("b", ids=((5,), (6,)))]))
    assert found == (Judgement("head", Dimension.QUALITY, 0.1), Judgement("head", Dimension.QUALITY, 0.11))
    with pytest.raises(ValueError, match="Judgement.value: expected 0 to 1 of scorer 'head', found 2.0"):
        asyncio.run(scorer.score([episode("a", ids=((100,), (100,)))]))
    for broken in (episode("a"), NOTHING):
        with pytest.raises(ScorerFailed, match=f"scorer head, trajectory {broken.id}: expected a last turn with"):
            asyncio.run(scorer.score([broken]))


@pytest.mark.parametrize("make, error", [
    (lambda: fit_pairs([]), "pairs: expected one or more to learn from, found none"),
    (lambda: fit_labels([], []), "examples: expected one or more"),
    (lambda: fit_labels([Example("a", "b")], [1, 0]), "labels: expected 1 from 0 to 1, found 2"),
    (lambda: fit_labels([Example("a", "b")], [1.5]), "labels: expected 1 from 0 to 1"),
    (lambda: Training(steps=0), "Training.steps: expected more than 0, found 0"),
    (lambda: OutcomeModel(np.zeros(3), 0.0, 0), "OutcomeModel.weights: expected float32 .features., found float64 .3."),
    (lambda: OutcomeModel(np.zeros(3, np.float32), 0.0, -1), "OutcomeModel.seed: expected 0 to .*, found -1"),
])
def test_what_makes_no_sense(make, error):
    with pytest.raises(ValueError, match=error):
        make()
