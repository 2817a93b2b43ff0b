"""The whole model: one `forward` for training, prefill, chunked prefill and decoding.

A token id becomes an embedding, passes the stacked layers (`stacks.plan`) inside scans, and becomes a logit; the
multi-token-prediction layer continues from the same hidden states.

B batch, T query positions, S key positions, D model width, V vocabulary, K keys selected.
"""

import functools
from typing import Any, Collection, Literal

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from glm5_jax.core import masked, params as core_params
from glm5_jax.core.mesh import constrain
from glm5_jax.core.metrics import Mean
from glm5_jax.model import layer, moe, mtp, stacks
from glm5_jax.model.cache import Cache, put, ranks
from glm5_jax.model.config import ModelConfig
from glm5_jax.model.primitives import Params, norm_scale, rms_norm, rope_table


@struct.dataclass
class Output:
    """What a forward pass gives; fields that were not asked for are None or empty."""

    logits: jax.Array              # float32 [B, T, V]
    hidden: jax.Array              # [B, T, D], after the final norm
    cache: Cache | None
    mtp_logits: jax.Array | None   # float32 [steps, B, T, V]; step k from 1, row t predicts token t+k+1
    mtp_hidden: jax.Array | None   # [steps, B, T, D]
    # expert_load [MoE layers, E], balance_loss; index_nan, int32 []: how many visible pairs of query and key have an
    # index query, weight or key that is not finite, over all indexers that selected, MTP's included. What losses are
    # made of, as sums and counts: balance [MoE layers] over sequences, indexer_kl [layers] over tokens. With MTP, the
    # same of its steps: mtp_*.
    aux: dict[str, Any]
    collected: dict[str, jax.Array]


def param_specs(config: ModelConfig) -> Params:
    """The tree of `ParamSpec` of the model, MTP parameters under `mtp`; a stack is named by its first layer."""
    table = lambda shape, axes, tag: core_params.ParamSpec(shape, axes, config.param_dtype, "normal",
                                                           config.initializer_range, frozenset({tag}))
    tree: Params = {
        "embedding": table((config.vocab_size, config.hidden_size), ("vocab", "embed"), "embedding"),
        "layers": {run.name: core_params.stacked(layer.specs(config, run.kind), *run.layers.shape)
                   for segment in stacks.plan(config.layer_kinds) for run in segment},
        "norm": norm_scale(config, config.hidden_size),
    }
    if not config.tie_word_embeddings:
        tree["head"] = table((config.hidden_size, config.vocab_size), ("embed", "vocab"), "output_head")
    if config.num_nextn_predict_layers:
        tree["mtp"] = mtp.specs(config)
    return tree


