"""Speculative decoding: the multi-token-prediction layer guesses the next tokens, one pass of the model judges them.

The newest token and its k drafts are fed together, and from each of the k+1 distributions a token is drawn by the key
that plain decoding would draw it by. Drafts count as far as they are what was drawn; the first token that differs is
the true one. So a draft of probability p is accepted with probability p and what is drawn is the model's own
distribution, as in rejection sampling of one-point proposals (Leviathan et al., arXiv 2211.17192): but more than that,
it is the very same token. What drafts are worth shows in the speed alone: wrong ones, or none, change no output.

B slots, T = 1 + k tokens fed, W window of the MTP layer, U tokens that a cache remembers for it, D model width.
"""

import dataclasses
from typing import Any, cast

import jax
from jax import lax
import jax.numpy as jnp

from glm5_jax.model import mtp
from glm5_jax.model.cache import Cache
from glm5_jax.model.config import ModelConfig
from glm5_jax.model.layer import Request
from glm5_jax.model.transformer import unembed


def agreeing(drafts_Bk: jax.Array, drawn_BT: jax.Array) -> jax.Array:
    """Which of the drawn tokens count, bool [B, T]: all that follow drafts alone that were drawn too."""
    agree = jnp.cumprod(drafts_Bk == drawn_BT[:, :-1], axis=1).astype(bool)
    return jnp.pad(agree, ((0, 0), (1, 0)), constant_values=True)


def fill(params: Any, config: ModelConfig, cache: Cache, before: Cache, fed_BT: jax.Array, hidden_BTD: jax.Array,
         real_BT: jax.Array, cut_back: jax.Array, steps: int) -> Cache:
    """The cache with the MTP layer's keys of the real tokens that were fed to `before`.

    Its keys of the last U tokens before them are made anew, for now their successors are known: unless `before` was cut
    back. What it remembers then is of other tokens, and the keys are right if U of their successors were kept too.
    """
    window = mtp.cached_window(fed_BT, hidden_BTD, real_BT, before, cache)
    remembered_W = jnp.arange(window.tokens_BW.shape[1]) < before.last_tokens_BU.shape[1]
    known_BW = jnp.where(cut_back & remembered_W, 0, window.segment_ids_BW)
    window = dataclasses.replace(window, segment_ids_BW=known_BW)
    return cast(Cache, mtp.unroll(params["mtp"], config, params["embedding"], window, cache, steps, Request())[2])


def keep(cache: Cache, before: Cache, fed_BT: jax.Array, hidden_BTD: jax.Array, kept_B: jax.Array
         ) -> tuple[Cache, mtp.Window]:
    """The cache with the first `kept` of the tokens fed to each row of `before`, and the MTP layer's window on them."""
    cache = cache.replace(lengths_B=before.lengths_B + kept_B)
    window = mtp.cached_window(fed_BT, hidden_BTD, jnp.ones_like(fed_BT), before, cache)
    tokens, hidden = mtp.last_of(window, kept_B, before.last_tokens_BU.shape[1])
    return cache.replace(last_tokens_BU=tokens, last_hidden_BUD=hidden.astype(cache.last_hidden_BUD.dtype)), window


def draft(params: Any, config: ModelConfig, cache: Cache, window: mtp.Window, kept_B: jax.Array, next_B: jax.Array,
          steps: int) -> tuple[jax.Array, Cache]:
    """The most likely tokens [B, steps] after `next`, which itself follows the tokens kept; and the cache.

    Step after step the MTP layer goes over the window with the guess of the step before. Keys that rest on a guess are
    made anew when the next window covers them. Rows that kept nothing are left alone.
    """
    width, rows = window.tokens_BW.shape[1], jnp.arange(len(next_B))
    last_B = cache.last_tokens_BU.shape[1] + kept_B - 1  # the place of the newest token kept
    tokens = jnp.pad(window.tokens_BW, ((0, 0), (0, steps + 1))).at[rows, last_B + 1].set(next_B)
    known_BW = jnp.broadcast_to((kept_B > 0)[:, None], window.tokens_BW.shape)

    def step(carry: tuple, k: jax.Array) -> tuple[tuple, jax.Array]:
        h_BWD, tokens, cache = carry
        ahead_BW = lax.dynamic_slice_in_dim(tokens, k + 1, width, 1)
        h_BWD, _, cache = mtp.step(params["mtp"], config, params["embedding"], window, k, h_BWD, ahead_BW, known_BW,
                                   cache, Request())
        guess_B = jnp.argmax(unembed(params, config, h_BWD[rows, last_B]), -1).astype(jnp.int32)
        return (h_BWD, tokens.at[rows, last_B + 2 + k].set(guess_B), cache), guess_B

    (_, _, cache), drafts = lax.scan(step, (window.hidden_BWD, tokens, cache), jnp.arange(steps))
    return drafts.T, cache
