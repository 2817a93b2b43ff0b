"""Metrics of a reinforcement learning loss against numpy, and that those of parts merge to those of the whole."""

import jax
import numpy as np
import pytest

from glm5_jax import losses
from glm5_jax.core import metrics as core_metrics
from glm5_jax.losses.diagnostics import Correlation, EffectiveShare, ExplainedVariance, Max
from tests.losses import reference


@pytest.fixture(autouse=True, scope="module")
def wide():
    with reference.float64(True):
        yield


def collected(arrays):
    return core_metrics.collect(losses.icepop(**arrays)[1])


def test_every_metric_by_numpy():
    arrays = reference.batch(0, packed=True, spread=0.6)
    logp, old, q, a = (arrays[k][arrays["mask"]] for k in ("logp", "logp_old", "logp_behaviour", "advantage"))
    found = collected(arrays)
    ratio, rho = np.exp(logp - old), np.exp(old - q)
    high, low = (a > 0) & (ratio > 1.28), (a < 0) & (ratio < 0.8)
    pop = np.where((rho >= 0.5) & (rho <= 2), rho, 0)
    weight = np.where(high | low, 0, ratio) * pop
    lengths = [len(places) for places in reference.sequences(**arrays)]
    expected = {
        "surprisal": -logp.mean(), "ppo_kl": (old - logp).mean(), "ratio/mean": ratio.mean(), "ratio/max": ratio.max(),
        "clip/low": low.mean(), "clip/high": high.mean(), "weight/mean": weight.mean(),
        "weight/effective": weight.sum() ** 2 / len(weight) / (weight ** 2).sum(),
        "advantage/mean": a.mean(), "advantage/abs": abs(a).mean(), "advantage/zero": (a == 0).mean(),
        "length/mean": np.mean(lengths), "length/max": max(lengths),
        "mismatch/k1": (q - old).mean(), "mismatch/k3": (rho - 1 - (old - q)).mean(),
        "mismatch/chi_square": (rho ** 2).mean() - 1,
        "mismatch/pearson": np.corrcoef(np.exp(old), np.exp(q))[0, 1],
        "mismatch/log_mean": abs(old - q).mean(), "mismatch/log_max": abs(old - q).max(),
        "mismatch/probability_mean": abs(np.exp(old) - np.exp(q)).mean(),
        "mismatch/probability_max": abs(np.exp(old) - np.exp(q)).max(),
        "weight/low": (rho < 0.5).mean(), "weight/high": (rho > 2).mean(),
    }
    assert found == pytest.approx(expected, rel=1e-6)
    assert all(expected[key] > 0 for key in ("clip/low", "clip/high", "weight/low", "weight/high", "advantage/zero"))


def test_parts_merge_to_the_whole():
    arrays = reference.batch(0, packed=True, spread=0.6)
    arrays["mask"][2] = False  # a part without a token
    parts = [losses.icepop(**reference.part(arrays, [at]))[1] for at in range(4)]
    assert core_metrics.collect(core_metrics.merge(*parts)) == pytest.approx(collected(arrays), rel=1e-6)
    pearson = [float(part["mismatch/pearson"].value()) for part in parts]
    assert abs(np.nanmean(pearson) - collected(arrays)["mismatch/pearson"]) > 1e-3


def test_metrics_pass_through_jit_and_scan():
    arrays = reference.batch(7)
    parts = [reference.part(arrays, rows) for rows in ([0], [1, 2], [3])]
    of = lambda one: losses.icepop(**one)[1]
    later = {name: np.stack([one[name] for one in parts[1:]]) for name in arrays}
    merged, _ = jax.lax.scan(lambda so_far, one: (core_metrics.merge(so_far, of(one)), None), of(parts[0]), later)
    assert core_metrics.collect(merged) == pytest.approx(collected(arrays), rel=1e-6)


def test_engine_metrics_need_the_engine():
    arrays = reference.batch(7)
    del arrays["logp_behaviour"]
    assert not [name for name in collected(arrays) if name.startswith("mismatch")]


def test_correlation_in_float32_of_values_that_hardly_vary():
    with reference.float64(False):
        x = np.float32(0.9) + np.float32(1e-4) * np.random.default_rng(0).normal(size=4000).astype(np.float32)
        y = x + np.float32(1e-4) * np.random.default_rng(1).normal(size=4000).astype(np.float32)
        parts = [Correlation.of(x[i:i + 1000], y[i:i + 1000], np.ones(1000)) for i in range(0, 4000, 1000)]
        merged = parts[0]
        for part in parts[1:]:
            merged = merged.merge(part)
        exact = np.corrcoef(np.float64(x), np.float64(y))[0, 1]
        assert float(merged.value()) == pytest.approx(exact, abs=1e-3)
        spread_x, spread_y = np.mean(x * x) - x.mean() ** 2, np.mean(y * y) - y.mean() ** 2
        assert abs(spread_x / np.var(np.float64(x)) - 1) > 0.1 or abs(spread_y / np.var(np.float64(y)) - 1) > 0.1


def test_values_where_nothing_is_to_be_said():
    none, x = np.zeros(3), np.array([1.0, 2.0, np.nan])
    for metric in (Max.of(x, none), EffectiveShare.of(x, none), Correlation.of(x, x, none)):
        assert np.isnan(metric.value()) and np.isnan(metric.merge(metric).value())
    assert np.isnan(Correlation.of(np.ones(3), x, np.array([1, 1, 0])).value())
    assert float(EffectiveShare.of(none, np.ones(3)).value()) == 0
    assert float(EffectiveShare.of(np.array([1.0, 0, 0]), np.ones(3)).value()) == pytest.approx(1 / 3)


def test_explained_variance():
    value, returns = np.array([1.0, 2, 3, 5]), np.array([1.5, 2, 2, 6])
    expected = 1 - np.var(returns - value) / np.var(returns)
    assert float(ExplainedVariance.of(value, returns, np.ones(4)).value()) == pytest.approx(expected)
    assert float(ExplainedVariance.of(returns, returns, np.ones(4)).value()) == pytest.approx(1)
