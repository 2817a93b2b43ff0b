"""DSA adaptation: a dense model gets its indexers in two stages, and how well they predict its attention.

First, with dense attention, the indexers alone learn to predict it (KL over all visible keys). Then attention is
sparse, and everything trains: the indexers on the KL over what they selected, the rest on the language model's loss;
neither gradient reaches the other. GLM-5 report, section 2.1.1; DeepSeek-V3.2 report, section 2.1.

B batch, T query positions, S key positions, H heads, L layers.
"""

import dataclasses
import functools
from typing import Any, Iterator

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from glm5_jax.core.batch import Batch
from glm5_jax.core.metrics import Mean
from glm5_jax.model import dsa, mla, stacks, transformer
from glm5_jax.model.config import ModelConfig
from glm5_jax.model.primitives import Params, rms_norm, rope_table
from glm5_jax.train.step import Options
from pallas_kernels import index_scores
from pallas_kernels.blocks import over_queries
from pallas_kernels.lightning_indexer.reference import visible
from pallas_kernels.lightning_indexer.xla import best


def warmup(options: Options) -> Options:
    """Dense attention, and only what is tagged `indexer` trains; routers stand still."""
    return dataclasses.replace(options, attention="dense", indexer_loss="dense", trainable={"indexer"},
                               router_bias_rate=0.0)


def sparse(options: Options) -> Options:
    """Attention to the selected keys; indexers learn from it, the rest learns to work with it."""
    return dataclasses.replace(options, attention="sparse", indexer_loss="sparse")


@struct.dataclass
class Agreement:
    """How well scores predict the attention of each layer: `Mean` [L] over the queries.

    `kl` is KL(attention averaged over heads || softmax of the scores) over the visible keys, in nats; `recall` the
    attention that the `index_topk` best-scored keys get, over what the `index_topk` most attended keys get.
    """

    kl: Mean
    recall: Mean


def agreement(params: Params, config: ModelConfig, batch: Batch) -> dict[str, Agreement]:
    """The agreement of "indexer", of "recency" (keys weighted by 1 / (1 + distance)) and of "uniform" scores (the
    expectation of a random choice) with the attention that the dense model has on `batch`.

    Queries with at most `index_topk` visible keys have nothing to select and do not count. Layers that share an indexer
    count too. Add the means of several batches up with `core.metrics.Mean.merge`.
    """
    return _agreement(params, config, batch)


@functools.partial(jax.jit, static_argnums=1)
def _agreement(params: Params, config: ModelConfig, batch: Batch) -> dict[str, Agreement]:
    hidden = transformer.forward(params, config, batch.tokens, positions=batch.positions,
                                 segment_ids=batch.segment_ids, attention="dense", collect=("hidden",)).collected
    rope = rope_table(batch.positions, config.qk_rope_head_dim, config.rope_theta)
    found, index = [], None
    for number, layer in enumerate(_layers(params, config)):
        u_BTD = rms_norm(hidden[f"hidden/{number}"], layer["input_norm"], config.rms_norm_eps)
        latent = mla.query_latent(layer["attention"], config, u_BTD)
        if "indexer" in layer:
            index = dsa.index_inputs(layer["indexer"], config, u_BTD, latent, rope)
        assert index is not None  # the first layer has one
        found.append(_of_layer(layer["attention"], config, latent, u_BTD, index, rope, batch))
    return jax.tree.map(lambda *layers: jnp.stack(layers), *found)


def _layers(params: Params, config: ModelConfig) -> Iterator[Params]:
    """The parameters of each layer in order of depth."""
    places = {int(number): (run.name, place) for segment in stacks.plan(config.layer_kinds) for run in segment
              for place, number in np.ndenumerate(run.layers)}
    for number in range(config.num_hidden_layers):
        name, place = places[number]
        yield jax.tree.map(lambda x: x[place], params["layers"][name])


def _of_layer(params: Params, config: ModelConfig, latent: jax.Array, u_BTD: jax.Array, index: dsa.IndexInputs,
              rope: jax.Array, batch: Batch) -> dict[str, Agreement]:
    q_BTHC = mla.queries(params, config, latent, rope)
    k_BSHC, v_BSHC = mla.expand_rows(params, config, mla.latent_rows(params, config, u_BTD, rope))

    def block(q: jax.Array, index_q: jax.Array, index_w: jax.Array, positions: jax.Array, segments: jax.Array) -> Any:
        sight: dict[str, Any] = {"q_positions": positions, "k_positions": batch.positions,
                                 "q_segments": segments, "k_segments": batch.segment_ids}
        mask = visible(**sight)
        p_BTS = mla.attend_dense(q, k_BSHC, v_BSHC, mask, config.qk_head_dim ** -0.5)[1].mean(1)
        distance = positions[:, :, None] - batch.positions[:, None]
        scores = {"indexer": index_scores(index_q, index.keys_BSC, index_w, scale=1.0, **sight,
                                          **config.kernel_options),
                  "recency": -jnp.log1p(jnp.maximum(distance, 0).astype(jnp.float32))}
        captured = lambda by: jnp.sum(p_BTS * dsa.selection_mask(
            best(jnp.where(mask, by, -jnp.inf), config.index_topk), p_BTS.shape[-1]), -1)
        counts, most = mask.sum(-1), jnp.maximum(captured(p_BTS), 1e-30)
        values = {name: (dsa.kl_rows(p_BTS, by, mask), captured(by) / most) for name, by in scores.items()}
        values["uniform"] = (dsa.kl_rows(p_BTS, jnp.zeros_like(p_BTS), mask),
                             jnp.minimum(config.index_topk / jnp.maximum(counts, 1), 1) / most)
        return counts, values

    visible_BT, values = over_queries(block, config.query_chunk, q_BTHC, index.queries_BTIC, index.weights_BTI,
                                      batch.positions, batch.segment_ids)
    counts = visible_BT > config.index_topk
    return {name: Agreement(Mean.of(kl, counts), Mean.of(recall, counts)) for name, (kl, recall) in values.items()}
