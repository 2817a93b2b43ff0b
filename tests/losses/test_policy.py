"""The named losses against their formulas in Python floats, in float64, and the equalities that hold between them.

The numbers in brackets are those of the invariants: [12] double-sided importance sampling, [13] mismatch weights, [14]
special cases, [15] ways to split a batch, [17] the first step after a push, [18] what is masked and what is extreme.
"""

import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax import losses
from glm5_jax.core import mesh as core_mesh, metrics as core_metrics
from glm5_jax.losses import compose
from tests.losses import reference

NAMES = ["grpo", "icepop", "double_sided_is", "dapo", "gspo", "cispo", "tis", "ppo", "decoupled_ppo", "distillation"]
seeds = st.integers(0, 2 ** 32 - 1)
few = settings(max_examples=4)


@pytest.fixture(autouse=True, scope="module")
def wide():
    with reference.float64(True):
        yield


def run(name, arrays, **hyper):
    """Loss, gradient and collected metrics."""
    others = {key: x for key, x in arrays.items() if key != "logp"}
    value = functools.partial(getattr(losses, name), **others, **hyper)
    (loss, metrics), gradient = jax.value_and_grad(value, has_aux=True)(arrays["logp"])
    return float(loss), np.asarray(gradient), core_metrics.collect(metrics)


def assert_same(found, expected, rtol=1e-9):
    """Losses and gradients."""
    np.testing.assert_allclose(found[0], expected[0], rtol=rtol, atol=1e-12)
    np.testing.assert_allclose(found[1], expected[1], rtol=rtol, atol=1e-12)


def changed(arrays, **changes):
    return {**arrays, **changes}


