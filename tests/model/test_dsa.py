"""The pieces around the indexer's kernels: scores of gathered keys, the selection as a mask, the row-wise loss."""

import jax
import jax.numpy as jnp
import numpy as np

from glm5_jax.model import dsa
from tests.model import reference

T, S = 3, 7


def random_index(seed: int = 0, heads: int = 3, channels: int = 4):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32)
            for shape in ((2, T, heads, channels), (2, S, channels), (2, T, heads))]


def test_scores_of_gathered_keys_and_their_gradients():
    q, k, w = random_index()
    selected = np.array([[[0, 3, -1], [1, 2, 6], [-1, -1, -1]]] * 2, np.int32)
    weight = np.random.default_rng(1).normal(size=selected.shape).astype(np.float32) * (selected >= 0)

    def gathered(q, k, w):
        return (dsa.index_scores_at(q, dsa.gather_rows(k, selected), w) * weight).sum()

    def dense(q, k, w):
        scores = (jax.nn.relu(jnp.einsum("btic,bsc->btsi", q, k)) * w[:, :, None]).sum(-1)
        return (jnp.take_along_axis(scores, np.maximum(selected, 0), -1) * weight).sum()

    one, two = (jax.value_and_grad(f, (0, 1, 2))(q, k, w) for f in (gathered, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, two)


def test_selection_as_a_mask():
    selected = np.array([[[0, 3, -1], [1, 2, 6], [-1, -1, -1]]], np.int32)
    np.testing.assert_array_equal(dsa.selection_mask(selected, S)[0].astype(int), [
        [1, 0, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 1], [0] * 7])


def test_kl_by_hand():
    attention = np.array([[[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]]], np.float32)
    scores = np.array([[[0.0, np.log(2.0), 5.0, 0.0], [1.0, 2.0, 3.0, 4.0]]], np.float32)
    mask = np.array([[[1, 1, 0, 1], [0, 0, 0, 0]]], bool)
    # Over keys 0, 1, 3 the guess is 1/4, 2/4, 1/4; key 3 has no attention, and the second query sees nothing.
    by_hand = 0.5 * np.log(0.5 / 0.25) + 0.25 * np.log(0.25 / 0.5)
    np.testing.assert_allclose(dsa.kl_rows(attention, scores, mask), [[by_hand, 0.0]], rtol=1e-6)


def test_gradient_of_the_kl_is_guess_less_target():
    rng = np.random.default_rng(0)
    scores, mask = rng.normal(size=(1, T, S)).astype(np.float32), rng.random((1, T, S)) < 0.6
    mask[0, 1] = False
    attention = reference.softmax(rng.normal(size=scores.shape), mask).astype(np.float32)
    loss = lambda p, s: dsa.kl_rows(p, s, mask).sum()
    to_attention, to_scores = jax.grad(loss, (0, 1))(attention, scores)
    np.testing.assert_allclose(to_scores, reference.softmax(scores, mask) - attention, atol=1e-6)
    assert not to_attention.any()
