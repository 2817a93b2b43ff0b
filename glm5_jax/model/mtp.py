"""Multi-token prediction: one extra layer, applied step after step with shared parameters.

Step k reads, at position t, the embedding of token t+k and the normed output of step k-1 (step 0 is the trunk after
its final norm), and predicts token t+k+1: z_t = W [norm(E[x_{t+k}]); norm(h_t)], h'_t = norm(Layer(z)_t). Queries of a
step attend to that step's own keys. GLM-5 report, section 2.1; DeepSeek-V3 report, section 2.2.

B batch, W window of tokens, U unrolled steps, D model width.
"""

from typing import Any

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp

from glm5_jax.core.params import with_tags
from glm5_jax.model import layer
from glm5_jax.model.cache import Cache, put
from glm5_jax.model.config import LayerKind, ModelConfig
from glm5_jax.model.primitives import Params, matrix, norm_scale, rms_norm, rope_table

KIND = LayerKind("full", "sparse")


@struct.dataclass
class Window:
    """The tokens a step runs over, without gaps between the tokens of a row, and where a cache keeps them."""

    tokens_BW: jax.Array
    hidden_BWD: jax.Array
    positions_BW: jax.Array
    segment_ids_BW: jax.Array
    slots_BW: jax.Array | None = None


def specs(config: ModelConfig) -> Params:
    """Specs of the MTP layer; embedding and output head are the trunk's."""
    d = config.hidden_size
    return with_tags({
        "embed_norm": norm_scale(config, d),
        "hidden_norm": norm_scale(config, d),
        "projection": matrix(config, (2 * d, d), (None, "embed")),
        "layer": layer.specs(config, KIND),
        "norm": norm_scale(config, d),
    }, "mtp")


def cached_window(tokens_BT: jax.Array, hidden_BTD: jax.Array, segment_ids_BT: jax.Array, before: Cache,
                  after: Cache) -> Window:
    """The new tokens, moved together, behind the row's last U tokens: their successors are known only now."""
    steps, length = before.last_tokens_BU.shape[1], tokens_BT.shape[1]
    order = jnp.argsort(segment_ids_BT == 0, axis=1, stable=True)
    tokens = jnp.concatenate([before.last_tokens_BU, jnp.take_along_axis(tokens_BT, order, 1)], 1)
    hidden = jnp.concatenate([before.last_hidden_BUD.astype(hidden_BTD.dtype),
                              jnp.take_along_axis(hidden_BTD, order[..., None], 1)], 1)
    slots = before.lengths_B[:, None] + jnp.arange(-steps, length)
    exists = (slots >= 0) & (slots < jnp.minimum(after.lengths_B, after.max_len)[:, None])
    at_slot = lambda x_BS: jnp.take_along_axis(x_BS, jnp.clip(slots, 0, after.max_len - 1), 1)
    return Window(tokens, hidden, at_slot(after.positions_BS), jnp.where(exists, at_slot(after.segment_ids_BS), 0),
                  jnp.where(exists, slots, after.max_len))


def last_of(window: Window, added_B: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """The last U tokens and hidden states of each row after `added_B` new ones."""
    index = added_B[:, None] + jnp.arange(steps)
    return (jnp.take_along_axis(window.tokens_BW, index, 1),
            jnp.take_along_axis(window.hidden_BWD, index[..., None], 1))


def unroll(params: Params, config: ModelConfig, embedding: jax.Array, window: Window, cache: Cache | None, steps: int,
           request: layer.Request) -> tuple[jax.Array, dict[str, Any], Cache | None]:
    """Runs `steps` steps. Returns their outputs [steps, B, W, D], what each reports, and the cache.

    A position whose token t+k is not in the window, or is of another segment, counts as padding in step k: what is
    returned there means nothing.
    """
    width = window.tokens_BW.shape[1]

    def body(carry: tuple[jax.Array, Cache | None], k: jax.Array) -> tuple[Any, Any]:
        h_BWD, cache = carry
        ahead = lambda x_BW: jnp.roll(x_BW, -(k + 1), axis=1)
        known = (jnp.arange(width) + k + 1 < width) & (ahead(window.segment_ids_BW) == window.segment_ids_BW)
        h_BWD, report, cache = step(params, config, embedding, window, k, h_BWD, ahead(window.tokens_BW), known, cache,
                                    request)
        return (h_BWD, cache), (h_BWD, report)

    (_, cache), (hidden, report) = lax.scan(layer.rematerialised(body, config), (window.hidden_BWD, cache),
                                            jnp.arange(steps))
    return hidden, report, cache


def step(params: Params, config: ModelConfig, embedding: jax.Array, window: Window, k: jax.Array, h_BWD: jax.Array,
         ahead_BW: jax.Array, known_BW: jax.Array, cache: Cache | None, request: layer.Request
         ) -> tuple[jax.Array, dict[str, Any], Cache | None]:
    """Step k+1: from the output of step k and the token k+1 ahead, to its own output [B, W, D], report and cache.

    Where the token ahead is not known the position counts as padding.
    """
    layers, indexers = config.num_hidden_layers, config.indexer_types.count("full")
    rope = rope_table(window.positions_BW, config.qk_rope_head_dim, config.rope_theta)
    segment_ids = jnp.where(known_BW, window.segment_ids_BW, 0)
    embedded = embedding[ahead_BW].astype(h_BWD.dtype)
    z = jnp.concatenate([rms_norm(embedded, params["embed_norm"], config.rms_norm_eps),
                         rms_norm(h_BWD, params["hidden_norm"], config.rms_norm_eps)], -1)
    z = z @ params["projection"].astype(z.dtype)
    if cache is None or window.slots_BW is None:
        view = layer.View(window.positions_BW, segment_ids, window.positions_BW, segment_ids, rope)
        flow = layer.begin(config, z, h_BWD.shape[1], request)
    else:
        slots = jnp.where(segment_ids != 0, window.slots_BW, cache.max_len)
        key_segments = put(cache.mtp_segment_ids_UBS[k], slots, segment_ids)
        view = layer.View(window.positions_BW, segment_ids, cache.positions_BS, key_segments, rope, slots)
        flow = layer.begin(config, z, cache.max_len, request, cache.latents_LBSR, cache.index_keys_NBSC)
    flow, report = layer.apply(params["layer"], config, KIND, flow, view, layers + k, indexers + k, request)
    h_BWD = rms_norm(flow.x_BTD, params["norm"], config.rms_norm_eps)
    if cache is not None:
        cache = cache.replace(latents_LBSR=flow.latents_LBSR, index_keys_NBSC=flow.index_keys_NBSC,
                              mtp_segment_ids_UBS=cache.mtp_segment_ids_UBS.at[k].set(key_segments))
    return h_BWD, report | {"index_nan": flow.index_nan}, cache