@pytest.mark.parametrize("name", NAMES)
@few
@given(seed=seeds, packed=st.booleans())
def test_value_and_gradient_are_those_of_the_formula(name, seed, packed):
    arrays = reference.batch(seed, packed=packed)
    hyper = {"clip_low": 0.1, "clip_high": 0.15} if name == "gspo" else {}
    loss, gradient, _ = run(name, arrays, **hyper)
    assert loss == pytest.approx(reference.loss(name, arrays, **hyper), rel=1e-12, abs=1e-14)
    slope = reference.slope(lambda logp: reference.loss(name, arrays, logp, **hyper), arrays["logp"], arrays["mask"])
    np.testing.assert_allclose(gradient, slope, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_defaults_where_every_bound_is_exceeded(name):
    arrays = reference.batch(0, packed=True, spread=0.0005 if name == "gspo" else 2.0)
    to_old, mismatch = (np.exp(arrays[x] - arrays[y])[arrays["mask"]] for x, y in (("logp", "logp_old"),
                                                                                   ("logp_old", "logp_behaviour")))
    assert name == "gspo" or min(to_old.max(), mismatch.max()) > 5 and max(to_old.min(), mismatch.min()) < 0.5
    loss, _, metrics = run(name, arrays)
    assert loss == pytest.approx(reference.loss(name, arrays), rel=1e-12)
    assert metrics["clip/low"] + metrics["clip/high"] > 0


# [12]

@few
@given(seed=seeds)
def test_12_score_form_is_masked_ratio_form_is_difference_quotient(seed):
    arrays = reference.batch(seed)
    mask, q, a, logp = arrays["mask"], *(np.where(arrays["mask"], arrays[k], 0) for k in (
        "logp_behaviour", "advantage", "logp"))
    count = max(mask.sum(), 1)
    inside = mask & (np.exp(logp - q) > 0.8) & (np.exp(logp - q) < 1.28)
    ratio_form = lambda x: -jnp.sum(jnp.where(inside, jnp.exp(x - q) * a, 0)) / count
    in_numpy = lambda x: -np.sum(np.where(inside, np.exp(x - q) * a, 0)) / count
    gradient = run("double_sided_is", arrays)[1]
    np.testing.assert_allclose(gradient, jax.grad(ratio_form)(logp), atol=1e-12)
    np.testing.assert_allclose(gradient, reference.slope(in_numpy, logp, mask), atol=1e-8)
    assert not gradient[~inside].any()

    attached = lambda x: -jnp.sum(jnp.where(inside, jnp.exp(x - q) * a * x, 0)) / count
    moving = inside & (a != 0)
    spurious = np.asarray(jax.grad(attached)(logp)) - gradient
    np.testing.assert_allclose(spurious[moving], (logp * gradient)[moving], atol=1e-12)
    assert not moving.any() or np.abs(spurious).max() > 1e-4


@few
@given(seed=seeds)
def test_12_without_a_band_it_is_importance_weighted_reinforce(seed):
    arrays = reference.batch(seed)
    logp, q, a = (np.where(arrays["mask"], arrays[k], 0) for k in ("logp", "logp_behaviour", "advantage"))
    loss, gradient, metrics = run("double_sided_is", arrays, clip_low=1.0, clip_high=np.inf)
    count = max(arrays["mask"].sum(), 1)
    np.testing.assert_allclose(gradient, -np.exp(logp - q) * a / count, atol=1e-12)
    assert loss == pytest.approx(-(np.exp(logp - q) * a * logp).sum() / count)
    assert not metrics["clip/low"] and not metrics["clip/high"]


def tails():
    """One token far below the reference, one near, one far above, once for each sign of the advantage."""
    log_ratio = np.log([[0.5, 1.1, 2.0], [0.5, 1.1, 2.0]])
    return reference.padded({
        "logp": -2 + log_ratio, "logp_old": np.full((2, 3), -2.0), "logp_behaviour": np.full((2, 3), -2.0),
        "advantage": np.repeat([[1.0], [-1.0]], 3, axis=1), "mask": np.ones((2, 3))})


def test_12_both_tails_are_cut_for_both_signs():
    np.testing.assert_array_equal(run("double_sided_is", tails())[1][:2, :3] != 0, [[False, True, False]] * 2)
    one_sided = [[True, True, False], [False, True, True]]
    np.testing.assert_array_equal(run("grpo", tails())[1][:2, :3] != 0, one_sided)
    assert run("double_sided_is", tails())[2]["clip/low"] == pytest.approx(1 / 3)
    metrics = run("grpo", tails())[2]
    assert metrics["clip/low"] == metrics["clip/high"] == pytest.approx(1 / 6)


def test_12_without_an_engine_the_old_policy_sampled():
    arrays = reference.batch(1)
    of_engine, of_old = changed(arrays, logp_behaviour=arrays["logp_old"]), dict(arrays)
    del of_old["logp_behaviour"]
    assert_same(run("double_sided_is", of_old), run("double_sided_is", of_engine))
    matters = arrays["mask"] & (arrays["advantage"] != 0)
    assert (run("double_sided_is", of_old)[1][matters] == 0).any() and run("double_sided_is", of_old)[0] != 0


def test_12_the_band_is_open():
    ratio = np.array([[0.5, 0.501, 1.499, 1.5]])
    arrays = reference.padded({"logp": np.log(ratio), "logp_behaviour": np.zeros((1, 4)), "advantage": np.ones((1, 4)),
                               "mask": np.ones((1, 4))})
    gradient = run("double_sided_is", arrays, clip_low=0.5, clip_high=0.5)[1]
    np.testing.assert_allclose(gradient[0, :4] * -4, [0, 0.501, 1.499, 0], atol=1e-12)


# [13]

@few
@given(seed=seeds)
def test_13_a_wide_band_is_untruncated_importance_sampling(seed):
    arrays = reference.batch(seed)
    rho = np.exp(np.where(arrays["mask"], arrays["logp_old"] - arrays["logp_behaviour"], 0))
    weighed = run("grpo", changed(arrays, advantage=arrays["advantage"] * rho))
    assert_same(run("icepop", arrays, beta=np.inf), weighed)
    assert_same(run("tis", arrays, upper=np.inf), weighed)
    outside = arrays["mask"] & ((rho > 2) | (rho < 0.5)) & (arrays["advantage"] != 0)
    clipped = run("grpo", arrays)[1] == 0
    assert not run("icepop", arrays)[1][outside].any() and weighed[1][outside & ~clipped].all()


def test_13_beta_1_keeps_exact_matches_alone():
    arrays = reference.batch(3)
    behaviour = arrays["logp_behaviour"].copy()
    matched = arrays["mask"] & (np.arange(reference.LENGTH) % 2 == 0)
    behaviour[matched] = arrays["logp_old"][matched]
    arrays = changed(arrays, logp_behaviour=behaviour)
    gradient, plain = run("icepop", arrays, beta=1.0)[1], run("grpo", arrays)[1]
    assert (plain != 0)[~matched].any()
    assert not gradient[~matched].any()
    np.testing.assert_allclose(gradient[matched], plain[matched], rtol=1e-9)


@few
@given(seed=seeds)
def test_13_truncation_lies_above_icepop_outside_the_band(seed):
    arrays = reference.batch(seed, spread=1.0)
    rho = np.exp(np.where(arrays["mask"], arrays["logp_old"] - arrays["logp_behaviour"], 0))
    pop, cut, plain = (np.abs(run(name, arrays)[1]) for name in ("icepop", "tis", "grpo"))
    inside = (rho >= 0.5) & (rho <= 2)
    np.testing.assert_allclose(pop[inside], cut[inside], atol=1e-14)
    moved = ~inside & (plain != 0)
    assert (cut[moved] > 0).all() and not pop[moved].any()


@few
@given(seed=seeds, name=st.sampled_from(["icepop", "tis", "decoupled_ppo", "distillation"]))
def test_13_without_mismatch_it_is_grpo(seed, name):
    arrays = reference.batch(seed)
    plain = run("grpo", arrays)
    assert_same(run(name, changed(arrays, logp_behaviour=arrays["logp_old"])), plain)
    assert_same(run(name, {k: x for k, x in arrays.items() if k != "logp_behaviour"}), plain)
    mismatched = arrays["mask"] & (arrays["advantage"] != 0)
    assert not mismatched.any() or np.abs(run(name, arrays)[1] - plain[1]).max() > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_13_at_ratio_1_the_gradient_is_that_of_reinforce(name):
    arrays = reference.batch(10)
    places = reference.sequences(**arrays)
    expected = np.zeros(arrays["mask"].shape)
    for sequence in places:
        advantages = np.array([arrays["advantage"][p] for p in sequence])
        if name == "gspo":
            advantages[:] = advantages.mean()
        for p, advantage in zip(sequence, advantages):
            count = len(sequence) * len(places) if name in reference.SEQUENCE_MEANS else sum(map(len, places))
            expected[p] = -advantage / count
    on_policy = {key: arrays[key] for key in ("logp", "advantage", "mask")}
    np.testing.assert_allclose(run(name, on_policy)[1], expected, atol=1e-13)


@few
@given(seed=seeds)
def test_13_cispo_inside_its_band_is_importance_weighted_reinforce(seed):
    arrays = reference.batch(seed)
    arrays["logp_behaviour"] = arrays["logp_old"]
    free = run("double_sided_is", arrays, clip_low=1.0, clip_high=np.inf)
    assert_same(run("cispo", arrays, upper=1e6), free)
    ratio = np.exp(np.where(arrays["mask"], arrays["logp"] - arrays["logp_old"], 0))
    beyond = arrays["mask"] & (ratio > 1.1) & (arrays["advantage"] != 0)
    tight = run("cispo", arrays, upper=1.1)[1]
    np.testing.assert_allclose(tight[beyond], (free[1] * 1.1 / ratio)[beyond], atol=1e-13)
    np.testing.assert_allclose(tight[~beyond], free[1][~beyond], atol=1e-13)


# [14]

@few
@given(seed=seeds)
def test_14_decoupled_ppo_around_the_behaviour_is_ppo(seed):
    arrays = reference.batch(seed)
    together = changed(arrays, logp_old=arrays["logp_behaviour"])
    assert_same(run("decoupled_ppo", together), run("ppo", together))


def test_14_a_proximal_policy_by_versions():
    logp, behaviour = np.full((1, 5), -1.0), np.full((1, 5), -3.0)
    versions = np.array([[2, 4, 5, 6, 7]])
    found = losses.proximal(logp, behaviour, version_behaviour=versions, version_old=5, version=6)
    np.testing.assert_allclose(found, [[-3 + 2 * 3 / 4, -3 + 2 * 1 / 2, -3, -1, -1]])
    assert not np.asarray(jax.grad(lambda x: losses.proximal(x, behaviour, version_behaviour=versions, version_old=5,
                                                             version=6).sum())(logp)).any()


@few
@given(seed=seeds)
def test_14_gspo_of_sequences_of_one_token_is_grpo(seed):
    arrays = reference.batch(seed, packed=True)
    hyper = {"clip_low": 0.2, "clip_high": 0.28}
    numbered = np.broadcast_to(np.arange(1, reference.LENGTH + 1), arrays["mask"].shape)
    single = changed(arrays, segment_ids=numbered)
    assert_same(run("gspo", single, **hyper), run("grpo", single))
    if max(map(len, reference.sequences(**arrays)), default=0) > 1:
        assert np.abs(run("gspo", arrays, **hyper)[1] - run("grpo", arrays)[1]).max() > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_14_a_group_of_equal_rewards_moves_nothing(name):
    arrays = reference.batch(5)
    advantage = losses.group_advantage(np.full(4, 0.1), np.array([7, 7, 3, 3]))
    loss, gradient, metrics = run(name, changed(arrays, advantage=np.asarray(advantage)))
    assert loss == 0 and not gradient.any() and metrics["advantage/zero"] == 1


# [15]

CHOICES = [(name, {}, "sequence_mean_of_token_means" if name in reference.SEQUENCE_MEANS else "token_mean")
           for name in NAMES if name != "gspo"]
CHOICES += [("gspo", {}, "sequence_mean"), ("grpo", {"aggregation": "sequence_mean"}, "sequence_mean"),
            ("dapo", {"aggregation": "sequence_mean_of_token_means"}, "sequence_mean_of_token_means"),
            ("gspo", {"aggregation": "token_mean"}, "token_mean")]


@pytest.mark.parametrize("name, hyper, aggregation", CHOICES)
def test_15_parts_add_up_to_the_batch(name, hyper, aggregation):
    arrays = reference.batch(0, packed=True)
    whole, parts = run(name, arrays, **hyper), [reference.part(arrays, rows) for rows in ([0, 1], [2, 3])]
    counts = [float(losses.count(x["mask"], x["segment_ids"], aggregation=aggregation)) for x in parts]
    results = [run(name, changed(x, denominator=sum(counts)), **hyper) for x in parts]
    assert_same((sum(x[0] for x in results), np.concatenate([x[1][:2] for x in results])), whole)
    own_means = [x[0] * sum(counts) / count for x, count in zip(results, counts)]
    assert counts[0] != counts[1] and abs(np.mean(own_means) - whole[0]) > 1e-6  # a mean of means is another


def test_15_shards_add_up_to_the_batch():
    arrays = reference.batch(2, packed=True)
    mesh = core_mesh.make_mesh(data=4, context=2)
    gradient = jax.jit(jax.value_and_grad(lambda logp, others: losses.icepop(logp, **others)[0]))
    split = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P("data", None)))
    spread = gradient(split(arrays.pop("logp")), {key: split(x) for key, x in arrays.items()})
    assert_same(spread, run("icepop", reference.batch(2, packed=True)))


