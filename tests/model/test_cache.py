"""Whatever way tokens come in through a cache, the outcome is that of one call over the whole row."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm5_jax as glm5
from glm5_jax.model.cache import put_row, take_row
from tests.model.reference import MICRO as BASE, random_params, RICH

LENGTH, CHUNK, ROOM = 24, 8, 25
MICRO = BASE.replace(num_hidden_layers=2, mlp_layer_types=("sparse", "sparse"), indexer_types=("full", "full"))
CONFIGS = {"micro": MICRO, "micro gathered": MICRO.replace(dense_attention_max_len=0, query_chunk=3),
           "sharing": MICRO.replace(indexer_types=("full", "shared"))}
TOKENS = np.random.default_rng(2).integers(0, MICRO.vocab_size, (2, LENGTH)).astype(np.int32)
SELECTED = ("selected",)


@functools.cache
def params(name: str) -> Any:
    return random_params(CONFIGS[name], 4)


@functools.cache
def full(name: str) -> Any:
    name = name.removesuffix(" gathered")
    ones = np.ones(TOKENS.shape, np.int32)
    return glm5.forward(params(name), CONFIGS[name], TOKENS, segment_ids=ones, collect=SELECTED)


def call(name: str, cache: Any, tokens: np.ndarray, segments: np.ndarray | None = None) -> Any:
    segments = np.ones(tokens.shape, np.int32) if segments is None else segments
    return glm5.forward(params(name), CONFIGS[name], tokens, segment_ids=segments, cache=cache, collect=SELECTED)


def close(actual: Any, expected: Any, what: Any = "") -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=5e-5, err_msg=str(what))


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_and_single_tokens_equal_the_full_forward(name):
    """Decoding crosses index_topk at the sixth token: up to there every key is selected."""
    cache, start = glm5.init_cache(CONFIGS[name], 2, ROOM), 0
    for size in (1, 1, 1, 1, 1, 1, 1, CHUNK, CHUNK, 1):
        out = call(name, cache, TOKENS[:, start:start + size])
        close(out.logits, full(name).logits[:, start:start + size], start)
        for what, keys in out.collected.items():
            np.testing.assert_array_equal(keys, full(name).collected[what][:, start:start + size], err_msg=what)
        cache, start = out.cache, start + size
    np.testing.assert_array_equal(cache.lengths_B, [LENGTH, LENGTH])


def feed(name: str, cache: Any, segments: np.ndarray, done: list[int], rows: list[np.ndarray]) -> tuple[Any, list[Any]]:
    """One call whose real tokens are the next ones of each row; returns the cache and the logits of the real tokens."""
    block = np.full(segments.shape, 33, np.int32)
    real = segments != 0
    for b, row in enumerate(rows):
        block[b, real[b]] = row[done[b]:done[b] + real[b].sum()]
        done[b] += real[b].sum()
    out = call(name, cache, block, segments)
    return out.cache, [np.asarray(out.logits)[b, real[b]] for b in range(len(rows))]


@pytest.mark.parametrize("name", ["micro", "micro gathered"])
def test_rows_of_different_lengths_and_padding_anywhere(name):
    blocks = np.array([
        [[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0]],   # right padding
        [[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]],   # left padding, a row that rests
        [[1, 0, 0, 1, 0, 1, 1, 0], [0, 1, 1, 1, 0, 0, 1, 1]],   # holes
    ], np.int32)
    cache, done, logits = glm5.init_cache(CONFIGS[name], 2, ROOM), [0, 0], [[], []]
    for segments in blocks:
        cache, new = feed(name, cache, segments, done, list(TOKENS))
        for b in range(2):
            logits[b].append(new[b])
    np.testing.assert_array_equal(cache.lengths_B, [17, 8])
    for b in range(2):
        close(np.concatenate(logits[b]), full(name).logits[b, :done[b]], b)


@pytest.mark.parametrize("name", ["micro", "micro gathered"])
def test_packed_documents_through_a_cache(name):
    """Row 0 holds 10 tokens of one document and 14 of the next; row 1 one whole document of id 5."""
    row = np.stack([np.concatenate([TOKENS[0, :10], TOKENS[1, :14]]), TOKENS[0]])
    segments = np.array([[1] * 10 + [2] * 14, [5] * LENGTH], np.int32)
    cache, parts = glm5.init_cache(CONFIGS[name], 2, ROOM), []
    for start in range(0, LENGTH, CHUNK):
        out = call(name, cache, row[:, start:start + CHUNK], segments[:, start:start + CHUNK])
        cache = out.cache
        parts.append(out.logits)
    logits = np.concatenate(parts, 1)
    close(logits[0, :10], full(name).logits[0, :10])
    close(logits[0, 10:], full(name).logits[1, :14])
    close(logits[1], full(name).logits[0])


def test_index_keys_are_cached_whichever_path_runs():
    cache, start = glm5.init_cache(MICRO, 2, ROOM), 0
    for name in ("micro", "micro gathered", "micro"):
        out = call(name, cache, TOKENS[:, start:start + CHUNK])
        close(out.logits, full("micro").logits[:, start:start + CHUNK], name)
        cache, start = out.cache, start + CHUNK


def test_the_cache_passed_in_is_unchanged():
    cache = call("micro", glm5.init_cache(MICRO, 2, ROOM), TOKENS[:, :CHUNK]).cache
    before = jax.tree.map(np.array, cache)
    first = call("micro", cache, TOKENS[:, CHUNK:2 * CHUNK])
    again = call("micro", cache, TOKENS[:, CHUNK:2 * CHUNK])
    jax.tree.map(np.testing.assert_array_equal, before, cache)
    np.testing.assert_array_equal(first.logits, again.logits)


def test_a_full_cache_is_an_error():
    cache = glm5.init_cache(MICRO, 2, ROOM)
    for start in range(0, LENGTH, CHUNK):
        cache = call("micro", cache, TOKENS[:, start:start + CHUNK]).cache
    rest = np.zeros((2, CHUNK), np.int32)
    rest[1, :1] = 1  # one token fits
    assert call("micro", cache, TOKENS[:, :CHUNK], rest).cache.lengths_B.tolist() == [24, 25]
    rest[1, 1] = 1
    with pytest.raises(ValueError, match="cache: row 1 .* 24 .* 26, .* max_len is 25"):
        call("micro", cache, TOKENS[:, :CHUNK], rest)
    with pytest.raises(ValueError, match="cache: row 0 .* 32"):
        glm5.forward(params("micro"), MICRO, TOKENS[:, :CHUNK], cache=cache)


def test_rows_can_change_places():
    """With the MTP layer's part, whose rows lie on other axes."""
    rng, empty = np.random.default_rng(0), glm5.init_cache(BASE, 3, ROOM)
    cache = jax.tree.map(lambda x: jnp.asarray(rng.integers(0, 9, x.shape), x.dtype), empty)
    first, last = take_row(cache, jnp.int32(0)), take_row(cache, jnp.int32(2))
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, glm5.init_cache(BASE, 1, ROOM))
    np.testing.assert_array_equal(last.latents_LBSR, cache.latents_LBSR[:, 2:])
    np.testing.assert_array_equal(last.mtp_segment_ids_UBS, cache.mtp_segment_ids_UBS[:, 2:])
    np.testing.assert_array_equal(last.last_hidden_BUD, cache.last_hidden_BUD[2:])
    swapped = put_row(put_row(cache, jnp.int32(0), last), jnp.int32(2), first)
    for place, expected in ((0, last), (1, take_row(cache, jnp.int32(1))), (2, first)):
        jax.tree.map(np.testing.assert_array_equal, take_row(swapped, jnp.int32(place)), expected)


