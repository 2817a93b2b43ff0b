"""Mixture of experts: a sigmoid router whose correction bias selects but never weighs, a shared expert, and its load.

B batch, T positions, N = B*T tokens, D model width, F expert width, E experts, A active experts per token.
"""

import functools
import math

from flax import struct
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from glm5_jax.core.mesh import spec
from glm5_jax.core.metrics import Mean
from glm5_jax.core.params import ParamSpec, with_tags
from glm5_jax.model.config import ModelConfig
from glm5_jax.model.primitives import Params, matrix, mlp, mlp_specs
from pallas_kernels.moe_dispatch import api, permute
from pallas_kernels.moe_dispatch.expert_parallel import expert_parallel


@struct.dataclass
class Routing:
    """Which experts a token visits, in order of preference, with which weight, and every expert's own score."""

    experts_NA: jax.Array  # int32
    weights_NA: jax.Array  # float32
    scores_NE: jax.Array   # float32, sigmoid


@struct.dataclass
class RouterStats:
    """`load_E` counts the tokens of each expert; `balance` is the sequence-level auxiliary loss, over sequences."""

    load_E: jax.Array  # int32
    balance: Mean

    @property
    def balance_loss(self) -> jax.Array:
        """The mean over sequences, float32 []; 0 where there are none."""
        return self.balance.total / jnp.maximum(self.balance.count, 1)


def specs(config: ModelConfig) -> Params:
    """Specs of one mixture: router, correction bias, routed experts, shared expert."""
    d, f, e = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    return {
        "router": matrix(config, (d, e), ("embed", None), "router"),
        "router_bias": ParamSpec((e,), (None,), "float32", "zeros", tags=frozenset({"router_bias"})),
        "experts": with_tags({
            "gate": matrix(config, (e, d, f), ("experts", "embed", "expert_mlp")),
            "up": matrix(config, (e, d, f), ("experts", "embed", "expert_mlp")),
            "down": matrix(config, (e, f, d), ("experts", "expert_mlp", "embed")),
        }, "expert"),
        "shared": mlp_specs(config, f * config.n_shared_experts),
    }


def route(params: Params, config: ModelConfig, x_ND: jax.Array) -> Routing:
    """Chooses A experts per token. The gradient reaches the router through the scores of the chosen alone."""
    logits = jnp.einsum("nd,de->ne", x_ND.astype(jnp.float32), params["router"].astype(jnp.float32),
                        precision=lax.Precision.HIGHEST)
    scores_NE = jax.nn.sigmoid(logits)
    choice_NE = lax.stop_gradient(scores_NE + params["router_bias"])
    if config.n_group > 1:
        choice_NE = _limit_groups(choice_NE, config.n_group, config.topk_group)
    experts_NA = checkpoint_name(lax.top_k(choice_NE, config.num_experts_per_tok)[1], "experts")
    weights_NA = jnp.take_along_axis(scores_NE, experts_NA, -1)
    if config.norm_topk_prob:
        weights_NA = weights_NA / (weights_NA.sum(-1, keepdims=True) + 1e-20)
    return Routing(experts_NA, weights_NA * config.routed_scaling_factor, scores_NE)


def _limit_groups(choice_NE: jax.Array, groups: int, keep: int) -> jax.Array:
    """-inf outside the `keep` groups with the largest sum of their two best choices."""
    grouped = choice_NE.reshape(len(choice_NE), groups, -1)
    best = lax.top_k(lax.top_k(grouped, 2)[0].sum(-1), keep)[1]
    kept = jax.nn.one_hot(best, groups, dtype=bool).any(1)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice_NE.shape)


def apply_experts(params: Params, config: ModelConfig, routing: Routing, x_BTD: jax.Array) -> jax.Array:
    """sum over the chosen experts of weight * (silu(x Wg) * x Wu) Wd, [B, T, D]; no choice is dropped but those of -1.

    Where the ambient mesh splits the experts, tokens travel to them (`pallas_kernels.expert_parallel`). Raises
    ValueError where several of its axes do.
    """
    if (axis := _expert_axis(config)) is not None:
        return _travel(params, config, routing, x_BTD, axis)
    permutation, sizes_E = permute.sort_by_expert(routing.experts_NA, params["gate"].shape[0])
    rows = permute.dispatch(x_BTD.reshape(-1, x_BTD.shape[-1]), permutation)
    y = _experts(config, params, rows, sizes_E)
    return permute.combine(y, permutation, routing.weights_NA).reshape(x_BTD.shape)