@pytest.mark.parametrize("name", NAMES)
def test_15_packing_padding_and_order_change_nothing(name):
    arrays = reference.part(reference.batch(0, packed=True), [1, 2])
    loss, gradient, metrics = run(name, arrays)
    unpacked = {k: [] for k in ("logp", "logp_old", "logp_behaviour", "advantage", "mask")}
    homes = []
    for b, t in ((b, t) for b in range(reference.ROWS) for t in range(reference.LENGTH)):
        segment = arrays["segment_ids"][b, t]
        if segment and (t == 0 or arrays["segment_ids"][b, t - 1] != segment):
            inside = arrays["segment_ids"][b] == segment
            homes.append((b, inside))
            for k, rows in unpacked.items():
                row = np.full(reference.LENGTH, 0 if k == "mask" else np.inf)
                row[1:1 + inside.sum()] = arrays[k][b, inside]
                rows.append(row)
    assert len(homes) == reference.ROWS
    order = np.random.default_rng(0).permutation(len(homes))
    alone = run(name, {k: np.stack(rows)[order] for k, rows in unpacked.items()})
    assert alone[0] == pytest.approx(loss, rel=1e-12)
    for row, (b, inside) in zip(alone[1][np.argsort(order)], homes):
        np.testing.assert_allclose(row[1:1 + inside.sum()], gradient[b, inside], atol=1e-14)
    assert alone[2] == pytest.approx(metrics, rel=1e-6, nan_ok=True)


