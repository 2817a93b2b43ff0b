"""The slots of a loss: surrogates and their score weights, weight maps, levels, and what an argument may be."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.losses.compose import Spec, band, clipped, loss, probability_band, scored, truncated
from tests.losses import reference

SURROGATES = {
    "clipped": clipped(0.2, 0.28),
    "dual": clipped(0.2, 0.28, dual_clip=1.5),
    "importance": scored(truncated(np.inf)),
    "open band": scored(band(0.8, 1.28, closed=False)),
    "capped": scored(truncated(1.2, 0.9)),
    "probability": probability_band(0.1, 0.2),
}


@pytest.fixture(autouse=True, scope="module")
def wide():
    with reference.float64(True):
        yield


def tokens(seed=0, size=300):
    rng = np.random.default_rng(seed)
    logp = np.log(rng.uniform(0.01, 0.99, size))
    return logp, logp - rng.normal(0, 0.5, size), rng.normal(size=size) * (rng.random(size) < 0.9)


@pytest.mark.parametrize("surrogate", SURROGATES.values(), ids=SURROGATES)
def test_the_gradient_of_a_surrogate_is_its_score_weight_times_the_advantage(surrogate):
    logp, old, advantage = tokens()
    objective = lambda logp: jnp.sum(surrogate(jnp.exp(logp - old), advantage, logp)[0])
    ratio = jnp.exp(logp - old)
    weight = surrogate(ratio, advantage, logp)[1]
    np.testing.assert_allclose(jax.grad(objective)(logp), weight * advantage, atol=1e-14)
    changed = np.asarray(weight != ratio)
    assert surrogate is SURROGATES["importance"] or 10 < changed.sum() < 290


def test_values_of_the_surrogates():
    for lp, old, a in zip(*tokens(1)):
        r, p, q = math.exp(lp - old), math.exp(lp), math.exp(old)
        value = lambda name: float(SURROGATES[name](jnp.float64(r), a, lp)[0])
        ppo = min(r * a, min(max(r, 0.8), 1.28) * a)
        assert value("clipped") == pytest.approx(ppo, abs=1e-15)
        assert value("dual") == pytest.approx(max(ppo, 1.5 * a) if a < 0 else ppo, abs=1e-15)
        assert value("open band") == pytest.approx(r * a * lp if 0.8 < r < 1.28 else 0, abs=1e-15)
        assert value("capped") == pytest.approx(min(max(r, 0.9), 1.2) * a * lp, abs=1e-15)
        dropped = p - q > 0.2 if a > 0 else p - q < -0.1
        assert value("probability") == pytest.approx(0 if dropped else r * a, abs=1e-15)


def test_weight_maps_at_their_ends():
    ratio = jnp.array([0.0, 0.4999, 0.5, 1.0, 2.0, 2.0001])
    np.testing.assert_array_equal(band(0.5, 2.0)(ratio), [0, 0, 0.5, 1, 2, 0])
    np.testing.assert_array_equal(band(0.5, 2.0, closed=False)(ratio), [0, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(truncated(2.0)(ratio), [0, 0.4999, 0.5, 1, 2, 2])
    np.testing.assert_array_equal(truncated(2.0, 0.5)(ratio), [0.5, 0.5, 0.5, 1, 2, 2])
    np.testing.assert_array_equal(band(1.0, 1.0)(ratio), [0, 0, 0, 1, 0, 0])


@pytest.mark.parametrize("level", ["token", "geometric", "sequence"])
@pytest.mark.parametrize("packed", [False, True])
def test_levels_of_both_ratios(level, packed):
    """A loss with its ratio and its mismatch each taken at a level, against a loop over sequences."""
    arrays = reference.batch(3, packed=packed)
    logp, old, q, a = (arrays[k] for k in ("logp", "logp_old", "logp_behaviour", "advantage"))

    def of(differences):
        total = sum(differences)
        return {"token": differences, "geometric": [total / len(differences)] * len(differences),
                "sequence": [total] * len(differences)}[level]

    means = []
    for places in reference.sequences(**arrays):
        ratios = [math.exp(x) for x in of([logp[p] - old[p] for p in places])]
        rhos = [math.exp(x) for x in of([old[p] - q[p] for p in places])]
        means.append(np.mean([min(rho, 1.5) * reference.clipped(r, a[p]) for r, rho, p in zip(ratios, rhos, places)]))
    spec = Spec(clipped(0.2, 0.28), level=level, weight=truncated(1.5), weight_level=level)
    assert float(loss(spec, **arrays)[0]) == pytest.approx(-np.mean(means), rel=1e-12)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("aggregation", ["sequence_mean_of_token_means", "sequence_mean", "token_mean"])
@pytest.mark.parametrize("level", ["geometric", "sequence"])
def test_a_score_of_whole_sequences(level, aggregation, packed):
    """log pi of a sequence is the sum over its tokens, and of a geometric mean their mean, as its ratio is."""
    arrays = reference.batch(5, packed=packed)
    terms, lengths = [], []
    for places in reference.sequences(**arrays):
        part = 1 if level == "sequence" else 1 / len(places)
        logp, old, advantages = (np.array([arrays[k][p] for p in places]) for k in ("logp", "logp_old", "advantage"))
        ratio = math.exp(part * (logp - old).sum())
        terms.append((ratio if 0.8 < ratio < 1.5 else 0) * np.mean(advantages) * part * logp.sum())
        lengths.append(len(places))
    assert 0 < np.count_nonzero(terms) < len(terms)
    expected = np.average(terms, weights=lengths) if aggregation == "token_mean" else np.mean(terms)
    spec = Spec(scored(band(0.8, 1.5)), level=level, aggregation=aggregation)
    assert float(loss(spec, **arrays)[0]) == pytest.approx(-expected, rel=1e-12)


@pytest.mark.parametrize("aggregation", ["sequence_mean_of_token_means", "sequence_mean", "token_mean"])
@pytest.mark.parametrize("level", ["token", "geometric", "sequence"])
def test_12_the_score_function_has_the_gradient_of_the_ratio(level, aggregation):
    arrays = reference.batch(5, packed=True)
    gradient = lambda surrogate: jax.grad(lambda logp: loss(
        Spec(surrogate, level=level, aggregation=aggregation), **{**arrays, "logp": logp})[0])(arrays["logp"])
    of_ratio = np.asarray(gradient(clipped(1.0, np.inf)))
    np.testing.assert_allclose(gradient(scored(truncated(np.inf))), of_ratio, atol=1e-14)
    assert np.abs(of_ratio).max() > 0.01


def test_an_own_composition():
    """A mask by the geometric mean of the mismatch over a sequence, with any function as the map of the other slot."""
    arrays = reference.batch(2)
    spec = Spec(scored(jnp.sqrt), reference="behaviour", weight=lambda rho: jnp.where(rho > 0.9, 1.0, 0.0),
                weight_level="geometric", aggregation="token_mean")
    terms = []
    for places in reference.sequences(**arrays):
        mismatch = np.exp(np.mean([arrays["logp_old"][p] - arrays["logp_behaviour"][p] for p in places]))
        terms += [(mismatch > 0.9) * math.sqrt(math.exp(arrays["logp"][p] - arrays["logp_behaviour"][p]))
                  * arrays["advantage"][p] * arrays["logp"][p] for p in places]
    assert 0 < np.count_nonzero(terms) < len(terms)
    assert float(loss(spec, **arrays)[0]) == pytest.approx(-np.mean(terms), rel=1e-12)


def test_gradients_reach_the_trained_policy_alone():
    arrays = reference.batch(2)
    spec = Spec(clipped(0.2, 0.28), weight=truncated(5.0))
    for name in ("logp_old", "logp_behaviour", "advantage"):
        gradient = jax.grad(lambda x: loss(spec, **{**arrays, name: x})[0])(arrays[name])
        assert not np.asarray(gradient).any()
    assert np.asarray(jax.grad(lambda x: loss(spec, **{**arrays, "logp": x})[0])(arrays["logp"])).any()


def test_one_advantage_for_a_row():
    arrays = reference.batch(2)
    rows = np.array([1.0, -2.0, 0.5, 0.0])
    spread = np.repeat(rows[:, None], reference.LENGTH, axis=1)
    of_rows, of_tokens = (loss(Spec(clipped(0.2, 0.28)), **{**arrays, "advantage": x})[0] for x in (rows, spread))
    assert float(of_rows) == pytest.approx(float(of_tokens)) and float(of_rows) != 0


def test_the_dtype_is_that_of_the_log_probabilities():
    arrays = reference.batch(2)
    spec = Spec(clipped(0.2, 0.28))
    wide = loss(spec, **arrays)[0]
    assert wide.dtype == jnp.float64
    with reference.float64(False):
        narrow, metrics = loss(spec, **arrays)
        assert narrow.dtype == jnp.float32 and float(narrow) == pytest.approx(float(wide), rel=1e-5)
        assert {x.dtype for x in jax.tree.leaves(metrics)} == {jnp.dtype("float32")}
        integers = loss(spec, **{**arrays, "advantage": np.array([1, -1, 0, 2])})[0]
        assert integers.dtype == jnp.float32


def test_the_ratio_is_bounded_and_its_gradient_inside_the_bound_is_not_touched():
    ones = np.ones((reference.ROWS, reference.LENGTH))
    gradient = jax.grad(lambda x: loss(Spec(clipped(1.0, np.inf)), x, logp_old=0 * ones, mask=ones, advantage=ones)[0])
    for far in (19.9, -19.9):
        np.testing.assert_allclose(gradient(far * ones), -np.exp(far) / ones.size * ones, rtol=1e-12)
    for far in (20.1, -20.1, 1e4):
        assert not np.asarray(gradient(far * ones)).any()


GOOD = dict(logp=np.zeros((2, 3), np.float32), advantage=np.zeros(2, np.float32), mask=np.ones((2, 3), bool))


@pytest.mark.parametrize("change, message", [
    (dict(logp=jnp.zeros((2, 3), jnp.bfloat16)), "logp: expected float32 log-probabilities, found bfloat16; take the"),
    (dict(logp=np.zeros((2, 3), int)), "logp: expected float32 log-probabilities, found int"),
    (dict(logp=np.zeros(3, np.float32)), r"logp: expected shape \[B, T\], found \(3,\)"),
    (dict(logp_old=np.zeros((3, 2), np.float32)), r"logp_old: expected the shape of logp, \(2, 3\), found \(3, 2\)"),
    (dict(logp_behaviour=jnp.zeros((2, 3), jnp.float16)), "logp_behaviour: expected float32 .* found float16"),
    (dict(advantage=np.zeros(3)), r"advantage: expected shape \(2,\) or \(2, 3\), found \(3,\)"),
    (dict(segment_ids=np.ones((2, 3), int)), r"advantage: expected shape \(2, 3\), found \(2,\): with segment_ids"),
    (dict(mask=np.ones((2, 2))), r"mask: expected shape \(2, 3\), found \(2, 2\)"),
    (dict(denominator=0), "denominator: expected a scalar, the positive count of the whole batch .*, found 0"),
])
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        loss(Spec(clipped(0.2, 0.28)), **{**GOOD, **change})


@pytest.mark.parametrize("build, message", [
    (lambda: Spec(clipped(0.2, 0.2), reference="engine"), "reference: expected 'old' or 'behaviour', found 'engine'"),
    (lambda: Spec(clipped(0.2, 0.2), level="turn"), "level: expected one of .*, found 'turn'"),
    (lambda: Spec(clipped(0.2, 0.2), weight_level="turn"), "weight_level: expected one of .*, found 'turn'"),
    (lambda: Spec(clipped(0.2, 0.2), aggregation="sum"), "aggregation: expected one of .*, found 'sum'"),
    (lambda: band(2.0, 0.5), "band: expected low <= high, found 2.0 and 0.5"),
    (lambda: band(float("nan"), 2.0), "band: expected low <= high"),
    (lambda: truncated(1.0, 1.0), "upper: expected more than lower, which is 1.0, found 1.0"),
    (lambda: probability_band(-0.1, 0.2), "low: expected 0 or more, found -0.1"),
])
def test_bad_slots(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_one_compilation_serves_every_batch_of_a_shape():
    compilations = []

    @jax.jit
    def step(arrays):
        compilations.append(1)
        return loss(Spec(clipped(0.2, 0.28), level="geometric"), **arrays)[0]

    for seed in range(3):
        step(reference.batch(seed, packed=True))
    assert len(compilations) == 1