@functools.partial(jax.jit, static_argnums=0)
def init(config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters for `config`; the same key gives the same parameters on every device and process count."""
    return core_params.initialise(param_specs(config), key)


def unembed(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Logits, float32 [..., V], of hidden states [..., D] taken after the final norm."""
    head = params["embedding"].T if config.tie_word_embeddings else params["head"]
    return jnp.einsum("...d,dv->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def forward(params: Params, config: ModelConfig, tokens: jax.Array, *, positions: jax.Array | None = None,
            segment_ids: jax.Array | None = None, cache: Cache | None = None, mtp_steps: int = 0,
            attention: Literal["dense", "sparse"] = "sparse", indexer_loss: Literal["dense", "sparse"] | None = None,
            collect: Collection[str] = ()) -> Output:
    """Runs the model over `tokens` int32 [B, T].

    `segment_ids` int32 [B, T] keep packed documents apart; 0 is padding; default 1. `positions` int32 [B, T] default
    to the rank within the segment, with a cache to each row's length onward. A cache makes earlier tokens visible and
    is returned extended; padding takes no room in it. `mtp_steps` unrolls the MTP layer; the last k positions of a
    row have no token to read in step k and mean nothing. A later call with the cache completes their keys, so that a
    sequence fed in pieces gives what it gives whole: provided that every call on a cache has the same `mtp_steps`.

    `attention` "dense" is over every visible key in every layer, as before the indexer is trained; it needs no
    selection, and none is made unless it is asked for.

    `collect` takes "hidden" (`hidden/<i>` after i layers, `hidden/final_norm`), "index_scores"
    (`index_scores/<layer>` [B, T, S], -inf where not visible), "selected" (`selected/<layer>` [B, T, index_topk]) and
    "router" (`router/<layer>/experts` and `/weights` [B*T, A]). `indexer_loss` adds `indexer_kl/<layer>` to the
    collected: the mean over tokens of KL(attention averaged over heads || softmax of the index scores), over all
    visible keys ("dense", which makes `attention` dense) or the selected ("sparse"); layer N is the MTP layer.

    Raises ValueError for a wrong rank, dtype or option and, outside jit, for a cache without room.
    """
    tokens = jnp.asarray(tokens)
    collect = (collect,) if isinstance(collect, str) else tuple(sorted(set(collect)))
    _check(config, tokens, positions, segment_ids, cache, mtp_steps, attention, indexer_loss, collect)
    attention = "dense" if indexer_loss == "dense" else attention
    return _forward(params, config, tokens, positions, segment_ids, cache, mtp_steps,
                    layer.Request(attention, indexer_loss, collect))


@functools.partial(jax.jit, static_argnums=(1, 6, 7))
def _forward(params: Params, config: ModelConfig, tokens: jax.Array, positions: jax.Array | None,
             segment_ids: jax.Array | None, cache: Cache | None, mtp_steps: int, request: layer.Request) -> Output:
    before = cache
    view, cache = _open_view(config, tokens, positions, segment_ids, cache)
    with jax.named_scope("embed"):
        x_BTD = params["embedding"][tokens].astype(config.dtype)
        x_BTD = constrain(x_BTD, "batch", "time", "act_embed", rules=config.sharding)
    flow = layer.begin(config, x_BTD, view.key_positions_BS.shape[1], request,
                       *((cache.latents_LBSR, cache.index_keys_NBSC) if cache is not None else ()))
    flow, reports, stats = _run_layers(params["layers"], config, flow, view, request)
    hidden = rms_norm(flow.x_BTD, params["norm"], config.rms_norm_eps)
    if cache is not None:
        cache = cache.replace(latents_LBSR=flow.latents_LBSR, index_keys_NBSC=flow.index_keys_NBSC)

    divergences = [reports[i].pop("indexer_kl") for i in sorted(reports) if request.indexer_loss]
    collected = _by_name(reports)
    if "hidden" in request.collect:
        collected["hidden/final_norm"] = hidden
    aux: dict[str, Any] = {
        "expert_load": stats.load_E, "balance_loss": masked.masked_mean(stats.balance_loss, jnp.array(True)),
        "balance": stats.balance, "index_nan": flow.index_nan}
    if request.indexer_loss:
        aux["indexer_kl"] = jax.tree.map(lambda *layers: jnp.stack(layers), *divergences)
        collected |= {f"indexer_kl/{i}": kl for i, kl in enumerate(_per_count(aux["indexer_kl"]))}

    mtp_logits = mtp_hidden = None
    if before is not None and cache is not None and config.num_nextn_predict_layers:
        window = mtp.cached_window(tokens, hidden, view.segment_ids_BT, before, cache)
        added_B = (view.segment_ids_BT != 0).sum(1, dtype=jnp.int32)
        last_tokens, last_hidden = mtp.last_of(window, added_B, config.mtp_unroll)
        cache = cache.replace(last_tokens_BU=last_tokens,
                              last_hidden_BUD=last_hidden.astype(cache.last_hidden_BUD.dtype))
    else:
        window = mtp.Window(tokens, hidden, view.positions_BT, view.segment_ids_BT)
    if mtp_steps:
        with jax.named_scope("mtp"):
            mtp_hidden, report, cache = mtp.unroll(params["mtp"], config, params["embedding"], window, cache,
                                                   mtp_steps, request)
            if cache is not None:
                own = config.mtp_unroll + ranks(view.segment_ids_BT != 0)
                mtp_hidden = jnp.take_along_axis(mtp_hidden, own[None, :, :, None], 2)
            mtp_logits = unembed(params, config, mtp_hidden)
            aux["mtp_expert_load"] = report["stats"].load_E.sum(0)
            aux["mtp_balance_loss"] = report["stats"].balance_loss.mean()
            aux["mtp_balance"] = report["stats"].balance
            aux["index_nan"] += report["index_nan"].sum()
            if request.indexer_loss:
                aux["mtp_indexer_kl"] = report["indexer_kl"]
                collected[f"indexer_kl/{config.num_hidden_layers}"] = _per_count(report["indexer_kl"]).mean()

    with jax.named_scope("unembed"):
        logits = constrain(unembed(params, config, hidden), "batch", "time", "act_vocab", rules=config.sharding)
    return Output(logits, hidden, cache, mtp_logits, mtp_hidden, aux, collected)


def _open_view(config: ModelConfig, tokens: jax.Array, positions: jax.Array | None, segment_ids: jax.Array | None,
               cache: Cache | None) -> tuple[layer.View, Cache | None]:
    """Who sees whom; with a cache, which slots the tokens take, and the cache that knows them."""
    if segment_ids is None:
        segment_ids = jnp.ones(tokens.shape, jnp.int32)
    real = segment_ids != 0
    if positions is None:
        positions = _ranks_in_segment(segment_ids) if cache is None else cache.lengths_B[:, None] + ranks(real)
    rope = rope_table(positions, config.qk_rope_head_dim, config.rope_theta)
    if cache is None:
        return layer.View(positions, segment_ids, positions, segment_ids, rope), None
    slots = jnp.where(real, cache.lengths_B[:, None] + ranks(real), cache.max_len)
    cache = cache.replace(positions_BS=put(cache.positions_BS, slots, positions),
                          segment_ids_BS=put(cache.segment_ids_BS, slots, segment_ids),
                          lengths_B=cache.lengths_B + real.sum(1, dtype=jnp.int32))
    return layer.View(positions, segment_ids, cache.positions_BS, cache.segment_ids_BS, rope, slots), cache


def _ranks_in_segment(segment_ids_BT: jax.Array) -> jax.Array:
    """How many earlier tokens of the row have the same segment id, wherever they stand, int32 [B, T]."""
    order = jnp.argsort(segment_ids_BT, axis=1, stable=True)
    grouped = jnp.take_along_axis(segment_ids_BT, order, 1)
    steps = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    starts = jnp.concatenate([jnp.ones_like(grouped[:, :1], bool), grouped[:, 1:] != grouped[:, :-1]], 1)
    ranks_sorted = steps - lax.cummax(jnp.where(starts, steps, 0), axis=1)
    return jnp.take_along_axis(ranks_sorted, jnp.argsort(order, axis=1), 1)


def _run_layers(params: Params, config: ModelConfig, flow: layer.Flow, view: layer.View, request: layer.Request
                ) -> tuple[layer.Flow, dict[int, dict[str, Any]], moe.RouterStats]:
    """Scans the stacks in order of depth. Returns the flow, what was collected by layer, and the router statistics of
    the MoE layers, stacked in order of depth."""
    indexer_rank = np.cumsum([kind.indexer == "full" for kind in config.layer_kinds]) - 1
    collected: dict[int, dict[str, Any]] = {}
    nothing = jnp.zeros(0)
    no_layer = moe.RouterStats(jnp.zeros((0, config.n_routed_experts), jnp.int32), Mean(nothing, nothing))
    stats, depth = [no_layer], [np.zeros(0, int)]
    for segment in stacks.plan(config.layer_kinds):
        def group(flow: layer.Flow, xs: Any, segment: stacks.Segment = segment) -> tuple[layer.Flow, Any]:
            reports = []
            for run, run_xs in zip(segment, xs):
                flow, report = lax.scan(_layer_body(config, run, view, request), flow, run_xs)
                reports.append(report)
            return flow, tuple(reports)

        xs = tuple((params[run.name], run.layers, indexer_rank[run.layers]) for run in segment)
        flow, reports = lax.scan(group, flow, xs)
        for run, report in zip(segment, reports):
            if "stats" in report:
                stats.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), report.pop("stats")))
                depth.append(run.layers.reshape(-1))
            for (r, c), index in np.ndenumerate(run.layers):
                collected[int(index)] = jax.tree.map(lambda x: x[r, c], report)
    order = np.argsort(np.concatenate(depth))
    return flow, collected, jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *stats)