def test_15_rows_taken_for_sequences_are_another_loss():
    arrays = reference.batch(0, packed=True)
    as_rows = {key: x for key, x in arrays.items() if key != "segment_ids"}
    for name in ("grpo", "gspo"):
        assert abs(run(name, as_rows)[0] - run(name, arrays)[0]) > 1e-6


# [17]

@pytest.mark.parametrize("name", NAMES)
def test_17_first_step_after_a_push(name):
    arrays = reference.batch(4, spread=0.0)
    _, gradient, metrics = run(name, arrays)
    assert metrics["ppo_kl"] == 0 and metrics["clip/low"] == 0 and metrics["clip/high"] == 0
    for name in ("ratio/mean", "ratio/max", "weight/mean", "weight/effective", "mismatch/pearson"):
        assert metrics[name] == pytest.approx(1), name
    assert metrics["mismatch/log_max"] == metrics["mismatch/chi_square"] == 0
    assert gradient.any()


@pytest.mark.parametrize("name", ["icepop", "double_sided_is", "gspo"])
def test_17_a_later_step_differs(name):
    metrics = run(name, reference.batch(4))[2]
    assert metrics["ppo_kl"] and metrics["clip/low"] + metrics["clip/high"] > 0 and metrics["mismatch/log_max"] > 0


