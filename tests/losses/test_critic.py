"""Generalised advantage estimates and the critic's loss against loops over sequences, in float64."""

import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.core import metrics as core_metrics
from glm5_jax.losses import aggregate
from glm5_jax.losses.critic import gae, length_adaptive_lambda, value_loss
from tests.losses import reference


@pytest.fixture(autouse=True, scope="module")
def wide():
    with reference.float64(True):
        yield


def drawn(seed, packed):
    """Rewards, values and mask, NaN where nothing counts, and the segments if rows are packed."""
    arrays = reference.batch(seed, packed=packed)
    return arrays["logp"], arrays["advantage"], arrays["mask"], arrays.get("segment_ids")


@functools.lru_cache(None)
def compiled(gamma):
    return jax.jit(functools.partial(gae, gamma=gamma))


def by_sum(reward, value, mask, segments, gamma, lam):
    """A_t as the sum over l of (gamma lam)^l delta_t+l, each written out."""
    found = np.zeros(mask.shape)
    for places in reference.sequences(mask, segments):
        r, v = [reward[p] for p in places], [value[p] for p in places] + [0.0]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(r))]
        for i, p in enumerate(places):
            found[p] = sum((gamma * lam) ** l * d for l, d in enumerate(delta[i:]))
    return found


@settings(max_examples=12)
@given(st.integers(0, 2 ** 32 - 1), st.booleans(), st.sampled_from([(1.0, 1.0), (0.9, 0.8), (0.9, 0.0), (1.0, 0.5)]))
def test_gae_by_sum(seed, packed, rates):
    reward, value, mask, segments = drawn(seed, packed)
    gamma, lam = rates
    advantage, returns = compiled(gamma)(reward, value, mask, lam=lam, segment_ids=segments)
    expected = by_sum(reward, value, mask, segments, gamma, lam)
    np.testing.assert_allclose(advantage, expected, atol=1e-12)
    np.testing.assert_allclose(returns, np.where(mask, expected + value, 0), atol=1e-12)


def test_special_cases_of_gae():
    reward, value, mask, _ = drawn(3, False)
    to_go, _ = compiled(1.0)(reward, np.zeros_like(value), mask, lam=1.0)
    for (places,) in zip(reference.sequences(mask)):
        np.testing.assert_allclose([to_go[p] for p in places], np.cumsum([reward[p] for p in places][::-1])[::-1])
    _, returns = compiled(1.0)(reward, value, mask, lam=1.0)
    np.testing.assert_allclose(returns, to_go, atol=1e-12)  # without a bias of the critic
    perfect, _ = compiled(1.0)(reward, to_go, mask, lam=0.3)
    np.testing.assert_allclose(perfect, 0, atol=1e-12)


def test_a_packed_row_is_its_sequences_and_what_does_not_count_is_passed_over():
    rows = reference.padded({"reward": np.arange(1.0, 8)[None], "value": np.arange(7.0)[None] / 7,
                             "mask": np.array([[1, 0, 1, 1, 0, 1, 0]])})
    segments = reference.padded({"": np.array([[1, 1, 1, 2, 2, 2, 0]])})[""]
    packed, _ = compiled(0.9)(**rows, lam=0.7, segment_ids=segments)
    for places in ([0, 2], [3, 5]):
        alone, _ = compiled(0.9)(**reference.padded({k: x[:1, places] for k, x in rows.items()}), lam=0.7)
        np.testing.assert_allclose(packed[0, places], alone[0, :2], atol=1e-12)
    across, _ = compiled(0.9)(**rows, lam=0.7)
    assert abs(across - packed).max() > 1


def test_lambda_grows_with_the_length():
    mask = np.array([[1, 1, 1, 1, 0, 1, 0, 0]])
    segments = np.array([[4, 4, 4, 4, 4, 9, 9, 0]])
    packed = length_adaptive_lambda(mask, segments, scale=0.5)
    np.testing.assert_allclose(packed, [[0.5] * 5 + [0.0] * 3], rtol=1e-6)
    np.testing.assert_allclose(length_adaptive_lambda(mask, scale=0.5), np.full((1, 8), 0.6), rtol=1e-6)
    reward, value, mask, segments = drawn(5, True)
    lam = np.asarray(length_adaptive_lambda(mask, segments, scale=0.5))
    expected = sum(np.where(lam == one, by_sum(reward, value, mask, segments, 0.9, one), 0) for one in set(lam.flat))
    assert len(set(lam[mask])) > 1
    found, _ = compiled(0.9)(reward, value, mask, lam=lam, segment_ids=segments)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_gae_is_constant_and_compiles():
    reward, value, mask, segments = drawn(5, True)
    total = lambda value: sum(x.sum() for x in gae(jnp.nan_to_num(reward), value, mask, lam=0.9, segment_ids=segments))
    assert not np.asarray(jax.jit(jax.grad(total))(np.nan_to_num(value))).any()


