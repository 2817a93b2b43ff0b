"""DeepSeek Sparse Attention: the lightning indexer, the exact selection, and the indexer's own loss.

The selection contract, for every implementation: a key is visible to a query if both are of the same segment, the
segment is not 0, and the key's position is not after the query's. The `top_k` largest scores among the visible keys
are selected; of equal scores the lowest index wins; +0.0 equals -0.0; a NaN score is not visible, and is counted. The
result is int32: valid key indices ascending, then -1.

B batch, T query positions, S key positions, I indexer heads, C channels per head, K keys selected.
"""

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp

from glm5_jax.core import masked
from glm5_jax.core.params import with_tags
from glm5_jax.model.config import ModelConfig
from glm5_jax.model.primitives import Params, bias, layer_norm, matrix, norm_scale, rotate

KEY_NORM_EPS = 1e-6  # fixed by the released model, whatever rms_norm_eps is


class IndexInputs(struct.PyTreeNode):
    """What the scores are made of; both scale factors are inside `weights_BTI`."""

    queries_BTIC: jax.Array
    keys_BSC: jax.Array
    weights_BTI: jax.Array  # float32


def specs(config: ModelConfig) -> Params:
    """Specs of one indexer."""
    heads, channels = config.index_n_heads, config.index_head_dim
    return with_tags({
        "q": matrix(config, (config.q_lora_rank, heads, channels), ("q_rank", "index_heads", "head_dim"), "head_split"),
        "k": matrix(config, (config.hidden_size, channels), ("embed", "head_dim")),
        "k_norm": {"scale": norm_scale(config, channels), "bias": bias(config, channels)},
        "weights": matrix(config, (config.hidden_size, heads), ("embed", "index_heads")),
    }, "indexer")


def index_inputs(params: Params, config: ModelConfig, u_BTD: jax.Array, q_latent_BTR: jax.Array,
                 rope: jax.Array) -> IndexInputs:
    """Indexer queries, keys and head weights of T tokens, from the normed layer input and the normed query latent.

    The inputs are detached: only the indexer's own loss reaches its weights, and it reaches nothing else. The first
    `qk_rope_head_dim` channels are rotated (attention rotates the last).
    """
    u_BTD, q_latent_BTR = lax.stop_gradient((u_BTD, q_latent_BTR))
    dtype, split = u_BTD.dtype, config.qk_rope_head_dim
    q = jnp.einsum("btr,ric->btic", q_latent_BTR, params["q"].astype(dtype))
    k = layer_norm(u_BTD @ params["k"].astype(dtype), params["k_norm"]["scale"], params["k_norm"]["bias"],
                   KEY_NORM_EPS).astype(dtype)
    q, k = (jnp.concatenate([rotate(x[..., :split], rope), x[..., split:]], -1) for x in (q, k))
    weights = jnp.einsum("btd,di->bti", u_BTD.astype(jnp.float32), params["weights"].astype(jnp.float32),
                         precision=lax.Precision.HIGHEST)
    scale = (config.index_n_heads * config.index_head_dim) ** -0.5
    return IndexInputs(q, k, weights * scale)


