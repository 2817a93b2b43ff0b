"""Per-token losses against float64 arithmetic and a loop over positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.core import masked, mesh as core_mesh
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


def predictions(steps=3, rows=2, length=13, width=8, vocabulary=11, seed=0):
    """Hidden states, head, targets and weights of a trunk and its prediction steps, some of weight 0."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(steps, rows, length, width)).astype(np.float32)
    head = rng.normal(size=(width, vocabulary)).astype(np.float32)
    targets = rng.integers(0, vocabulary, (steps, rows, length)).astype(np.int32)
    weights = (rng.uniform(size=targets.shape) * rng.integers(0, 2, targets.shape)).astype(np.float32)
    return hidden, head, targets, weights


def reduced(hidden, head, targets, weights, z=0.1, **how):
    nats, log_z = token.projected_cross_entropy(hidden, head, targets, **how)
    return masked.masked_sum(nats + z * token.z_loss(log_z), weights) / 7


def truth(hidden, head, targets, weights, z=0.1):
    """Value and gradients in float64, written out."""
    h, w = np.float64(hidden).reshape(-1, hidden.shape[-1]), np.float64(head)
    logits = h @ w
    log_z = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    one_hot, p = np.eye(w.shape[1])[targets.reshape(-1)], np.exp(logits - log_z[:, None])
    each = log_z - (logits * one_hot).sum(1) + z * log_z ** 2
    weight = np.float64(weights).reshape(-1) / 7
    d_logits = weight[:, None] * ((1 + 2 * z * log_z[:, None]) * p - one_hot)
    return (weight * each).sum(), (d_logits @ w.T).reshape(hidden.shape), h.T @ d_logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [None, 1, 4, 5, 13, 99])
def test_projected_cross_entropy_and_its_gradients_equal_float64(chunk, tied):
    hidden, head, targets, weights = predictions()
    value, d_hidden, d_head = truth(hidden, head, targets, weights)
    found, (of_hidden, of_head) = jax.jit(jax.value_and_grad(functools.partial(
        reduced, targets=targets, weights=weights, tied=tied, chunk=chunk), (0, 1)))(hidden, head.T if tied else head)
    assert float(found) == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(of_hidden, d_hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_head.T if tied else of_head, d_head, rtol=1e-4, atol=1e-5)
    for x, shape in zip(token.projected_cross_entropy(hidden[0, 0], head, targets[0, 0], chunk=chunk), ((13,), (13,))):
        assert x.shape == shape and x.dtype == jnp.float32


def test_chunks_change_no_value_and_no_place():
    hidden, head, targets, _ = predictions(length=12)
    whole, log_z = token.projected_cross_entropy(hidden, head, targets)
    np.testing.assert_allclose(whole, token.cross_entropy(hidden @ head, targets), rtol=1e-5, atol=1e-6)
    for chunk in (1, 3, 5):
        nats, other = token.projected_cross_entropy(hidden, head, targets, chunk=chunk)
        np.testing.assert_allclose(nats, whole, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(other, log_z, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="chunk: expected at least 1 position, found 0"):
        token.projected_cross_entropy(hidden, head, targets, chunk=0)


def test_bfloat16_hidden_states_are_summed_in_float32():
    """4,096 positions pull on each entry of the head: a sum in bfloat16 would lose most of them."""
    hidden, head, targets, weights = predictions(steps=1, rows=4, length=1024)
    narrow, weights = jnp.asarray(hidden, jnp.bfloat16), np.ones_like(weights)
    rounded = np.asarray(head.astype(jnp.bfloat16), np.float32)
    value, d_hidden, d_head = truth(np.asarray(narrow, np.float32), rounded, targets, weights)
    found, (of_hidden, of_head) = jax.value_and_grad(functools.partial(
        reduced, targets=targets, weights=weights, chunk=64), (0, 1))(narrow, head)
    assert float(found) == pytest.approx(value, rel=1e-4)
    assert of_hidden.dtype == jnp.bfloat16 and of_head.dtype == jnp.float32
    np.testing.assert_allclose(of_head, d_head, atol=2e-3 * np.abs(d_head).max())
    np.testing.assert_allclose(np.float32(of_hidden), d_hidden, atol=1e-2 * np.abs(d_hidden).max())


def test_no_temporary_holds_the_logits():
    """The memory the compiled gradient needs beside its arguments and results falls with the chunk."""
    rows, length, width, vocabulary = 2, 256, 16, 2048
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((rows, length, width), jnp.float32), ((width, vocabulary), jnp.float32), ((rows, length), jnp.int32),
        ((rows, length), jnp.float32))]

    def temporaries(chunk):
        gradient = jax.jit(jax.grad(functools.partial(reduced, chunk=chunk), (0, 1)))
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    logits = rows * length * vocabulary * 4
    whole, quarter, small = (temporaries(chunk) for chunk in (None, 64, 8))
    assert whole >= logits
    assert small < quarter < logits / 1.5
    assert small < logits / 8


def test_split_over_devices_it_is_the_same():
    hidden, head, targets, weights = predictions(rows=4, length=24, vocabulary=12)
    gradient = jax.jit(jax.value_and_grad(functools.partial(reduced, chunk=6), (0, 1)))
    alone = gradient(hidden, head, targets, weights)
    mesh = core_mesh.make_mesh(data=2, context=2, tensor=2)
    place = lambda x, *axes: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))
    spread = gradient(place(hidden, None, "data", "context"), place(head, "data", "tensor"),
                      place(targets, None, "data", "context"), place(weights, None, "data", "context"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), alone, spread)


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
