"""DeepSeek Sparse Attention around its kernels: what the lightning indexer scores, and the indexer's own loss.

Scores and the exact selection, whose contract all implementations share, are in `pallas_kernels.lightning_indexer`.

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


def index_scores_at(q_BTIC: jax.Array, k_BTKC: jax.Array, w_BTI: jax.Array) -> jax.Array:
    """The scores of keys gathered per query, float32 [B, T, K]."""
    products = jnp.einsum("btic,btkc->btik", q_BTIC, k_BTKC, precision=lax.Precision.HIGHEST,
                          preferred_element_type=jnp.float32)
    return jnp.einsum("bti,btik->btk", w_BTI, jax.nn.relu(products), precision=lax.Precision.HIGHEST)


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
    scores_BTS = jnp.maximum(scores_BTS, jnp.finfo(jnp.float32).min)  # as in a selection
    p = lax.stop_gradient(attention_BTS.astype(jnp.float32))
    log_q = masked.masked_log_softmax(scores_BTS, mask_BTS)
    log_p = jnp.log(jnp.where(p > 0, p, 1.0))
    return jnp.sum(jnp.where(mask_BTS & (p > 0), p * (log_p - log_q), 0.0), -1)
