"""Experts spread over eight fake devices equal all experts on one, whatever the load, and no row is lost."""

import functools

import jax
from jax.sharding import Mesh, PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.moe_dispatch.api import grouped_matmul
from pallas_kernels.moe_dispatch.expert_parallel import expert_parallel
from tests.kernels.harness import assert_close

TOKENS, ACTIVE, EXPERTS, WIDTH = 256, 2, 16, 8


def feed_forward(params, rows, sizes):
    return grouped_matmul(jnp.tanh(grouped_matmul(rows, params["up"], sizes)), params["down"], sizes)


def by_every_expert(params, x, weights, chosen):
    """Every token through every expert; a choice of none weighs nothing."""
    hidden = jnp.tanh(jnp.einsum("nd,edf->nef", x, params["up"], precision="highest"))
    y = jnp.einsum("nef,efd->ned", hidden, params["down"], precision="highest")
    return jnp.einsum("na,nae,ned->nd", weights, jax.nn.one_hot(chosen, EXPERTS), y, precision="highest")


def inputs():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    params = {"up": normal(EXPERTS, WIDTH, 12), "down": normal(EXPERTS, 12, WIDTH)}
    return params, normal(TOKENS, WIDTH), normal(TOKENS, ACTIVE)


def loads():
    rng = np.random.default_rng(1)
    spread = np.stack([rng.permutation(EXPERTS)[:ACTIVE] for _ in range(TOKENS)])
    one = np.full_like(spread, 11)
    skewed = np.where(rng.random(spread.shape) < 0.8, 3, spread)
    padded = spread.copy()
    padded[5:17], padded[20, 1] = -1, EXPERTS
    # Whole devices have nothing to send.
    last = np.where(np.arange(TOKENS)[:, None] < TOKENS - 4, -1, spread)
    return {"spread": spread, "one expert with everything": one, "skewed": skewed, "padding": padded,
            "the last tokens alone": last, "no tokens": np.full_like(spread, -1)}


@functools.cache
def program(mixture, mesh, **options):
    """Value and gradients in params, tokens and weights, compiled once for all loads."""
    if mesh is not None:
        tokens = P(tuple(mesh.axis_names))
        mixture = jax.shard_map(
            lambda params, x, weights, chosen: expert_parallel(feed_forward, params, x, chosen, weights,
                                                               axis_name="expert", **options),
            mesh=mesh, in_specs=(P("expert"), tokens, tokens, tokens), out_specs=tokens)

    @jax.jit
    def run(params, x, weights, chosen, ct):
        out, pull = jax.vjp(lambda *floats: mixture(*floats, chosen), params, x, weights)
        return out, pull(ct)
    return run


def mesh_of(data, expert):
    return Mesh(np.array(jax.devices()).reshape(data, expert), ("data", "expert"))


@pytest.mark.parametrize("mesh, slack", [((1, 8), 1.0), ((2, 4), 2.0)], ids=["expert-8", "data-2-expert-4"])
@pytest.mark.parametrize("load", loads(), ids=lambda name: name.replace(" ", "-"))
def test_eight_devices_equal_one(load, mesh, slack):
    """With `data`, gradients of the experts' parameters are summed over it.

    Every device has 64 choices. With a slack of 1 it has 8 slots for each of eight, so that one expert with everything
    takes eight rounds; with 2 it has 32 for each of four, which is two.
    """
    params, x, weights = inputs()
    chosen, ct = jnp.asarray(loads()[load], jnp.int32), jnp.asarray(np.random.default_rng(2).standard_normal(x.shape))
    wanted = program(by_every_expert, None)(params, x, weights, chosen, ct)
    found = program(expert_parallel, mesh_of(*mesh), slack=slack)(params, x, weights, chosen, ct)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(one, np.asarray(other))


def test_the_ragged_exchange_where_the_platform_has_one():
    """On a CPU the same program holds the padded one, because XLA has no other there."""
    params, x, weights = inputs()
    chosen, ct = jnp.asarray(loads()["spread"], jnp.int32), jnp.zeros_like(x)
    traced = program(expert_parallel, mesh_of(1, 8), slack=1.0).trace(params, x, weights, chosen, ct)
    ragged = lambda platform: "ragged_all_to_all" in traced.lower(lowering_platforms=(platform,)).as_text()
    assert ragged("tpu") and not ragged("cpu")


@pytest.mark.parametrize("wrong, message", [
    (dict(exchange="ring"), "exchange: expected one of ragged, padded or None, found 'ring'"),
    (dict(slack=0.0), "slack: expected more than 0, found 0.0"),
    (dict(params={"up": jnp.zeros((4, 2)), "down": jnp.zeros((3, 2))}), r"params: .* found first axes of \[3, 4\]"),
    (dict(weights_NA=jnp.zeros((4, 3))), r"weights_NA: expected shape \[N, A\] = \[4, 2\], found \[4, 3\]"),
], ids=["exchange", "slack", "params", "weights"])
def test_wrong_arguments(wrong, message):
    right = dict(experts=feed_forward, params={"up": jnp.zeros((4, 2))}, x_ND=jnp.zeros((4, 2)),
                 experts_NA=jnp.zeros((4, 2), jnp.int32), weights_NA=jnp.zeros((4, 2)), axis_name="expert")
    with pytest.raises(ValueError, match=message):
        expert_parallel(**right | wrong)
