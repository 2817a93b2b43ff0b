"""The compiled half of the engine: slots of one cache, filled row by row and continued all at once.

Two programs serve every request, whatever its length and options. `prefill` feeds one slot a chunk of its prompt, with
no other row in sight; `decode` feeds every slot its newest token, draws the next, and goes on for a block of rounds.
With drafts (see `speculative`) a round draws several tokens. The host alone knows how much of a row counts and hands it
over with every call: a cache row is cut back by saying so, because what lies behind its length stands at later
positions than any query.

B slots, C tokens of a chunk, T tokens fed in a round: the newest and k drafts, N tokens of a block, X stop ids, V
vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any, cast, Sequence

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from glm5_jax.core import mesh as core_mesh
from glm5_jax.core.fp8 import BLOCK
from glm5_jax.infer import speculative
from glm5_jax.infer.sampler import log_distribution, most_likely, pick
from glm5_jax.model.cache import Cache, init_cache, put, put_row, take_row
from glm5_jax.model.config import ModelConfig
from glm5_jax.model.transformer import forward


class Rows(struct.PyTreeNode):
    """Where each slot stands, and how it draws. A slot without room rests."""

    lengths_B: jax.Array      # int32, tokens in the cache
    last_B: jax.Array         # int32, the token after them
    drawn_B: jax.Array        # int32, new tokens drawn so far
    room_B: jax.Array         # int32, how many may be drawn now
    temperature_B: jax.Array  # float32, 0 is greedy
    top_p_B: jax.Array        # float32
    top_k_B: jax.Array        # int32, 0: all
    seed_B: jax.Array         # uint32
    stop_ids_BX: jax.Array    # int32, the rest -1


def rows_of(rows: Sequence[tuple]) -> Rows:
    """The rows of a call, from one tuple of the fields for each slot."""
    dtypes = (np.int32,) * 4 + (np.float32, np.float32, np.int32, np.uint32, np.int32)
    columns: Any = [np.array(column, dtype) for column, dtype in zip(zip(*rows), dtypes)]
    return Rows(*columns)


class Drawn(struct.PyTreeNode):
    """What a block drew, behind what each slot drew tokens are -1; and the rounds that it took."""

    tokens_BN: jax.Array
    logprobs_BN: jax.Array        # float32, under the distribution that was drawn from; NaN where keys are not finite
    model_logprobs_BN: jax.Array  # float32, at temperature 1 over all of the vocabulary
    rounds_B: jax.Array           # int32


def adapted(config: ModelConfig, drafts: int) -> ModelConfig:
    """The config of an engine: without drafts nobody asks the MTP layer, and the cache has no room for it; a mesh does
    not split time, of which a round has too little.

    Raises ValueError for more drafts than the model has steps.
    """
    most = config.mtp_unroll if config.num_nextn_predict_layers else 0
    if not 0 <= drafts <= most:
        raise ValueError(f"drafts: expected 0 to {most} (config.mtp_unroll, where there is an MTP layer), found "
                         f"{drafts}")
    config = config.replace(sharding=dataclasses.replace(config.sharding, time=None))
    return config.replace(mtp_unroll=drafts) if drafts else config.replace(num_nextn_predict_layers=0)


def cache_bytes(config: ModelConfig, slots: int, max_len: int, drafts: int = 0) -> int:
    """The memory of an engine's cache, in bytes, all devices together."""
    cache = jax.eval_shape(lambda: init_cache(adapted(config, drafts), slots, max_len))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache))


def check_mesh(config: ModelConfig, mesh: Mesh, slots: int, fp8: bool) -> None:
    """Raises ValueError where a mesh cannot split the slots evenly, as it splits a batch, or would cut a block of FP8
    weights in two that travels with its scale."""
    def ways(name: str) -> int:
        axes = core_mesh.spec(config.sharding, (name,))[0] or ()
        return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))

    if slots % ways("batch"):
        raise ValueError(f"slots: expected a multiple of {ways('batch')}, by which the mesh splits a batch, found "
                         f"{slots}; change slots, or take a mesh whose axis {config.sharding.batch!r} divides them")
    width, parts = config.moe_intermediate_size, ways("expert_mlp")
    if fp8 and ways("experts") > 1 and parts > 1 and width % (parts * max(BLOCK)):
        raise ValueError(f"fp8: expected moe_intermediate_size to be a multiple of {parts} x {max(BLOCK)}, so that the "
                         f"mesh axis {config.sharding.expert_mlp!r} splits experts into whole blocks, found {width}; "
                         f"take a mesh where that axis is smaller, or fp8=False")


