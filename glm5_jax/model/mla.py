"""Multi-head latent attention: keys and values of all heads live in one latent row per token.

Expanded, every head's keys and values are made from the latent rows (cheap per pair, good when many queries share
them). Absorbed, the key projection is folded into the query and the value projection into the output, and heads attend
to the latent rows themselves (cheap per key, good for decoding and for gathered keys). Both are equal.

B batch, T query positions, S key positions, H heads, C channels per head, R latent rank, K keys selected.
"""

import jax
import jax.numpy as jnp

from glm5_jax.core import masked
from glm5_jax.model.config import ModelConfig
from glm5_jax.model.primitives import Params, bias, matrix, norm_scale, rms_norm, rotate


def specs(config: ModelConfig) -> Params:
    """Specs of the attention projections of one layer."""
    d, heads = config.hidden_size, config.num_attention_heads
    tree = {
        "q_a": matrix(config, (d, config.q_lora_rank), ("embed", "q_rank")),
        "q_a_norm": norm_scale(config, config.q_lora_rank),
        "q_b": matrix(config, (config.q_lora_rank, heads, config.qk_head_dim), ("q_rank", "heads", "head_dim"),
                      "head_split"),
        "kv_a": matrix(config, (d, config.latent_dim), ("embed", "kv_rank")),
        "kv_a_norm": norm_scale(config, config.kv_lora_rank),
        "k_b": matrix(config, (config.kv_lora_rank, heads, config.qk_nope_head_dim), ("kv_rank", "heads", "head_dim"),
                      "head_split"),
        "v_b": matrix(config, (config.kv_lora_rank, heads, config.v_head_dim), ("kv_rank", "heads", "head_dim"),
                      "head_split"),
        "o": matrix(config, (heads, config.v_head_dim, d), ("heads", "head_dim", "embed")),
    }
    if config.attention_bias:
        tree |= {"q_a_bias": bias(config, config.q_lora_rank), "kv_a_bias": bias(config, config.latent_dim),
                 "o_bias": bias(config, d)}
    return tree


def _project(params: Params, name: str, x_BTD: jax.Array) -> jax.Array:
    y = x_BTD @ params[name].astype(x_BTD.dtype)
    return y + params[f"{name}_bias"].astype(y.dtype) if f"{name}_bias" in params else y


def query_latent(params: Params, config: ModelConfig, u_BTD: jax.Array) -> jax.Array:
    """The normed query latent [B, T, q_lora_rank], which the indexer reads too."""
    return rms_norm(_project(params, "q_a", u_BTD), params["q_a_norm"], config.latent_norm_eps)


def queries(params: Params, config: ModelConfig, latent_BTR: jax.Array, rope: jax.Array) -> jax.Array:
    """Queries [B, T, H, C]: the unrotated channels first, the rotated last."""
    q_BTHC = jnp.einsum("btr,rhc->bthc", latent_BTR, params["q_b"].astype(latent_BTR.dtype))
    split = config.qk_nope_head_dim
    return jnp.concatenate([q_BTHC[..., :split], rotate(q_BTHC[..., split:], rope)], -1)


def latent_rows(params: Params, config: ModelConfig, u_BTD: jax.Array, rope: jax.Array) -> jax.Array:
    """What a cache keeps of each token, [B, T, R]: the normed key-value latent, then the rotated shared key."""
    row = _project(params, "kv_a", u_BTD)
    latent = rms_norm(row[..., :config.kv_lora_rank], params["kv_a_norm"], config.latent_norm_eps)
    return jnp.concatenate([latent, rotate(row[..., config.kv_lora_rank:], rope)], -1)


def absorb_queries(params: Params, config: ModelConfig, q_BTHC: jax.Array) -> jax.Array:
    """Queries that meet latent rows directly, [B, T, H, R]."""
    split = config.qk_nope_head_dim
    folded = jnp.einsum("bthc,rhc->bthr", q_BTHC[..., :split], params["k_b"].astype(q_BTHC.dtype))
    return jnp.concatenate([folded, q_BTHC[..., split:]], -1)


def expand_rows(params: Params, config: ModelConfig, rows_BSR: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys [B, S, H, C] and values [B, S, H, C] of every head from the latent rows."""
    latent, shared = rows_BSR[..., :config.kv_lora_rank], rows_BSR[..., config.kv_lora_rank:]
    k = jnp.einsum("bsr,rhc->bshc", latent, params["k_b"].astype(latent.dtype))
    v = jnp.einsum("bsr,rhc->bshc", latent, params["v_b"].astype(latent.dtype))
    shared = jnp.broadcast_to(shared[:, :, None], (*k.shape[:3], shared.shape[-1]))
    return jnp.concatenate([k, shared], -1), v


def values_from_latent(params: Params, mixed_BTHR: jax.Array) -> jax.Array:
    """The value projection, applied after attention over latent rows: [B, T, H, C]."""
    return jnp.einsum("bthr,rhc->bthc", mixed_BTHR, params["v_b"].astype(mixed_BTHR.dtype))


def output(params: Params, mixed_BTHC: jax.Array) -> jax.Array:
    """The output projection over heads, [B, T, D]."""
    y = jnp.einsum("bthc,hcd->btd", mixed_BTHC, params["o"].astype(mixed_BTHC.dtype))
    return y + params["o_bias"].astype(y.dtype) if "o_bias" in params else y


def prefers_absorbed(config: ModelConfig, queries: int, keys: int) -> bool:
    """Whether dense attention of `queries` over `keys` costs fewer products per head in absorbed form."""
    pair_expanded, pair_absorbed = config.qk_head_dim + config.v_head_dim, config.latent_dim + config.kv_lora_rank
    rows = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    return rows * queries + pair_absorbed * queries * keys < rows * keys + pair_expanded * queries * keys


def attend_dense(q: jax.Array, k: jax.Array, v: jax.Array, mask_BTS: jax.Array,
                 scale: float) -> tuple[jax.Array, jax.Array]:
    """Attention over all keys of the mask: [B, T, H, C] and the float32 probabilities [B, H, T, S].

    Expanded keys and values are [B, S, H, C]; latent rows, shared by all heads, are [B, S, R]. A row that sees
    nothing gives zeros.
    """
    heads = "h" if k.ndim == 4 else ""
    logits_BHTS = jnp.einsum(f"bthc,bs{heads}c->bhts", q, k, preferred_element_type=jnp.float32) * scale
    p_BHTS = masked.masked_softmax(logits_BHTS, mask_BTS[:, None])
    out = jnp.einsum(f"bhts,bs{heads}c->bthc", p_BHTS.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.astype(v.dtype), p_BHTS


def probabilities(q_BTHR: jax.Array, rows_BTKR: jax.Array, present_BTK: jax.Array, lse_BTH: jax.Array,
                  scale: float) -> jax.Array:
    """The attention of absorbed queries to gathered rows, float32 [B, T, H, K], from the log-sum-exp of its logits."""
    logits = jnp.einsum("bthr,btkr->bthk", q_BTHR, rows_BTKR, preferred_element_type=jnp.float32) * scale
    return jnp.where(present_BTK[:, :, None], jnp.exp(logits - lse_BTH[..., None]), 0)
