"""One layer: x += attention(norm(x)), then x += feed-forward(norm(x)), over a view of the keys and who sees them.

B batch, T query positions, S key positions, D model width, R latent rank, K keys selected.
"""

from typing import Any, Callable, Literal, NamedTuple

from flax import struct
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from glm5_jax.core.mesh import constrain
from glm5_jax.core.metrics import Mean
from glm5_jax.model import dsa, mla, moe
from glm5_jax.model.cache import put_layer
from glm5_jax.model.config import LayerKind, ModelConfig
from glm5_jax.model.primitives import Params, mlp, mlp_specs, norm_scale, rms_norm
import pallas_kernels
from pallas_kernels.blocks import over_queries
from pallas_kernels.lightning_indexer.reference import visible

COLLECTABLE = ("hidden", "index_scores", "selected", "router")


class Request(NamedTuple):
    """How a forward pass attends, and what is asked of it besides its result."""

    attention: Literal["dense", "sparse"] = "sparse"
    indexer_loss: Literal["dense", "sparse"] | None = None
    collect: tuple[str, ...] = ()

    @property
    def selects(self) -> bool:
        """Whether the pass needs what the indexer selects; dense attention alone does not."""
        return self.attention == "sparse" or bool(self.indexer_loss) or bool({"index_scores", "selected"}
                                                                             & set(self.collect))


class View(struct.PyTreeNode):
    """The queries, the keys they may see, and where a cache keeps the new ones. Segment 0 is padding."""

    positions_BT: jax.Array
    segment_ids_BT: jax.Array
    key_positions_BS: jax.Array
    key_segment_ids_BS: jax.Array
    rope: jax.Array
    slots_BT: jax.Array | None = None  # None: the keys are the queries' own tokens


class Flow(struct.PyTreeNode):
    """What passes from layer to layer: the residual stream, the selection that shared layers reuse, the cache."""

    x_BTD: jax.Array
    selected_BTK: jax.Array
    index_nan: jax.Array
    index: dsa.IndexInputs | None = None  # kept only for the indexer's loss
    latents_LBSR: jax.Array | None = None
    index_keys_NBSC: jax.Array | None = None


def specs(config: ModelConfig, kind: LayerKind) -> Params:
    """Specs of one layer of the given kind."""
    tree = {
        "input_norm": norm_scale(config, config.hidden_size),
        "attention": mla.specs(config),
        "post_attention_norm": norm_scale(config, config.hidden_size),
    }
    if kind.indexer == "full":
        tree["indexer"] = dsa.specs(config)
    if kind.mlp == "sparse":
        return tree | {"moe": moe.specs(config)}
    return tree | {"mlp": mlp_specs(config, config.intermediate_size)}


def begin(config: ModelConfig, x_BTD: jax.Array, keys: int, request: Request, latents: jax.Array | None = None,
          index_keys: jax.Array | None = None) -> Flow:
    """The flow before the first layer: nothing selected, nothing indexed."""
    batch, length = x_BTD.shape[:2]
    channels, heads = config.index_head_dim, config.index_n_heads
    index = None
    if request.indexer_loss:
        index = dsa.IndexInputs(jnp.zeros((batch, length, heads, channels), x_BTD.dtype),
                                jnp.zeros((batch, keys, channels), x_BTD.dtype),
                                jnp.zeros((batch, length, heads), jnp.float32))
    selected = jnp.full((batch, length, min(config.index_topk, keys)), -1, jnp.int32)
    return Flow(x_BTD, selected, jnp.zeros((), jnp.int32), index, latents, index_keys)


