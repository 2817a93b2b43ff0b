"""Sampling: from logits to a token, and `generate`, which samples whole completions in one compiled program.

B batch, T prompt positions, N new tokens or rows to draw for, V vocabulary.
"""

import functools
from typing import Any, Sequence

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from glm5_jax.model.cache import Cache, init_cache
from glm5_jax.model.config import ModelConfig
from glm5_jax.model.transformer import forward, unembed

LANES = 64  # of a block of the vocabulary


@struct.dataclass
class Generation:
    """New tokens only. Past a row's length, which counts its stop id, tokens and log-probs are 0."""

    tokens: jax.Array    # int32 [B, N]
    logprobs: jax.Array  # float32 [B, N], of each token under the distribution it was drawn from
    lengths: jax.Array   # int32 [B]


def log_distribution(logits_BV: jax.Array, temperature: float | jax.Array, top_p: float | jax.Array,
                     top_k: int | jax.Array = 0) -> jax.Array:
    """Log-probs, float32 [B, V], of what is drawn from: -inf but for the `top_k` most likely tokens (0: all), and of
    these the nucleus, the smallest set whose share of their mass after temperature reaches top_p.

    Each option is a number or [B]. Of equal logits the lowest token id comes first; the most likely token always stays.
    """
    of_row = lambda option: jnp.broadcast_to(jnp.asarray(option), logits_BV.shape[:1])[:, None]
    log_p = jax.nn.log_softmax(logits_BV.astype(jnp.float32) / of_row(temperature))
    cut_B1 = (of_row(top_p) < 1) | (of_row(top_k) > 0)
    # A row that is not cut is the same whether or not another one is.
    return lax.cond(cut_B1.any(), lambda: jnp.where(cut_B1, _cut(log_p, of_row(top_p), of_row(top_k)), log_p),
                    lambda: log_p)


def _cut(log_p: jax.Array, top_p_B1: jax.Array, top_k_B1: jax.Array) -> jax.Array:
    ranked = jnp.argsort(-log_p, axis=-1, stable=True)
    among = (jnp.arange(log_p.shape[1]) < top_k_B1) | (top_k_B1 == 0)
    mass = jax.nn.softmax(jnp.where(among, jnp.take_along_axis(log_p, ranked, -1), -jnp.inf))
    mass_before = jnp.pad(jnp.cumsum(mass, -1), ((0, 0), (1, 0)))[:, :-1]
    kept_ranked = (among & ((mass_before < top_p_B1) | (top_p_B1 == 1))).at[:, 0].set(True)
    kept = jnp.put_along_axis(kept_ranked, ranked, kept_ranked, -1, inplace=False)
    return jax.nn.log_softmax(jnp.where(kept, log_p, -jnp.inf))


def most_likely(logits_NV: jax.Array) -> jax.Array:
    """The first of the largest logits of each row, int32 [N]. By blocks: a CPU takes a long argmax value by value."""
    blocks_NGL = _blocks(logits_NV, -jnp.inf)
    block_N = jnp.argmax(blocks_NGL.max(-1), -1)
    return (block_N * LANES + jnp.argmax(_block(blocks_NGL, block_N), -1)).astype(jnp.int32)


def pick(weights_NV: jax.Array, uniform_N: jax.Array) -> jax.Array:
    """Tokens, int32 [N], of probabilities proportional to the weights: where their running sum exceeds the share
    `uniform_N`, float32 from 0 to below 1, of their total. One of weight 0 is never picked."""
    blocks_NGL = _blocks(weights_NV, 0)
    sums_NG = blocks_NGL.sum(-1)
    block_N, left_N = _reached(sums_NG, uniform_N * sums_NG.sum(-1))
    token_N, _ = _reached(_block(blocks_NGL, block_N), left_N)
    return block_N * LANES + token_N


