"""Routing by brute force, experts one token at a time, statistics by hand."""

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.model import moe
from tests.model import reference
from tests.model.reference import MICRO

N, D, E = 11, MICRO.hidden_size, 6
CONFIG = MICRO.replace(n_routed_experts=E, num_experts_per_tok=2)
GROUPED = CONFIG.replace(n_group=3, topk_group=2)


def make(seed: int = 0, bias: float = 1.0):
    """(parameters of one mixture, tokens [N, D])."""
    rng = np.random.default_rng(seed)
    draw = lambda spec: (0.5 * rng.normal(size=spec.shape)).astype(np.float32)
    params = jax.tree.map(draw, moe.specs(CONFIG), is_leaf=lambda x: hasattr(x, "axes"))
    return params | {"router_bias": bias * params["router_bias"]}, rng.normal(size=(N, D)).astype(np.float32)


def sigmoid_scores(params, x):
    return 1 / (1 + np.exp(-x.astype(np.float64) @ params["router"]))


@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["plain", "groups"])
@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), bias=st.sampled_from([0.0, 0.5, -6.0]))
def test_routing(config, seed, bias):
    """With a bias around -3 every choice is negative: an excluded group must still not win."""
    params, x = make(seed)
    params["router_bias"] = params["router_bias"] * (bias or 0) - (3.0 if bias < 0 else 0.0)
    routing = moe.route(params, config, x)
    scores = sigmoid_scores(params, x)
    for n in range(N):
        experts = reference.route(scores[n] + params["router_bias"], config.num_experts_per_tok, config.n_group,
                                  config.topk_group)
        np.testing.assert_array_equal(routing.experts_NA[n], experts)
        weights = scores[n, experts]
        np.testing.assert_allclose(routing.weights_NA[n], 2.5 * weights / weights.sum(), rtol=1e-5)


def test_correction_bias_selects_and_never_weighs():
    params, x = make(bias=0.0)
    pushed = params | {"router_bias": np.float32([0, 0, 0, 0, 9, 9])}
    routing = moe.route(pushed, CONFIG, x)
    assert set(np.unique(routing.experts_NA)) == {4, 5}
    mine = np.take_along_axis(sigmoid_scores(params, x), np.asarray(routing.experts_NA), -1)
    np.testing.assert_allclose(routing.weights_NA, 2.5 * mine / mine.sum(-1, keepdims=True), rtol=1e-5)
    gradient = jax.grad(lambda bias: (moe.route(params | {"router_bias": bias}, CONFIG, x).weights_NA ** 2).sum())
    assert not gradient(params["router_bias"]).any()


def test_group_of_negative_choices():
    """Filling excluded groups with 0 instead of -inf would choose expert 4 or 5 here."""
    params, x = make()
    params["router"] = np.zeros_like(params["router"])  # every score is 0.5
    params["router_bias"] = np.float32([-1.0, -1.1, -1.2, -1.3, -9.0, -9.0])
    routing = moe.route(params, GROUPED.replace(num_experts_per_tok=4), x)
    np.testing.assert_array_equal(routing.experts_NA, np.tile([0, 1, 2, 3], (N, 1)))


def test_ties_go_to_the_lowest_expert():
    params, x = make()
    params = params | {"router": np.zeros_like(params["router"]), "router_bias": np.zeros(E, np.float32)}
    np.testing.assert_array_equal(moe.route(params, CONFIG, x).experts_NA, np.tile([0, 1], (N, 1)))


def one_by_one(params, routing, x):
    out = np.zeros_like(x)
    for n, a in np.ndindex(routing.experts_NA.shape):
        gate, up, down = (np.asarray(params[name][int(routing.experts_NA[n, a])]) for name in ("gate", "up", "down"))
        out[n] += routing.weights_NA[n, a] * (reference.silu(x[n] @ gate) * (x[n] @ up)) @ down
    return out


