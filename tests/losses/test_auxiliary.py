"""The reduction of balance loss and indexer KL: by hand, over micro-batches, and for groups that share an index."""

import jax
import numpy as np
import pytest

from glm5_jax.losses import auxiliary
from glm5_jax.model import dsa


def test_counts_by_loop():
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0], [0] * 6, [3, 3, 3, 3, 3, 3]], np.int32)
    tokens, rows = auxiliary.counts(segments, 3)
    for k in range(4):
        seen = [[t + k < 6 and row[t + k] == row[t] != 0 for t in range(6)] for row in segments]
        assert tokens[k] == np.sum(seen)
        assert rows[k] == np.any(seen, axis=1).sum()
    assert tokens.tolist() == [12, 8, 5, 3] and rows.tolist() == [3, 2, 2, 1]


def test_groups_of_layers():
    full, shared = True, False
    np.testing.assert_array_equal(auxiliary.index_groups([full, full, shared, shared, full], 2),
                                  [0, 1, 1, 1, 2, 3, 3])
    np.testing.assert_array_equal(auxiliary.index_groups([full] * 3), [0, 1, 2])


def test_every_indexer_counts_once():
    groups = np.array([0, 1, 1, 1, 2])
    mean = np.array([0.5, 1.0, 2.0, 6.0, 4.0])
    count = np.array([10, 20, 20, 20, 5.0])
    found = auxiliary.indexer_loss(mean * count, count, groups)
    assert float(found) == pytest.approx((0.5 + (1 + 2 + 6) / 3 + 4) / 3)
    alone = auxiliary.indexer_loss(mean * count, count, np.arange(5))
    assert float(alone) == pytest.approx(mean.mean())
    assert float(auxiliary.indexer_loss(np.zeros(2), np.zeros(2), np.array([0, 1]))) == 0


def test_the_mean_over_a_group_pulls_towards_its_average_attention():
    rng = np.random.default_rng(0)
    attention = rng.dirichlet(np.ones(6), (3, 1, 4))  # of three layers that share an index
    scores, mask = rng.normal(size=(1, 4, 6)).astype(np.float32), np.ones((1, 4, 6), bool)

    def of_group(scores):
        sums = jax.numpy.stack([dsa.kl_rows(p, scores, mask).sum() for p in attention])
        return auxiliary.indexer_loss(sums, np.full(3, 4.0), np.zeros(3, int))

    of_average = lambda scores: dsa.kl_rows(attention.mean(0), scores, mask).mean()
    np.testing.assert_allclose(jax.grad(of_group)(scores), jax.grad(of_average)(scores), atol=1e-6)
    assert float(of_group(scores)) > float(of_average(scores)) + 0.01


def test_micro_batches_add_up_to_the_batch():
    rng = np.random.default_rng(0)
    kl, balance, groups = rng.uniform(size=(2, 9)), rng.uniform(size=(3, 5)), np.array([0, 0])
    parts = [(slice(0, 2), slice(0, 1)), (slice(2, 9), slice(1, 5))]  # of 2 and 7 tokens, of 1 and 4 sequences
    whole = auxiliary.indexer_loss(kl.sum(1), np.full(2, 9.0), groups)
    split = sum(auxiliary.indexer_loss(kl[:, t].sum(1), np.full(2, 9.0), groups) for t, _ in parts)
    np.testing.assert_allclose([whole, split], kl.mean(), rtol=1e-6)
    whole = auxiliary.balance_loss(balance.sum(1), np.full(3, 5.0))
    split = sum(auxiliary.balance_loss(balance[:, b].sum(1), np.full(3, 5.0)) for _, b in parts)
    np.testing.assert_allclose([whole, split], balance.mean(), rtol=1e-6)
    assert float(auxiliary.balance_loss(np.zeros(0, np.float32), np.float32(5))) == 0