@functools.partial(jax.jit, static_argnames=("config", "slots", "drafts", "max_len"))
def empty(config: ModelConfig, slots: int, drafts: int, max_len: int) -> tuple[Cache, jax.Array]:
    """The cache of an engine in which nothing is held yet, and its first drafts."""
    blank_Bk = jnp.zeros((slots, drafts), jnp.int32)
    return _pinned(config, init_cache(config, slots, max_len)), _split(config, "Bk", blank_Bk)


def _pinned(config: ModelConfig, cache: Cache) -> Cache:
    """Rows split as a batch is, else whole on every device: what one program returns, no other is compiled for."""
    return Cache(**{field.name: _split(config, field.name.rpartition("_")[2], getattr(cache, field.name))
                    for field in dataclasses.fields(Cache)})


def _split(config: ModelConfig, axes: str, x: jax.Array) -> jax.Array:
    return core_mesh.constrain(x, *("batch" if axis == "B" else None for axis in axes), rules=config.sharding)


@functools.partial(jax.jit, static_argnames=("config", "drafts"), donate_argnames="cache")
def prefill(params: Any, config: ModelConfig, cache: Cache, slot: jax.Array, length: jax.Array, tokens_C: jax.Array,
            count: jax.Array, cut_back: jax.Array, drafts: int) -> Cache:
    """Adds the first `count` of the tokens to the slot, behind the first `length` that it holds.

    `cut_back` says that the row held others after these when it was fed last.
    """
    of_row = config.replace(sharding=dataclasses.replace(config.sharding, batch=None))  # one row is not split
    real_1C = (jnp.arange(tokens_C.shape[0]) < count)[None].astype(jnp.int32)
    before = take_row(cache, slot).replace(lengths_B=length[None])
    out = forward(params, of_row, tokens_C[None], segment_ids=real_1C, cache=before)
    one = cast(Cache, out.cache)
    if drafts:
        one = speculative.fill(params, of_row, one, before, tokens_C[None], out.hidden, real_1C, cut_back, drafts)
    return _pinned(config, put_row(cache, slot, one))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def cleared(config: ModelConfig, cache: Cache, slot: jax.Array) -> Cache:
    """The cache with one row empty, not only cut back: where weights gave NaN it would stay, and 0 times NaN is NaN."""
    return _pinned(config, put_row(cache, slot, jax.tree.map(jnp.zeros_like, take_row(cache, slot))))


handed_over = jax.jit(take_row)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def adopted(config: ModelConfig, cache: Cache, slot: jax.Array, one: Cache) -> Cache:
    """The cache with a row that another one handed over."""
    return _pinned(config, put_row(cache, slot, one))


class _Block(struct.PyTreeNode):
    """A block on its way."""

    round: jax.Array
    cache: Cache
    drafts_Bk: jax.Array
    last_B: jax.Array
    count_B: jax.Array  # tokens drawn in this block
    going_B: jax.Array
    drawn: Drawn


