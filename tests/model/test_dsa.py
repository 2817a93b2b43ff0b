"""The indexer's pieces: scores, visibility, the selection contract by brute force, the gather, the row-wise loss."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings, strategies as st
from hypothesis.extra import numpy as hnp
import pytest

from glm5_jax.model import dsa
from tests.model import reference

T, S = 3, 7
# Many ties, both zeros, and everything that is not a number.
VALUES = st.sampled_from([-np.inf, -2.5, -1.0, -0.0, 0.0, 1e-20, 1.0, 2.5, np.inf, np.nan])
FLAGS = st.booleans()
SCORES = hnp.arrays(np.float32, (T, S), elements=VALUES)
VISIBLE = hnp.arrays(bool, (T, S), elements=FLAGS)
select = jax.jit(dsa.select_topk, static_argnums=2)


def expected(scores: np.ndarray, visible: np.ndarray, top_k: int) -> np.ndarray:
    """The contract for [T, S], by sorting the candidates of one query after the other."""
    chosen = np.full((len(scores), top_k), -1, np.int32)
    for t in range(len(scores)):
        keys = reference.select(scores[t], visible[t], top_k)
        chosen[t, :len(keys)] = keys
    return chosen


@pytest.mark.parametrize("top_k", [1, 4, S, S + 2])
@settings(max_examples=150)
@given(scores=SCORES, visible=VISIBLE)
@example(scores=np.zeros((T, S), np.float32), visible=np.ones((T, S), bool))
@example(scores=np.tile(np.float32([-0.0, 0.0, -0.0, 0.0, -0.0, 0.0, 0.0]), (T, 1)), visible=np.ones((T, S), bool))
@example(scores=np.full((T, S), -np.inf, np.float32), visible=np.tril(np.ones((T, S), bool)))
@example(scores=np.full((T, S), np.nan, np.float32), visible=np.ones((T, S), bool))
def test_selection_contract(top_k, scores, visible):
    selected, nan = select(scores[None], visible[None], top_k)
    assert selected.dtype == jnp.int32 and selected.shape == (1, T, top_k)
    np.testing.assert_array_equal(selected[0], expected(scores, visible, top_k))
    np.testing.assert_array_equal(nan[0], (np.isnan(scores) & visible).sum(1))


@pytest.mark.parametrize("value", [np.float32(np.finfo(np.float32).min), np.float32(np.finfo(np.float32).max)])
def test_extreme_finite_scores_are_numbers(value):
    scores = np.full((1, 1, 5), value, np.float32)
    selected, _ = select(scores, np.ones((1, 1, 5), bool), 3)
    np.testing.assert_array_equal(selected[0, 0], [0, 1, 2])


def test_selection_is_the_same_jitted_eager_and_mapped():
    rng = np.random.default_rng(0)
    scores = np.round(rng.normal(size=(4, 2, T, S)), 0).astype(np.float32)  # rounded: ties
    visible = rng.random(scores.shape) < 0.7
    by_hand = [[expected(s, v, 4) for s, v in zip(*each)] for each in zip(scores, visible)]
    mapped, _ = jax.jit(jax.vmap(lambda s, v: dsa.select_topk(s, v, 4)))(scores, visible)
    np.testing.assert_array_equal(mapped, by_hand)
    np.testing.assert_array_equal(dsa.select_topk(scores[1], visible[1], 4)[0], by_hand[1])


@given(st.data())
@settings(max_examples=100)
def test_visibility(data):
    draw = lambda low, high, n: data.draw(hnp.arrays(np.int32, n, elements=st.integers(low, high)))
    q_positions, q_segments, k_positions, k_segments = draw(0, 4, T), draw(0, 2, T), draw(0, 4, S), draw(0, 2, S)
    seen = dsa.visible(q_positions[None], q_segments[None], k_positions[None], k_segments[None])[0]
    for t in range(T):
        for s in range(S):
            assert seen[t, s] == (q_segments[t] == k_segments[s] != 0 and k_positions[s] <= q_positions[t])


def random_index(seed: int = 0, heads: int = 3, channels: int = 4):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32)
            for shape in ((2, T, heads, channels), (2, S, channels), (2, T, heads))]


def naive_scores(q, k, w):
    products = np.maximum(np.einsum("btic,bsc->btsi", q.astype(np.float64), k), 0)
    return (products * w[:, :, None]).sum(-1)


def test_scores_are_a_weighted_sum_of_relus():
    q, k, w = random_index()
    scores = dsa.index_scores(q, k, w)
    np.testing.assert_allclose(scores, naive_scores(q, k, w), rtol=1e-5, atol=1e-5)
    assert scores.dtype == jnp.float32
    assert (naive_scores(q, k, w) < 0).any()  # negative head weights make negative scores


def test_scores_stay_float32_below_a_bfloat16_model():
    q, k, w = random_index()
    q, k = (jnp.asarray(x, jnp.bfloat16) for x in (q, k))
    scores = dsa.index_scores(q, k, w)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, naive_scores(*(np.asarray(x, np.float32) for x in (q, k, w))), rtol=1e-5,
                               atol=1e-5)


def test_scores_of_gathered_keys_and_their_gradients():
    q, k, w = random_index()
    selected = np.array([[[0, 3, -1], [1, 2, 6], [-1, -1, -1]]] * 2, np.int32)
    weight = np.random.default_rng(1).normal(size=selected.shape).astype(np.float32) * (selected >= 0)

    def gathered(q, k, w):
        return (dsa.index_scores_at(q, dsa.gather_rows(k, selected), w) * weight).sum()

    def dense(q, k, w):
        return (jnp.take_along_axis(dsa.index_scores(q, k, w), np.maximum(selected, 0), -1) * weight).sum()

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