def index_scores(q_BTIC: jax.Array, k_BSC: jax.Array, w_BTI: jax.Array) -> jax.Array:
    """I[t,s] = sum_i w[t,i] relu(q[t,i] . k[s]), float32 [B, T, S].

    One head at a time, recomputed in the backward pass: memory is that of the result, not of I such arrays.
    """
    @jax.checkpoint
    def add_head(total_BTS: jax.Array, head: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        q_BTC, w_BT = head
        products = jnp.einsum("btc,bsc->bts", q_BTC, k_BSC, precision=lax.Precision.HIGHEST,
                              preferred_element_type=jnp.float32)
        return total_BTS + w_BT[..., None] * jax.nn.relu(products), None

    zeros = jnp.zeros((*q_BTIC.shape[:2], k_BSC.shape[1]), jnp.float32)
    return lax.scan(add_head, zeros, (jnp.moveaxis(q_BTIC, 2, 0), jnp.moveaxis(w_BTI, 2, 0)))[0]


def index_scores_at(q_BTIC: jax.Array, k_BTKC: jax.Array, w_BTI: jax.Array) -> jax.Array:
    """The scores of keys gathered per query, float32 [B, T, K]."""
    products = jnp.einsum("btic,btkc->btik", q_BTIC, k_BTKC, precision=lax.Precision.HIGHEST,
                          preferred_element_type=jnp.float32)
    return jnp.einsum("bti,btik->btk", w_BTI, jax.nn.relu(products), precision=lax.Precision.HIGHEST)


def visible(q_positions_BT: jax.Array, q_segments_BT: jax.Array, k_positions_BS: jax.Array,
            k_segments_BS: jax.Array) -> jax.Array:
    """Which keys a query may see at all, bool [B, T, S]."""
    same = (q_segments_BT[:, :, None] == k_segments_BS[:, None]) & (k_segments_BS != 0)[:, None]
    return same & (k_positions_BS[:, None] <= q_positions_BT[:, :, None])


def select_topk(scores_BTS: jax.Array, visible_BTS: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """The selection contract. Returns int32 [B, T, top_k] and the number of visible NaN scores per query, int32 [B, T].

    A score of -inf counts as the lowest finite one, so that a visible key is never taken for an invisible one.
    """
    length = scores_BTS.shape[-1]
    nan = jnp.isnan(scores_BTS) & visible_BTS
    scores = jnp.maximum(scores_BTS, jnp.finfo(jnp.float32).min)
    scores = jnp.where(scores == 0, 0.0, scores)  # lax.top_k would put +0.0 before -0.0
    scores = jnp.where(visible_BTS & ~nan, scores, -jnp.inf)
    best, indices = lax.top_k(scores, min(top_k, length))  # of equal scores, the lowest index comes first
    indices = jnp.sort(jnp.where(best > -jnp.inf, indices, length), -1)
    indices = jnp.where(indices == length, -1, indices).astype(jnp.int32)
    padding = [(0, 0)] * (indices.ndim - 1) + [(0, top_k - indices.shape[-1])]
    return jnp.pad(indices, padding, constant_values=-1), nan.sum(-1, dtype=jnp.int32)


def selection_mask(selected_BTK: jax.Array, length: int) -> jax.Array:
    """The selection as bool [B, T, length]."""
    rows = jnp.where(selected_BTK < 0, length, selected_BTK)
    mark = lambda row: jnp.zeros(length, bool).at[row].set(True, mode="drop")
    return jax.vmap(jax.vmap(mark))(rows)


def gather_rows(rows_BSC: jax.Array, selected_BTK: jax.Array) -> jax.Array:
    """The selected rows of each query, [B, T, K, C]; a missing selection reads row 0 and must be masked."""
    take = lambda rows, index: rows.at[jnp.maximum(index, 0)].get(mode="promise_in_bounds")
    return jax.vmap(take)(rows_BSC, selected_BTK)


def kl_rows(attention_BTS: jax.Array, scores_BTS: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """KL(p || softmax of the scores) of each query over the keys of the mask, float32 [B, T].

    `attention_BTS` is p: the attention averaged over heads, detached here. A NaN score is not visible. DeepSeek-V3.2
    report, section 2.1.
    """
    mask_BTS = mask_BTS & ~jnp.isnan(scores_BTS)
    scores_BTS = jnp.maximum(scores_BTS, jnp.finfo(jnp.float32).min)  # as in `select_topk`
    p = lax.stop_gradient(attention_BTS.astype(jnp.float32))
    log_q = masked.masked_log_softmax(scores_BTS, mask_BTS)
    log_p = jnp.log(jnp.where(p > 0, p, 1.0))
    return jnp.sum(jnp.where(mask_BTS & (p > 0), p * (log_p - log_q), 0.0), -1)