def squares(value, returns, mask, segments, old, clip, aggregation):
    """The mean of half the larger squared error, and the same per sequence."""
    error = lambda p: max((value[p] - returns[p]) ** 2,
                          (old[p] + min(max(value[p] - old[p], -clip), clip) - returns[p]) ** 2) / 2
    sequences = [[error(p) for p in places] for places in reference.sequences(mask, segments)]
    means = [np.mean(x) for x in sequences]
    return np.mean(means) if aggregation != "token_mean" else sum(map(sum, sequences)) / sum(map(len, sequences))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_of_token_means"])
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("packed", [False, True])
def test_value_loss_and_gradient_by_loop(packed, clip, aggregation):
    arrays = reference.batch(2, packed=packed)
    value, returns, old, mask = (arrays[k] for k in ("logp", "advantage", "logp_old", "mask"))
    segments = arrays.get("segment_ids")
    hyper = dict(returns=returns, mask=mask, segment_ids=segments, aggregation=aggregation)
    if clip is not None:
        hyper |= dict(clip=clip, value_old=old)
    (loss, metrics), gradient = jax.value_and_grad(functools.partial(value_loss, **hyper), has_aux=True)(value)
    expected = lambda x: squares(x, returns, mask, segments, old, np.inf if clip is None else clip, aggregation)
    assert float(loss) == pytest.approx(expected(value), rel=1e-12)
    np.testing.assert_allclose(gradient, reference.slope(expected, value, mask), atol=1e-8)

    found = core_metrics.collect(metrics)
    x, y = value[mask], returns[mask]
    assert found["value/error"] == pytest.approx(abs(x - y).mean())
    assert found["value/explained_variance"] == pytest.approx(1 - np.var(y - x) / np.var(y))
    assert (found["value/mean"], found["returns/mean"]) == pytest.approx((x.mean(), y.mean()))
    assert clip is None or 0 < found["value/clip"] == pytest.approx((abs(value - old)[mask] > clip).mean())


def test_value_losses_of_parts_add_up():
    arrays = reference.batch(2)
    value, returns, mask = (arrays[k] for k in ("logp", "advantage", "mask"))
    whole = value_loss(value, returns=returns, mask=mask)[0]
    count = aggregate.count(mask, aggregation="token_mean")
    rows = [reference.part({"value": value, "returns": returns, "mask": mask}, [i]) for i in range(4)]
    parts = [value_loss(**row, denominator=count)[0] for row in rows]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-12)


ROWS = np.zeros((2, 3))


@pytest.mark.parametrize("call, message", [
    (lambda: gae(ROWS, ROWS, ROWS, gamma=1.5), "gamma: expected 0 to 1, found 1.5"),
    (lambda: gae(ROWS, ROWS, ROWS, lam=np.ones(3)), r"lam: expected a number or shape \(2, 3\), found \(3,\)"),
    (lambda: gae(ROWS[:1], ROWS, ROWS), r"reward: expected shape \(2, 3\), found \(1, 3\)"),
    (lambda: gae(ROWS, ROWS[0], ROWS), r"value: expected shape \[B, T\], found \(3,\)"),
    (lambda: length_adaptive_lambda(ROWS, scale=0.0), "scale: expected more than 0, found 0.0"),
    (lambda: value_loss(ROWS, returns=ROWS[:1], mask=ROWS), r"returns: expected shape \(2, 3\), found \(1, 3\)"),
    (lambda: value_loss(ROWS, returns=ROWS, mask=ROWS, clip=0.2), "clip: expected a number above 0 together"),
    (lambda: value_loss(ROWS, returns=ROWS, mask=ROWS, clip=-1.0, value_old=ROWS), "clip: .* found -1.0"),
    (lambda: value_loss(ROWS, returns=ROWS, mask=ROWS, aggregation="sum"), "aggregation: .* found 'sum'"),
])
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