def apply(params: Params, config: ModelConfig, kind: LayerKind, flow: Flow, view: View, layer: jax.Array,
          indexer: jax.Array, request: Request) -> tuple[Flow, dict[str, Any]]:
    """One layer. `layer` and `indexer` say which rows of the cache are its own.

    Returns the flow and what the layer reports: router statistics, collected arrays and the indexer's loss.
    """
    report: dict[str, Any] = {"hidden": flow.x_BTD} if "hidden" in request.collect else {}
    with jax.named_scope("attention"):
        u_BTD = rms_norm(flow.x_BTD, params["input_norm"], config.rms_norm_eps)
        q_latent = mla.query_latent(params["attention"], config, u_BTD)
        rows_BSR, flow = _remember(flow, "latents_LBSR", layer, view,
                                   mla.latent_rows(params["attention"], config, u_BTD, view.rope))
        index = flow.index
        if kind.indexer == "full" and (request.selects or view.slots_BT is not None):
            with jax.named_scope("indexer"):
                index = dsa.index_inputs(params["indexer"], config, u_BTD, q_latent, view.rope)
                keys_BSC, flow = _remember(flow, "index_keys_NBSC", indexer, view, index.keys_BSC)
                index = index.replace(keys_BSC=keys_BSC)
                if request.selects:
                    flow = _select(config, flow, index, view)
                if request.indexer_loss:
                    flow = flow.replace(index=index)
                if "index_scores" in request.collect:
                    report["index_scores"] = pallas_kernels.index_scores(
                        index.queries_BTIC, index.keys_BSC, index.weights_BTI, scale=1.0,
                        **_sight(view, view.positions_BT, view.segment_ids_BT), **config.kernel_options)
        q_BTHC = mla.queries(params["attention"], config, q_latent, view.rope)
        mixed, kl_BT = _attend(params["attention"], config, q_BTHC, rows_BSR, flow, view, request)
        x_BTD = flow.x_BTD + mla.output(params["attention"], mixed)
        x_BTD = constrain(x_BTD, "batch", "time", "act_embed", rules=config.sharding)
    if "selected" in request.collect:
        missing = config.index_topk - flow.selected_BTK.shape[-1]
        report["selected"] = jnp.pad(flow.selected_BTK, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
    if kl_BT is not None:
        report["indexer_kl"] = Mean.of(kl_BT, view.segment_ids_BT != 0)

    with jax.named_scope("feed_forward"):
        u_BTD = rms_norm(x_BTD, params["post_attention_norm"], config.rms_norm_eps)
        if kind.mlp == "sparse":
            y_BTD, report["stats"], routing = moe.moe(params["moe"], config, u_BTD, view.segment_ids_BT != 0)
            if "router" in request.collect:
                report["router"] = {"experts": routing.experts_NA, "weights": routing.weights_NA}
        else:
            y_BTD = mlp(params["mlp"], u_BTD)
        x_BTD = constrain(x_BTD + y_BTD, "batch", "time", "act_embed", rules=config.sharding)
    return flow.replace(x_BTD=x_BTD), report


def rematerialised(fn: Callable[..., Any], config: ModelConfig) -> Callable[..., Any]:
    """`fn` as the body of a scan whose backward pass computes anew what `config.remat` says.

    The choices themselves, selected keys and experts, are always kept: computed twice, a near tie could fall to the
    other side, and the gradient would belong to another selection than the loss.
    """
    if config.remat == "none":
        return fn
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names("selected", "experts")
    if config.remat == "dots":
        policy = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, policy)
    return jax.checkpoint(fn, prevent_cse=False, policy=policy)


def _remember(flow: Flow, name: str, layer: jax.Array, view: View, new_BTC: jax.Array) -> tuple[jax.Array, Flow]:
    """Without a cache the keys are the new rows themselves; with one they are written, and all slots are read."""
    if view.slots_BT is None:
        return new_BTC, flow
    stack = put_layer(getattr(flow, name), layer, view.slots_BT, new_BTC)
    return stack[layer].astype(new_BTC.dtype), flow.replace(**{name: stack})