def _experts(config: ModelConfig, params: Params, rows_RD: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """What the experts make of rows sorted by expert, [R, D]."""
    def product(y: jax.Array, name: str) -> jax.Array:
        return api.grouped_matmul(y, params[name].astype(y.dtype), sizes_E, **config.kernel_options)

    return product(jax.nn.silu(product(rows_RD, "gate")) * product(rows_RD, "up"), "down")


def _expert_axis(config: ModelConfig) -> str | None:
    """The mesh axis that splits the experts, if there is one and it is not a `shard_map`'s already."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    types = dict(zip(mesh.axis_names, mesh.axis_types))
    axes = [axis for axis in _axes(config, "experts") if mesh.shape[axis] > 1 and types[axis] != AxisType.Manual]
    if len(axes) > 1:
        raise ValueError(f"ShardingRules.experts: expected one mesh axis, since tokens travel to their experts along "
                         f"one, found {' x '.join(axes)}; name one of them, and give ShardingRules.expert_mlp the rest")
    return axes[0] if axes else None


def _axes(config: ModelConfig, name: str) -> tuple[str, ...]:
    """The mesh axes that split a logical dimension, major first."""
    axes = spec(config.sharding, (name,))[0]
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def _travel(params: Params, config: ModelConfig, routing: Routing, x_BTD: jax.Array, axis: str) -> jax.Array:
    """`apply_experts` with tokens split over the experts' axis too, so that each travels once: over it, positions of
    a row are split where rows are not.

    Where they do not divide, positions that choose no expert fill up. Raises ValueError where an axis that splits
    tokens splits the experts' width too.
    """
    mesh, (batch, length) = jax.sharding.get_abstract_mesh(), x_BTD.shape[:2]
    rows, time = _axes(config, "batch"), _axes(config, "time")
    time += () if axis in rows + time else (axis,)
    tokens, columns = PartitionSpec(rows, time, None), _axes(config, "expert_mlp")
    if both := [name for name in columns if name in rows + time and mesh.shape[name] > 1]:
        raise ValueError(f"ShardingRules.expert_mlp: expected mesh axes that split no tokens, since the products of "
                         f"its parts are added up over devices, found {both[0]!r}; name another, or None")
    fill = -length % math.prod(mesh.shape[name] for name in time)
    filled = lambda y_BTX, value: jnp.pad(y_BTX, ((0, 0), (0, fill), (0, 0)), constant_values=value)
    wide = PartitionSpec(axis, None, columns)
    weights = {"gate": wide, "up": wide, "down": PartitionSpec(axis, columns, None)}

    def here(params: Params, *arrays: jax.Array) -> jax.Array:
        x_ND, experts_NA, weights_NA = (y.reshape(-1, y.shape[-1]) for y in arrays)
        y_ND = expert_parallel(functools.partial(_experts, config), params, x_ND, experts_NA, weights_NA,
                               axis_name=axis)
        if columns:  # every device has some columns of its experts
            y_ND = lax.psum(y_ND.astype(jnp.float32), columns).astype(y_ND.dtype)
        return y_ND.reshape(arrays[0].shape)

    choices = (y.reshape(batch, length, -1) for y in (routing.experts_NA, routing.weights_NA))
    arrays = (x_BTD, *choices)
    if fill:
        # jax 0.7 splits positions that are being filled up in the wrong places: they are whole until they are full.
        arrays = tuple(lax.with_sharding_constraint(filled(y, value), PartitionSpec(rows, None, None))
                       for y, value in zip(arrays, (0, -1, 0)))
    y_BTD = jax.shard_map(here, in_specs=(weights, tokens, tokens, tokens), out_specs=tokens)(params, *arrays)
    return y_BTD[:, :length]


def router_stats(config: ModelConfig, routing: Routing, valid_BT: jax.Array) -> RouterStats:
    """Load and balance loss over the valid tokens.

    Per sequence: sum over e of f_e P_e, f_e = E / (A T) * (tokens of e), P_e = mean over t of s_e / sum s.
    DeepSeek-V3 report, equations 17 to 20.
    """
    (rows, length), experts = valid_BT.shape, config.n_routed_experts
    valid = valid_BT.astype(jnp.float32)
    chosen_NE = jax.nn.one_hot(routing.experts_NA, experts, dtype=jnp.float32).sum(1)
    chosen_BTE = chosen_NE.reshape(rows, length, experts) * valid[..., None]
    share_BTE = (routing.scores_NE / routing.scores_NE.sum(-1, keepdims=True)).reshape(rows, length, experts)
    count_B1 = jnp.maximum(valid.sum(1, keepdims=True), 1)
    load_BE = chosen_BTE.sum(1)
    frequency_BE = load_BE * experts / (config.num_experts_per_tok * count_B1)
    share_BE = (share_BTE * valid[..., None]).sum(1) / count_B1
    balance = Mean.of((frequency_BE * share_BE).sum(-1), valid_BT.any(1))
    return RouterStats(load_BE.sum(0).astype(jnp.int32), balance)


def moe(params: Params, config: ModelConfig, x_BTD: jax.Array, valid_BT: jax.Array
        ) -> tuple[jax.Array, RouterStats, Routing]:
    """Routed experts plus the shared expert, with the statistics of the routing; padding visits no routed expert."""
    routing = route(params, config, x_BTD.reshape(-1, x_BTD.shape[-1]))
    visited_NA = jnp.where(valid_BT.reshape(-1, 1), routing.experts_NA, -1)
    visits = Routing(visited_NA, routing.weights_NA, routing.scores_NE)
    y_BTD = apply_experts(params["experts"], config, visits, x_BTD) + mlp(params["shared"], x_BTD)
    return y_BTD, router_stats(config, routing, valid_BT), routing


def updated_bias(bias_E: jax.Array, load_E: jax.Array, rate: float | jax.Array) -> jax.Array:
    """The loss-free balancing rule: raises the bias of experts below the mean load, lowers it above."""
    load = load_E.astype(jnp.float32)
    return bias_E + rate * jnp.sign(load.mean(-1, keepdims=True) - load)