def _layer_body(config: ModelConfig, run: stacks.Run, view: layer.View, request: layer.Request) -> Any:
    def body(flow: layer.Flow, xs: Any) -> tuple[layer.Flow, dict[str, Any]]:
        params, index, indexer = xs
        return layer.apply(params, config, run.kind, flow, view, index, indexer, request)

    return layer.rematerialised(body, config)


def _per_count(mean: Mean) -> jax.Array:
    """Total over count, 0 where nothing was counted."""
    return mean.total / jnp.maximum(mean.count, 1)


def _by_name(reports: dict[int, dict[str, Any]]) -> dict[str, jax.Array]:
    """`selected/3`, `router/3/experts` and so on, from the reports of the layers."""
    named: dict[str, jax.Array] = {}
    for index, report in reports.items():
        for name, value in report.items():
            parts = value.items() if isinstance(value, dict) else [(None, value)]
            named |= {f"{name}/{index}" + (f"/{part}" if part else ""): x for part, x in parts}
    return named


def _check(config: ModelConfig, tokens: Any, positions: Any, segment_ids: Any, cache: Cache | None, mtp_steps: int,
           attention: str, indexer_loss: str | None, collect: tuple[str, ...]) -> None:
    if tokens.ndim != 2 or tokens.size == 0 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens: expected integers [batch, time], at least one, found {tokens.dtype} "
                         f"{list(tokens.shape)}")
    if not isinstance(tokens, jax.core.Tracer):
        lowest, highest = np.asarray(tokens).min(), np.asarray(tokens).max()
        if lowest < 0 or highest >= config.vocab_size:
            raise ValueError(f"tokens: expected ids from 0 to {config.vocab_size - 1} (config.vocab_size), "
                             f"found {lowest} to {highest}")
    for name, value in (("positions", positions), ("segment_ids", segment_ids)):
        if value is not None and (jnp.shape(value) != tokens.shape
                                  or not jnp.issubdtype(jnp.result_type(value), jnp.integer)):
            raise ValueError(f"{name}: expected integers in the shape of tokens {list(tokens.shape)}, "
                             f"found {jnp.result_type(value)} {list(jnp.shape(value))}")
    if indexer_loss not in (None, "dense", "sparse"):
        raise ValueError(f"indexer_loss: expected None, 'dense' or 'sparse', found {indexer_loss!r}")
    if attention not in ("dense", "sparse"):
        raise ValueError(f"attention: expected 'dense' or 'sparse', found {attention!r}")
    if attention == "dense" and indexer_loss == "sparse":
        raise ValueError("indexer_loss: expected None or 'dense' with dense attention, found 'sparse'")
    if unknown := set(collect) - set(layer.COLLECTABLE):
        raise ValueError(f"collect: expected names among {layer.COLLECTABLE}, found {sorted(unknown)}")
    if mtp_steps and not config.num_nextn_predict_layers:
        raise ValueError(f"mtp_steps: expected 0, since config.num_nextn_predict_layers is 0, found {mtp_steps}")
    if mtp_steps < 0 or (cache is not None and mtp_steps > config.mtp_unroll):
        raise ValueError(f"mtp_steps: expected 0 to config.mtp_unroll = {config.mtp_unroll}, found {mtp_steps}")
    if cache is not None:
        _check_room(jnp.shape(tokens), segment_ids, cache)


def _check_room(shape: tuple[int, ...], segment_ids: Any, cache: Cache) -> None:
    if cache.lengths_B.shape[0] != shape[0]:
        raise ValueError(f"cache: expected {shape[0]} rows as in tokens, found {cache.lengths_B.shape[0]}")
    if isinstance(cache.lengths_B, jax.core.Tracer) or isinstance(segment_ids, jax.core.Tracer):
        return
    added = shape[1] if segment_ids is None else (np.asarray(segment_ids) != 0).sum(1)
    needed = np.asarray(cache.lengths_B) + added
    if needed.max() > cache.max_len:
        row = int(needed.argmax())
        raise ValueError(f"cache: row {row} holds {int(cache.lengths_B[row])} tokens and would hold {needed[row]}, but "
                         f"its max_len is {cache.max_len}; make a longer one with init_cache(..., max_len)")