# [18]

@pytest.mark.parametrize("name", NAMES)
def test_18_what_is_masked_reaches_nothing(name):
    arrays = reference.batch(6, packed=True)
    dirt = np.random.default_rng(0).choice([np.nan, np.inf, -np.inf], arrays["mask"].shape)
    clean = {k: np.where(arrays["mask"], x, 0) if x.dtype == float else x for k, x in arrays.items()}
    dirty = {k: np.where(arrays["mask"], x, dirt) if x.dtype == float else x for k, x in arrays.items()}
    found, expected = run(name, dirty), run(name, clean)
    assert found[0] == expected[0] and found[2] == expected[2]
    np.testing.assert_array_equal(found[1], expected[1])
    assert not found[1][~arrays["mask"]].any() and np.isfinite(found[1]).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", NAMES)
def test_18_extreme_ratios_stay_finite(name, sign):
    far = np.array([[50.0], [1e4], [1e30], [np.inf]])  # all in one batch: each would spoil it
    each = np.concatenate([-far, np.full((4, 6), -1.0)], axis=1)
    arrays = {"logp": each, "logp_old": np.roll(each, 2, 1), "logp_behaviour": np.roll(each, 4, 1),
              "advantage": np.full((4, 7), 2 * sign), "mask": np.ones((4, 7))}
    with reference.float64(False):
        loss, gradient, _ = run(name, arrays)
    assert np.isfinite(loss) and np.isfinite(gradient).all()
    assert gradient.any() or name == "gspo"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_learn_from_is_0(name):
    arrays = changed(reference.batch(8), mask=np.zeros((4, 7), bool))
    loss, gradient, metrics = run(name, arrays)
    assert loss == 0 and not gradient.any() and np.isnan(metrics["ppo_kl"])


def test_dual_clip_bounds_the_cost_of_a_token():
    arrays = tails()
    arrays["logp"][:2, :3] = -2 + np.log([[0.5, 1.1, 7.0], [0.5, 1.1, 7.0]])
    expected = (-(0.5 + 1.1 + 1.28) + (0.8 + 1.1 + 3.0)) / 6
    assert run("ppo", arrays, dual_clip=3.0)[0] == pytest.approx(expected)
    assert run("ppo", arrays)[0] == pytest.approx(expected + 4 / 6)
    assert run("ppo", arrays, dual_clip=3.0)[1][1, 2] == 0 != run("ppo", arrays)[1][1, 2]


@pytest.mark.parametrize("name, hyper, message", [
    ("grpo", {"clip_low": -0.1}, "clip_low: expected 0 or more, found -0.1"),
    ("dapo", {"clip_high": np.nan}, "clip_high: expected 0 or more, found nan"),
    ("icepop", {"beta": 0.5}, "beta: expected at least 1, found 0.5"),
    ("distillation", {"beta": 0.99}, "beta: expected at least 1, found 0.99"),
    ("double_sided_is", {"clip_low": -0.1}, "clip_low: expected 0 or more, found -0.1"),
    ("double_sided_is", {"clip_low": 0.0, "clip_high": 0.0}, "band: expected low < high, found 1.0 and 1.0"),
    ("cispo", {"upper": 0.5, "lower": 0.5}, "upper: expected more than lower, which is 0.5, found 0.5"),
    ("tis", {"upper": -1.0}, "upper: expected more than lower, which is 0.0, found -1.0"),
    ("ppo", {"dual_clip": 1.0}, "dual_clip: expected more than 1, found 1.0"),
    ("gspo", {"aggregation": "mean"}, "aggregation: expected one of .* found 'mean'"),
])
def test_hyperparameters_out_of_range(name, hyper, message):
    with pytest.raises(ValueError, match=message):
        run(name, reference.batch(0), **hyper)


def test_an_algorithm_is_its_specification():
    arrays = reference.batch(9)
    spec = compose.Spec(compose.clipped(0.2, 0.28), weight=compose.band(0.5, 2.0))
    logp = arrays.pop("logp")
    assert float(compose.loss(spec, logp, **arrays)[0]) == pytest.approx(float(losses.icepop(logp, **arrays)[0]))
