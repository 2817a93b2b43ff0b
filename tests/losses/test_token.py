"""Per-token losses against float64 arithmetic and a loop over positions."""

import jax
import numpy as np
import pytest

from glm5_jax.losses import token


def test_cross_entropy_is_minus_the_log_of_softmax():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 7)).astype(np.float32) * 4
    targets = rng.integers(0, 7, (2, 3))
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    expected = [[-np.log(p[b, t, targets[b, t]]) for t in range(3)] for b in range(2)]
    np.testing.assert_allclose(token.cross_entropy(logits, targets), expected, rtol=1e-5)


def test_cross_entropy_stays_finite_for_large_logits():
    logits = np.array([[1e4, 0.0], [0.0, 1e4]], np.float32)
    np.testing.assert_array_equal(token.cross_entropy(logits, np.array([0, 0])), [0.0, 1e4])


def test_gradient_is_softmax_minus_one_hot():
    logits = np.array([[0.5, -1.0, 2.0]], np.float32)
    gradient = jax.grad(lambda x: token.cross_entropy(x, np.array([2])).sum())(logits)
    p = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(gradient, p - np.eye(3)[[2]], atol=1e-6)


@pytest.mark.parametrize("step", [0, 1, 2, 9, 20])
def test_future_targets_stay_inside_the_segment(step):
    rng = np.random.default_rng(step)
    segments = np.array([[1, 1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 2, 2, 2, 2, 0, 0, 0]], np.int32)
    targets = rng.integers(5, 90, segments.shape)
    weights = rng.uniform(0.1, 1, segments.shape).astype(np.float32)
    got_targets, got_weights = token.future_targets(targets, segments, weights, step)
    counted = 0
    for b, t in np.ndindex(*segments.shape):
        reachable = t + step < segments.shape[1] and segments[b, t + step] == segments[b, t] != 0
        assert got_weights[b, t] == (weights[b, t + step] if reachable else 0)
        if reachable:
            assert got_targets[b, t] == targets[b, t + step]
            counted += 1
    assert (counted > 0) == (step < 4)


def test_future_targets_reject_the_past():
    with pytest.raises(ValueError, match="step: expected 0 or more, found -1"):
        token.future_targets(np.zeros((1, 2), int), np.ones((1, 2), int), np.ones((1, 2)), -1)