def _reached(weights_NX: jax.Array, mark_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first weight with which the running sum exceeds the mark, and how far the sum before it is from the mark.

    Neither is a weight of 0 chosen, where sums of other rounding jump, nor none: then it is the last above 0.
    """
    index = jnp.arange(weights_NX.shape[1], dtype=jnp.int32)
    ends_NX, some = jnp.cumsum(weights_NX, -1), weights_NX > 0
    first_N = jnp.where(some & (ends_NX > mark_N[:, None]), index, len(index)).min(-1)
    chosen_N = jnp.minimum(first_N, jnp.where(some, index, 0).max(-1))
    before_N = jnp.where(index < chosen_N[:, None], weights_NX, 0).sum(-1)
    return chosen_N, mark_N - before_N


def _blocks(x_NV: jax.Array, fill: float) -> jax.Array:
    """[N, blocks, LANES], filled up."""
    padded = jnp.pad(x_NV, ((0, 0), (0, -x_NV.shape[1] % LANES)), constant_values=fill)
    return padded.reshape(len(x_NV), -1, LANES)


def _block(blocks_NGL: jax.Array, block_N: jax.Array) -> jax.Array:
    return jnp.take_along_axis(blocks_NGL, block_N[:, None, None], 1)[:, 0]


def generate(params: Any, config: ModelConfig, prompts_BT: jax.Array | np.ndarray, *,
             prompt_lengths: jax.Array | np.ndarray | None = None, max_new_tokens: int, temperature: float = 1.0,
             top_p: float = 1.0, key: jax.Array | None = None, stop_ids: Sequence[int] = ()) -> Generation:
    """Completes each prompt with up to `max_new_tokens` tokens.

    `prompts_BT` int32 [B, T] hold their tokens first, `prompt_lengths` [B] (default T) of them; what follows is
    padding. Temperature 0 is greedy (log-probs are then those of temperature 1); above 0 a `key` is needed. A row ends
    with the first of `stop_ids`. Raises ValueError for an option out of range.
    """
    prompts_BT = jnp.asarray(prompts_BT)
    if prompts_BT.ndim != 2 or prompts_BT.shape[1] == 0:
        raise ValueError(f"prompts_BT: expected [batch, time] with at least one token, found {list(prompts_BT.shape)}")
    batch, length = prompts_BT.shape
    if not isinstance(prompt_lengths, jax.core.Tracer):
        found = np.full(batch, length) if prompt_lengths is None else np.asarray(prompt_lengths)
        if found.shape != (batch,) or found.min() < 1 or found.max() > length:
            raise ValueError(f"prompt_lengths: expected {batch} lengths between 1 and {length}, found {found}")
        prompt_lengths = jnp.asarray(found)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature and top_p: expected >= 0 and in (0, 1], found {temperature} and {top_p}")
    if temperature > 0 and key is None:
        raise ValueError("key: expected a jax.random.key for temperature above 0, found None; temperature=0 is greedy")
    key = jax.random.key(0) if key is None else key  # greedy draws nothing from it
    return _generate(params, config, prompts_BT, jnp.asarray(prompt_lengths, jnp.int32), max_new_tokens,
                     temperature == 0, float(temperature), float(top_p), key, tuple(int(i) for i in stop_ids))


class _Decoding(struct.PyTreeNode):
    step: jax.Array  # tokens drawn so far
    cache: Cache | None
    tokens_BN: jax.Array
    logprobs_BN: jax.Array
    lengths_B: jax.Array
    going_B: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "new", "greedy", "stop_ids"))
def _generate(params: Any, config: ModelConfig, prompts_BT: jax.Array, prompt_lengths_B: jax.Array, new: int,
              greedy: bool, temperature: jax.Array, top_p: jax.Array, key: jax.Array, stop_ids: tuple[int, ...]
              ) -> Generation:
    batch, length = prompts_BT.shape
    config = config.replace(num_nextn_predict_layers=0)  # plain decoding never asks the MTP layer
    real_BT = (jnp.arange(length) < prompt_lengths_B[:, None]).astype(jnp.int32)
    prefill = forward(params, config, prompts_BT, segment_ids=real_BT,
                      cache=init_cache(config, batch, length + new))
    last_BD = jnp.take_along_axis(prefill.hidden, prompt_lengths_B[:, None, None] - 1, 1)[:, 0]

    def draw(s: _Decoding, logits_BV: jax.Array) -> _Decoding:
        if greedy:
            log_p = jax.nn.log_softmax(logits_BV)
            token_B = most_likely(logits_BV)
        else:
            log_p = log_distribution(logits_BV, temperature, top_p)
            token_B = pick(jnp.exp(log_p), jax.random.uniform(jax.random.fold_in(key, s.step), (batch,)))
        logprob_B = jnp.take_along_axis(log_p, token_B[:, None], -1)[:, 0]
        return s.replace(
            step=s.step + 1,
            tokens_BN=s.tokens_BN.at[:, s.step].set(jnp.where(s.going_B, token_B, 0)),
            logprobs_BN=s.logprobs_BN.at[:, s.step].set(jnp.where(s.going_B, logprob_B, 0)),
            lengths_B=s.lengths_B + s.going_B,
            going_B=s.going_B & ~jnp.isin(token_B, jnp.array(stop_ids, jnp.int32)))

    def step(s: _Decoding) -> _Decoding:
        last_B1 = lax.dynamic_slice_in_dim(s.tokens_BN, s.step - 1, 1, 1)
        out = forward(params, config, last_B1, segment_ids=s.going_B[:, None].astype(jnp.int32), cache=s.cache)
        return draw(s.replace(cache=out.cache), out.logits[:, 0])

    zero_B, blank_BN = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, new), jnp.int32)
    start = _Decoding(jnp.zeros((), jnp.int32), prefill.cache, blank_BN, blank_BN.astype(jnp.float32), zero_B,
                      ~zero_B.astype(bool))
    start = draw(start, unembed(params, config, last_BD))
    end = lax.while_loop(lambda s: (s.step < new) & s.going_B.any(), step, start)
    return Generation(end.tokens_BN, end.logprobs_BN, end.lengths_B)