@functools.partial(jax.jit, static_argnames=("config", "rounds"), donate_argnames="cache")
def decode(params: Any, config: ModelConfig, cache: Cache, rows: Rows, drafts_Bk: jax.Array, hurry: jax.Array,
           rounds: int) -> tuple[Cache, jax.Array, Drawn]:
    """Continues every slot by `rounds` rounds, until its room is used or a token is drawn that it stops at.

    With `hurry` the block ends as soon as one slot does: another request waits for its place. Returns the cache, the
    drafts for the next block (any do for a slot's first), and what was drawn.
    """
    slots, drafts = drafts_Bk.shape
    # Few queries read fewer rows where each gathers its own than where all go over the cache.
    gathers = (1 + drafts) * config.index_topk < cache.max_len
    fed_config = config.replace(dense_attention_max_len=0) if gathers else config
    # An index key that is not finite is never selected: untold, tokens would be drawn as if it were not there.
    held_BS = jnp.arange(cache.max_len) < rows.lengths_B[:, None]
    sound_B1 = (jnp.isfinite(cache.index_keys_NBSC).all((0, 3)) | ~held_BS).all(1, keepdims=True)
    started_B, blank = rows.room_B > 0, jnp.zeros((slots, rounds * (1 + drafts)))

    def going_on(s: _Block) -> jax.Array:
        return (s.round < rounds) & s.going_B.any() & ~(hurry & (started_B & ~s.going_B).any())

    def one(s: _Block) -> _Block:
        fed_BT = jnp.concatenate([s.last_B[:, None], s.drafts_Bk], 1)
        real_BT = jnp.broadcast_to(s.going_B[:, None], fed_BT.shape).astype(jnp.int32)
        out = forward(params, fed_config, fed_BT, segment_ids=real_BT, cache=s.cache)
        index_BT = jnp.arange(1 + drafts) + s.count_B[:, None]
        token_BT, logprob_BT, model_logprob_BT = draw(out.logits, rows, rows.drawn_B[:, None] + index_BT)

        stops_BT = (token_BT[..., None] == rows.stop_ids_BX[:, None]).any(-1)
        unstopped = jnp.pad(jnp.cumsum(stops_BT, 1)[:, :-1] == 0, ((0, 0), (1, 0)), constant_values=True)
        new_BT = (s.going_B[:, None] & unstopped & speculative.agreeing(s.drafts_Bk, token_BT)
                  & (index_BT < rows.room_B[:, None]))
        new_B = new_BT.sum(1, dtype=jnp.int32)
        last_B = jnp.where(new_B > 0, jnp.take_along_axis(token_BT, new_B[:, None] - 1, 1)[:, 0], s.last_B)
        count_B = s.count_B + new_B

        cache, drafts_Bk = cast(Cache, out.cache), s.drafts_Bk
        if drafts:
            cache, window = speculative.keep(cache, s.cache, fed_BT, out.hidden, new_B)
            drafts_Bk, cache = speculative.draft(params, config, cache, window, new_B, last_B, drafts)
        places = jnp.where(new_BT, index_BT, blank.shape[1])
        write = lambda x_BN, new: put(x_BN, places, new)
        return _Block(s.round + 1, cache, drafts_Bk, last_B, count_B,
                      s.going_B & ~(new_BT & stops_BT).any(1) & (count_B < rows.room_B),
                      Drawn(write(s.drawn.tokens_BN, token_BT),
                            write(s.drawn.logprobs_BN, jnp.where(sound_B1, logprob_BT, jnp.nan)),
                            write(s.drawn.model_logprobs_BN, model_logprob_BT), s.drawn.rounds_B + s.going_B))

    nobody = jnp.zeros(slots, jnp.int32)
    start = _Block(jnp.zeros((), jnp.int32), cache.replace(lengths_B=rows.lengths_B), drafts_Bk, rows.last_B, nobody,
                   started_B, Drawn(blank.astype(jnp.int32) - 1, blank, blank, nobody))
    end = lax.while_loop(going_on, one, start)
    return _pinned(config, end.cache), _split(config, "Bk", end.drafts_Bk), end.drawn


def draw(logits_BTV: jax.Array, rows: Rows, index_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """New token `index` of every row: tokens [B, T], and their log-probs under what was drawn from and the model's."""
    length = index_BT.shape[1]
    logits_NV = logits_BTV.reshape(-1, logits_BTV.shape[-1])
    temperature, top_p, top_k, seed = (jnp.repeat(x_B, length) for x_B in (rows.temperature_B, rows.top_p_B,
                                                                           rows.top_k_B, rows.seed_B))
    greedy_N, best_N = temperature == 0, most_likely(logits_NV)
    of_token = lambda x_NV, token_N: jnp.take_along_axis(x_NV, token_N[:, None], -1)[:, 0]
    top_N = of_token(logits_NV, best_N)
    total_N = jnp.exp(logits_NV - top_N[:, None]).sum(-1)
    model_logprob = lambda token_N: of_token(logits_NV, token_N) - top_N - jnp.log(total_N)

    def sampled() -> tuple[jax.Array, jax.Array]:
        log_p = log_distribution(logits_NV, jnp.where(greedy_N, 1, temperature), jnp.where(greedy_N, 1, top_p),
                                 jnp.where(greedy_N, 0, top_k))
        uniform_N = jax.vmap(lambda *token: jax.random.uniform(token_key(*token)))(seed, index_BT.reshape(-1))
        token_N = jnp.where(greedy_N, best_N, pick(jnp.exp(log_p), uniform_N))
        return token_N, of_token(log_p, token_N)

    token_N, logprob_N = lax.cond(greedy_N.all(), lambda: (best_N, model_logprob(best_N)), sampled)
    token_BT, logprob_BT, model_BT = (x_N.reshape(index_BT.shape)
                                      for x_N in (token_N, logprob_N, model_logprob(token_N)))
    return token_BT, logprob_BT, model_BT


def token_key(seed: jax.Array, index: jax.Array) -> jax.Array:
    """The key that draws new token `index` of a request: of nothing but these two, so that any run can continue."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index)