def test_wrong_batch_is_an_error():
    with pytest.raises(ValueError, match="cache: expected 1 rows .* found 2"):
        call("micro", glm5.init_cache(MICRO, 2, ROOM), TOKENS[:1, :CHUNK])
    for batch, length in ((0, 4), (1, 0)):
        with pytest.raises(ValueError, match="init_cache"):
            glm5.init_cache(MICRO, batch, length)


def test_default_positions_continue_each_row():
    """Without segment ids and positions: one document per row, positions from the row's own length onward."""
    cache, _ = feed("micro", glm5.init_cache(MICRO, 2, ROOM), np.array([[1] * 8, [1] * 3 + [0] * 5], np.int32), [0, 0],
                    list(TOKENS))
    step = np.stack([TOKENS[0, 8:9], TOKENS[1, 3:4]])
    out = glm5.forward(params("micro"), MICRO, step, cache=cache)
    close(out.logits[0, 0], full("micro").logits[0, 8])
    close(out.logits[1, 0], full("micro").logits[1, 3])
    np.testing.assert_array_equal(out.cache.positions_BS[:, :9], [range(9), [0, 1, 2, 3] + [0] * 5])


def test_dtype_and_size():
    cache = glm5.init_cache(RICH, 2, ROOM, dtype="bfloat16")
    layers, full_layers, steps = 5, 2, RICH.mtp_unroll
    assert cache.latents_LBSR.shape == (layers + steps, 2, ROOM, RICH.kv_lora_rank + RICH.qk_rope_head_dim)
    assert cache.index_keys_NBSC.shape == (full_layers + steps, 2, ROOM, RICH.index_head_dim)
    for array in (cache.latents_LBSR, cache.index_keys_NBSC, cache.last_hidden_BUD):
        assert array.dtype == jnp.bfloat16
    without = glm5.init_cache(RICH.replace(num_nextn_predict_layers=0), 2, ROOM)
    assert without.latents_LBSR.shape[0] == layers and without.latents_LBSR.dtype == jnp.float32


def test_a_bfloat16_cache_below_a_float32_model():
    cache = glm5.init_cache(MICRO, 2, ROOM, dtype="bfloat16")
    out = call("micro", cache, TOKENS[:, :CHUNK])
    assert jax.tree.map(lambda x: x.dtype, out.cache) == jax.tree.map(lambda x: x.dtype, cache)
    assert out.hidden.dtype == jnp.float32
    # Up to index_topk keys nothing depends on the order of rounded scores.
    np.testing.assert_allclose(out.hidden[:, :5], full("micro").hidden[:, :5], atol=0.2)