def _sight(view: View, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> dict[str, Any]:
    """Who sees whom, as the kernels take it."""
    return {"q_positions": positions_BT, "k_positions": view.key_positions_BS,
            "q_segments": segment_ids_BT, "k_segments": view.key_segment_ids_BS}


def _select(config: ModelConfig, flow: Flow, index: dsa.IndexInputs, view: View) -> Flow:
    index = jax.lax.stop_gradient(index)  # a selection has no gradient
    selected = pallas_kernels.select_topk(
        index.queries_BTIC, index.keys_BSC, index.weights_BTI, scale=1.0, top_k=flow.selected_BTK.shape[-1],
        **_sight(view, view.positions_BT, view.segment_ids_BT), **config.kernel_options)
    return flow.replace(selected_BTK=checkpoint_name(selected, "selected"),
                        index_nan=flow.index_nan + _count_nan(config, index, view))


def _count_nan(config: ModelConfig, index: dsa.IndexInputs, view: View) -> jax.Array:
    """The visible pairs whose index query, weight or key is not finite, int32 []."""
    bad_q_BT = ~(jnp.isfinite(index.queries_BTIC).all((2, 3)) & jnp.isfinite(index.weights_BTI).all(2))
    bad_k_BS = ~jnp.isfinite(index.keys_BSC).all(2)

    def pairs() -> jax.Array:
        def block(bad: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
            seen = visible(**_sight(view, positions, segment_ids))
            return (seen & (bad[:, :, None] | bad_k_BS[:, None])).sum(-1, dtype=jnp.int32)

        return over_queries(block, config.query_chunk, bad_q_BT, view.positions_BT, view.segment_ids_BT).sum()

    return jax.lax.cond(bad_q_BT.any() | bad_k_BS.any(), pairs, lambda: jnp.zeros((), jnp.int32))


def _attend(params: Params, config: ModelConfig, q_BTHC: jax.Array, rows_BSR: jax.Array, flow: Flow, view: View,
            request: Request) -> tuple[jax.Array, jax.Array | None]:
    """Attention, [B, T, H, C], and the indexer's KL per query where it is asked for.

    Dense attention is over every visible key. Sparse attention is over the selected ones: masked dense up to
    `dense_attention_max_len` keys; beyond, their latent rows alone are read.
    """
    if request.attention == "dense" or rows_BSR.shape[1] <= config.dense_attention_max_len:
        return _attend_masked(params, config, q_BTHC, rows_BSR, flow, view, request)
    return _attend_selected(params, config, q_BTHC, rows_BSR, flow, view, request)


def _attend_masked(params: Params, config: ModelConfig, q_BTHC: jax.Array, rows_BSR: jax.Array, flow: Flow, view: View,
                   request: Request) -> tuple[jax.Array, jax.Array | None]:
    keys = rows_BSR.shape[1]
    absorbed = mla.prefers_absorbed(config, q_BTHC.shape[1], keys)
    q = mla.absorb_queries(params, config, q_BTHC) if absorbed else q_BTHC
    k, v = (rows_BSR, rows_BSR[..., :config.kv_lora_rank]) if absorbed else mla.expand_rows(params, config, rows_BSR)

    index = _index_of_loss(flow, request)

    def block(q: jax.Array, selected: jax.Array, positions: jax.Array, segment_ids: jax.Array,
              *scoring: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        sight = _sight(view, positions, segment_ids)
        mask = visible(**sight) if request.attention == "dense" else dsa.selection_mask(selected, keys)
        out, p_BHTS = mla.attend_dense(q, k, v, mask, config.qk_head_dim ** -0.5)
        if index is None:
            return out, None
        index_q, index_w = scoring
        scores = pallas_kernels.index_scores(index_q, index.keys_BSC, index_w, scale=1.0, **sight,
                                             **config.kernel_options)
        return out, dsa.kl_rows(p_BHTS.mean(1), scores, mask)

    mixed, kl_BT = over_queries(block, config.query_chunk, q, flow.selected_BTK, view.positions_BT, view.segment_ids_BT,
                                *((index.queries_BTIC, index.weights_BTI) if index else ()))
    return (mla.values_from_latent(params, mixed) if absorbed else mixed), kl_BT


def _attend_selected(params: Params, config: ModelConfig, q_BTHC: jax.Array, rows_BSR: jax.Array, flow: Flow,
                     view: View, request: Request) -> tuple[jax.Array, jax.Array | None]:
    scale = config.qk_head_dim ** -0.5
    q_BTHR = mla.absorb_queries(params, config, q_BTHC)
    mixed, lse_BTH = pallas_kernels.sparse_mla(
        q_BTHR, rows_BSR, flow.selected_BTK, scale=scale, value_dim=config.kv_lora_rank, return_lse=True,
        **config.kernel_options)
    out, index = mla.values_from_latent(params, mixed), _index_of_loss(flow, request)
    if index is None:
        return out, None

    def block(q: jax.Array, lse: jax.Array, selected: jax.Array, index_q: jax.Array, index_w: jax.Array) -> jax.Array:
        p_BTHK = mla.probabilities(q, dsa.gather_rows(rows_BSR, selected), selected >= 0, lse, scale)
        scores = dsa.index_scores_at(index_q, dsa.gather_rows(index.keys_BSC, selected), index_w)
        return dsa.kl_rows(p_BTHK.mean(2), scores, selected >= 0)

    # The attention is the target here, not what learns.
    q_BTHR, rows_BSR, lse_BTH = jax.lax.stop_gradient((q_BTHR, rows_BSR, lse_BTH))
    return out, over_queries(block, config.query_chunk, q_BTHR, lse_BTH, flow.selected_BTK, index.queries_BTIC,
                             index.weights_BTI)


def _index_of_loss(flow: Flow, request: Request) -> dsa.IndexInputs | None:
    """What the indexer's loss is made of, where it is asked for."""
    return flow.index if request.indexer_loss else None
