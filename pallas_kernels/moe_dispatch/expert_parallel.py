"""Experts spread over devices: rows travel to their expert's device and back, in as many rounds as it takes.

X devices along the mesh axis, L = E / X experts on each, N tokens of this device, A experts per token, C slots from
each device to each other per round, D width.

In a round every device sends every other at most C rows, whatever their experts. Where a pair has more, another round
follows, for all devices alike: buffers are of a fixed size and no row is lost. The gradient goes through the same
rounds anew, so that memory is that of one round.
"""

import functools
from typing import Any, Callable, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.arguments import Argument, check
from pallas_kernels.moe_dispatch.permute import Permutation, combine, dispatch, sort_by_expert
from pallas_kernels.moe_dispatch.shards import axes_of, vary, zeros

Experts = Callable[[Any, jax.Array, jax.Array], jax.Array]
EXCHANGES = ("ragged", "padded")


class Plan(NamedTuple):
    """Where every choice goes: its row among this device's sorted choices, and every pair's share of the rows."""

    rows_NA: jax.Array    # int32, -1 for a choice of no expert
    token_R: jax.Array    # int32
    counts_XL: jax.Array  # int32, the rows for each expert of each device


class Way(NamedTuple):
    """The static side of a round."""

    experts: Experts
    axis_name: str
    slots: int
    exchange: str | None