@pytest.mark.parametrize("experts", ["routed", "all to one", "to the last"])
def test_experts_token_by_token(experts):
    params, x = make()
    routing = moe.route(params, CONFIG, x)
    if experts != "routed":
        routing = routing.replace(experts_NA=jnp.full_like(routing.experts_NA, 0 if experts == "all to one" else E - 1))
    out = moe.apply_experts(params["experts"], CONFIG, routing, x[None])[0]
    np.testing.assert_allclose(out, one_by_one(params["experts"], routing, x), rtol=1e-4, atol=1e-5)


def test_padding_visits_no_expert():
    params, x = make()
    valid = np.array([[True] * 4 + [False] * 2 + [True] * 3 + [False] * 2])
    y, stats, routing = moe.moe(params, CONFIG, x[None], valid)
    all_routed = moe.route(params, CONFIG, x)
    shared = reference.silu(x @ params["shared"]["gate"]) * (x @ params["shared"]["up"]) @ params["shared"]["down"]
    routed = one_by_one(params["experts"], all_routed, x)
    np.testing.assert_allclose(y[0], shared + np.where(valid.T, routed, 0), rtol=1e-4, atol=1e-5)
    assert np.abs(routed[~valid[0]]).max() > 0.1
    for found, expected in ((stats, moe.router_stats(CONFIG, all_routed, valid)), (routing, all_routed)):
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert stats.load_E.sum() == 7 * CONFIG.num_experts_per_tok


def test_gradient_reaches_the_router_through_the_weights_alone():
    """The derivative of the mixture with the choice held fixed, written out with dense experts."""
    params, x = make()
    chosen = np.asarray(moe.route(params, CONFIG, x).experts_NA)

    def dense(router, x):
        scores = jnp.take_along_axis(jax.nn.sigmoid(x @ router), chosen, -1)
        weights = 2.5 * scores / scores.sum(-1, keepdims=True)
        e = params["experts"]
        each = jnp.einsum("nef,efd->ned", jax.nn.silu(jnp.einsum("nd,edf->nef", x, e["gate"]))
                          * jnp.einsum("nd,edf->nef", x, e["up"]), e["down"])
        return (jnp.take_along_axis(each, chosen[..., None], 1) * weights[..., None]).sum(1)

    def ours(router, x):
        routing = moe.route(params | {"router": router}, CONFIG, x)
        return moe.apply_experts(params["experts"], CONFIG, routing, x[None])[0]

    weight = np.random.default_rng(5).normal(size=x.shape).astype(np.float32)
    one, two = (jax.jit(jax.grad(lambda r, x: (f(r, x) * weight).sum(), (0, 1)))(params["router"], x)
                for f in (ours, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, two)


def test_load_and_balance_by_hand():
    config = CONFIG.replace(n_routed_experts=2, num_experts_per_tok=1)
    routing = moe.Routing(experts_NA=jnp.array([[0], [0], [1], [1], [1], [1]]), weights_NA=jnp.ones((6, 1)),
                          scores_NE=jnp.array([[.6, .2], [.9, .3], [.5, .5], [.1, .9], [.1, .9], [.1, .9]]))
    valid = np.array([[True, True, False], [True, False, False]])
    stats = moe.router_stats(config, routing, valid)
    np.testing.assert_array_equal(stats.load_E, [2, 1])
    # Sequence 1: f = 2 * (2, 0) / 2, P = (.75, .25); sequence 2: f = 2 * (0, 1), P = (.1, .9).
    np.testing.assert_allclose(stats.balance_loss, (2 * .75 + 2 * .9) / 2, rtol=1e-6)
    empty = moe.router_stats(config, routing, np.zeros((2, 3), bool))
    assert not empty.load_E.any() and empty.balance_loss == 0


def test_bias_moves_towards_the_mean_load():
    bias = np.float32([[0.0, 1.0, -1.0], [0.0, 0.0, 0.0]])
    load = np.int32([[1, 2, 3], [5, 0, 1]])
    np.testing.assert_allclose(moe.updated_bias(bias, load, 0.5), [[0.5, 1.0, -1.5], [-0.5, 0.5, 0.5]])