def expert_parallel(experts: Experts, params: Any, x_ND: jax.Array, experts_NA: jax.Array, weights_NA: jax.Array, *,
                    axis_name: str, slack: float = 2.0, exchange: str | None = None) -> jax.Array:
    """sum over a of weights[n,a] * experts(x[n]) of expert experts_NA[n,a], [N, D]; inside `shard_map`, per device.

    experts(params, rows_RD, group_sizes_L) -> [R, D]: what this device's experts make of rows sorted by expert, such as
    products by `grouped_matmul`; rows beyond the groups are zero and their results ignored. All arrays it needs are in
    `params`, a tree of floating arrays whose first axis is this device's L experts. Differentiable in params, x and
    the weights.

    x_ND: this device's tokens. experts_NA: integer, over all L * X experts; any other value is a choice of no expert.
    `slack`: slots per pair of devices and round, relative to what evenly spread choices need; more rounds follow where
    that is not enough. `exchange`: "ragged" sends the rows alone, "padded" all slots; None is ragged on TPU and GPU,
    and padded elsewhere, where XLA has no ragged exchange.

    Raises ValueError for shapes that do not fit together, a slack that is not positive and an unknown exchange.
    """
    op = "expert_parallel"
    check(op, Argument("x_ND", x_ND, "ND"), Argument("experts_NA", experts_NA, "NA", jnp.integer),
          Argument("weights_NA", weights_NA, "NA"))
    if exchange is not None and exchange not in EXCHANGES:
        raise ValueError(f"{op}: exchange: expected one of {', '.join(EXCHANGES)} or None, found {exchange!r}")
    if not slack > 0:
        raise ValueError(f"{op}: slack: expected more than 0, found {slack}")
    local = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(params)}
    if len(local) != 1 or 0 in local:
        raise ValueError(f"{op}: params: expected arrays that share their first axis, one entry per expert, found "
                         f"first axes of {sorted(local)}")
    if 0 in experts_NA.shape:
        return jnp.zeros_like(x_ND)

    devices = lax.axis_size(axis_name)
    axes = axes_of(x_ND, experts_NA, weights_NA, *jax.tree.leaves(params))
    params, x_ND, experts_NA, weights_NA = jax.tree.map(functools.partial(vary, axes),
                                                        (params, x_ND, experts_NA, weights_NA))
    permutation, counts = sort_by_expert(experts_NA, devices * local.pop())
    plan = Plan(*permutation, counts.reshape(devices, -1))
    slots = min(-(-int(slack * experts_NA.size) // devices) + 7 & ~7, experts_NA.size)
    # One number of rounds for all: every device takes part in every exchange.
    rounds = -(-lax.pmax(plan.counts_XL.sum(1).max(), tuple(axes | {axis_name})) // slots)
    way = Way(experts, axis_name, slots, exchange)
    return _rounds(way, params, x_ND, weights_NA, plan, rounds)


def _round(way: Way, number: jax.Array | int, params: Any, x_ND: jax.Array, weights_NA: jax.Array, plan: Plan
           ) -> jax.Array:
    """What the choices that travel in one round add to the tokens, [N, D]."""
    slots, (devices, local) = way.slots, plan.counts_XL.shape
    ends_X = jnp.cumsum(plan.counts_XL.sum(1))
    starts_X = ends_X - plan.counts_XL.sum(1)

    # Slot s of pair d holds row starts[d] + number * C + s, where the pair has that many.
    row_XC = (starts_X + number * slots)[:, None] + jnp.arange(slots)
    token_XC = jnp.where(row_XC < ends_X[:, None], plan.token_R[jnp.minimum(row_XC, plan.token_R.shape[0] - 1)], -1)
    pair_NA = jnp.searchsorted(ends_X, plan.rows_NA, side="right", method="compare_all")
    nth_NA = plan.rows_NA - starts_X[jnp.minimum(pair_NA, devices - 1)]
    slot_NA = jnp.where((plan.rows_NA >= 0) & (nth_NA // slots == number), pair_NA * slots + nth_NA % slots, -1)
    there = Permutation(slot_NA.astype(jnp.int32), token_XC.reshape(-1))

    # Within a pair rows are sorted by expert: how many of each expert a round holds follows from the counts.
    upto_XL = jnp.clip(jnp.cumsum(plan.counts_XL, 1) - number * slots, 0, slots)
    sent_XL = jnp.diff(upto_XL, axis=1, prepend=0)
    received_XL = lax.all_to_all(sent_XL, way.axis_name, 0, 0, tiled=True)
    send = functools.partial(_exchange, way)
    rows = send(dispatch(x_ND, there), sent_XL.sum(1), received_XL.sum(1))

    expert_XC = (jnp.arange(slots)[:, None] >= jnp.cumsum(received_XL, 1)[:, None]).sum(-1)
    here, group_sizes_L = sort_by_expert(expert_XC.reshape(-1, 1), local)
    y = way.experts(params, dispatch(rows, here), group_sizes_L)
    y = combine(y, here, jnp.ones_like(here.rows_NA, dtype=y.dtype))
    return combine(send(y, received_XL.sum(1), sent_XL.sum(1)), there, weights_NA)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounds(way: Way, params: Any, x_ND: jax.Array, weights_NA: jax.Array, plan: Plan, rounds: jax.Array) -> jax.Array:
    """The sum of all rounds; the first is no part of the loop, because mostly it is the only one."""
    add = lambda number, total: total + _round(way, number, params, x_ND, weights_NA, plan)
    return lax.fori_loop(1, rounds, add, _round(way, 0, params, x_ND, weights_NA, plan))


def _rounds_forward(way: Way, *args: Any) -> tuple[jax.Array, Any]:
    return _rounds(way, *args), args


def _rounds_backward(way: Way, saved: Any, dout_ND: jax.Array) -> tuple[Any, ...]:
    params, x_ND, weights_NA, plan, rounds = saved

    def gradient(number: jax.Array | int) -> tuple[Any, ...]:
        one = lambda params, x_ND, weights_NA: _round(way, number, params, x_ND, weights_NA, plan)
        return jax.vjp(one, params, x_ND, weights_NA)[1](dout_ND)

    add = lambda number, total: jax.tree.map(jnp.add, total, gradient(number))
    return *lax.fori_loop(1, rounds, add, gradient(0)), None, None


_rounds.defvjp(_rounds_forward, _rounds_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange(way: Way, rows: jax.Array, sent_X: jax.Array, received_X: jax.Array) -> jax.Array:
    """Swaps slots [X * C, D] with every device: from slot d * C on lies what came from device d, then zeros."""
    starts_X = jnp.arange(len(sent_X), dtype=jnp.int32) * way.slots

    def ragged(rows: jax.Array, sent_X: jax.Array, received_X: jax.Array) -> jax.Array:
        there_X = jnp.full_like(sent_X, way.slots) * lax.axis_index(way.axis_name)
        here_X = vary(axes_of(sent_X), starts_X)
        return lax.ragged_all_to_all(rows, zeros(rows.shape, rows.dtype, rows), here_X, sent_X, there_X, received_X,
                                     axis_name=way.axis_name)

    def padded(rows: jax.Array, sent_X: jax.Array, received_X: jax.Array) -> jax.Array:
        return lax.all_to_all(rows, way.axis_name, 0, 0, tiled=True)

    if way.exchange is not None:
        return {"ragged": ragged, "padded": padded}[way.exchange](rows, sent_X, received_X)
    return lax.platform_dependent(rows, sent_X, received_X, default=padded, tpu=ragged, cuda=ragged)


def _exchange_forward(way: Way, rows: jax.Array, sent_X: jax.Array, received_X: jax.Array) -> tuple[jax.Array, Any]:
    return _exchange(way, rows, sent_X, received_X), (sent_X, received_X)


def _exchange_backward(way: Way, saved: Any, drows: jax.Array) -> tuple[jax.Array, None, None]:
    sent_X, received_X = saved
    return _exchange(way, drows, received_X, sent_X), None, None


_exchange.defvjp(_exchange_forward, _exchange_backward)
