"""The kernels of the indexer and of sparse attention, interpreted, over several tiles with ragged tails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lightning_indexer import pallas_gpu as indexer_gpu
from pallas_kernels.lightning_indexer import pallas_tpu as indexer_tpu
from pallas_kernels.lightning_indexer import ranges
from pallas_kernels.sparse_mla import pallas_gpu as mla_gpu
from pallas_kernels.sparse_mla import pallas_tpu as mla_tpu
from tests.kernels.harness import MLA, SCALE, assert_close, attention_of, indexed, scores_of, selected, selection_of

INDEXERS = {"tpu": (indexer_tpu, {"tiles": indexer_tpu.Tiles(8, 128)}),
            "gpu": (indexer_gpu, {"tiles": indexer_gpu.Tiles(16, 16)})}
SELECTIONS = {"tpu": {"tiles": indexer_tpu.Tiles(8, 1024)}, "gpu": {"tiles": indexer_gpu.Tiles(16, 16), "chunk": 64}}
FORWARDS = {"tpu": (mla_tpu, mla_tpu.Tiles(8, 128)), "gpu": (mla_gpu, mla_gpu.Tiles(16, 16))}
KEYS = {"tpu": 300, "gpu": 70}  # of sparse attention: three tiles, five chunks
LONG = {"tpu": 5000, "gpu": 200}  # of the selection: two groups, four chunks

on_both = pytest.mark.parametrize("platform", ["tpu", "gpu"])


def packed(case):
    """Three sequences, the first of which no query is of, and padding in front; one key is not a number."""
    keys = case.k_positions.shape[1]
    segments = np.tile(1 + np.arange(keys) * 3 // keys, (len(case.k_positions), 1)).astype(np.int32)
    segments[:, :5] = 0
    case.k_BSC[:, keys // 2] = np.nan
    return case._replace(k_segments=segments, q_segments=segments[:, -case.q_positions.shape[1]:])


@on_both
@pytest.mark.parametrize("change", [lambda case: case, packed], ids=["causal", "packed"])
def test_scores_over_tiles(platform, change):
    case = change(indexed(20, 290, batch=2))
    module, options = INDEXERS[platform]
    found = case.call(jax.jit(lambda *args, **names: module.index_scores(
        *args, **names, scale=SCALE, interpret=True, **options)))
    assert_close(found, scores_of(case))


def few(case):
    """Fewer visible keys than are to be selected."""
    keys = case.k_positions.shape[1]
    return case._replace(k_segments=(np.arange(keys) >= keys - 60).astype(np.int32)[None])


@on_both
@pytest.mark.parametrize("change", [lambda case: case, packed, few], ids=["ties", "packed", "few"])
def test_selection_over_tiles(platform, change):
    case = change(indexed(20, LONG[platform], batch=1, heads=2))
    module, _ = INDEXERS[platform]
    found = case.call(module.select_topk, scale=SCALE, top_k=150, interpret=True, **SELECTIONS[platform])
    np.testing.assert_array_equal(found, selection_of(scores_of(case), 150))


@on_both
def test_attention_and_its_gradients_over_tiles(platform):
    module, tiles = FORWARDS[platform]
    case = selected(11, KEYS[platform], 40, heads=3)
    expected, lse = attention_of(*case, **MLA)
    q, kv, indices = (jnp.asarray(x, dtype) for x, dtype in zip(case, (jnp.float32, jnp.float32, jnp.int32)))
    found = module.forward(q, kv, indices, **MLA, tiles=tiles, interpret=True)
    assert_close(found[0], expected)
    assert_close(found[1], lse)

    rng = np.random.default_rng(3)
    d_out, d_lse = rng.normal(size=expected.shape), rng.normal(size=lse.shape)
    d_q, d_kv = gradients(case, expected, lse, d_out, d_lse)
    delta = jnp.asarray((d_out * expected).sum(-1) - d_lse, jnp.float32)
    pull = lambda deterministic: module.backward(
        q, kv, indices, jnp.asarray(lse, jnp.float32), jnp.asarray(d_out, jnp.float32), delta, **MLA, tiles=tiles,
        deterministic=deterministic, interpret=True)
    for deterministic in (True, False) if platform == "gpu" else (True,):
        found = pull(deterministic)
        assert_close(found[0], d_q)
        assert_close(found[1], d_kv)


def gradients(case, out, lse, d_out, d_lse):
    """float64, from p = exp(logits - lse) of the dense mask."""
    mask = np.zeros((*case.indices_BTK.shape[:2], case.kv_BSR.shape[1]))
    for b, t, k in np.ndindex(case.indices_BTK.shape):
        if case.indices_BTK[b, t, k] >= 0:
            mask[b, t, case.indices_BTK[b, t, k]] = 1
    values = case.kv_BSR[..., :MLA["value_dim"]]
    logits = MLA["scale"] * np.einsum("bthr,bsr->bths", case.q_BTHR, case.kv_BSR)
    p = mask[:, :, None] * np.exp(logits - np.where(np.isfinite(lse), lse, 0)[..., None])
    delta = (d_out * out).sum(-1) - d_lse
    d_logits = MLA["scale"] * p * (np.einsum("bthv,bsv->bths", d_out, values) - delta[..., None])
    d_kv = np.einsum("bths,bthr->bsr", d_logits, case.q_BTHR)
    d_kv[..., :MLA["value_dim"]] += np.einsum("bths,bthv->bsv", p, d_out)
    return np.einsum("bths,bsr->bthr", d_logits, case.kv_BSR), d_kv


@on_both
def test_a_row_that_is_not_a_number_reaches_those_that_selected_it(platform):
    module, tiles = FORWARDS[platform]
    case = selected(8, 20, 6, batch=1)
    case.kv_BSR[0, 7] = np.nan
    q, kv, indices = (jnp.asarray(x, dtype) for x, dtype in zip(case, (jnp.float32, jnp.float32, jnp.int32)))
    out, _ = module.forward(q, kv, indices, **MLA, tiles=tiles, interpret=True)
    chose = (case.indices_BTK == 7).any(-1)
    assert chose.any() and not chose.all()
    np.testing.assert_array_equal(np.isnan(out).any((-2, -1)), chose)


def test_keys_divided_among_programs():
    """One query of a sequence, as in decoding: its keys go to several programs, and some of those get none."""
    case = selected(1, 300, 256, heads=2, missing=0.0)
    case.indices_BTK[:] = np.arange(256)
    case.indices_BTK[0, 0, 100:] = -1
    case.indices_BTK[1, 0, :] = -1
    expected, lse = attention_of(*case, **MLA)
    q, kv, indices = (jnp.asarray(x, dtype) for x, dtype in zip(case, (jnp.float32, jnp.float32, jnp.int32)))
    out, found = mla_gpu.forward(q, kv, indices, **MLA, tiles=mla_gpu.Tiles(16, 16), interpret=True)
    assert_close(out, expected)
    assert_close(found, lse)


def test_integers_order_as_floats_do():
    values = jnp.asarray([-jnp.inf, -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-40, 2.0, jnp.inf], jnp.float32)
    keys = np.asarray(ranges.ordered(values))
    assert (np.diff(np.delete(keys, 4)) > 0).all() and keys[4] == keys[5] and keys.min() > ranges.LOWEST
    np.testing.assert_array_equal(ranges.float_of(jnp.asarray(keys)), values)


@pytest.mark.parametrize("word", [1, 0x80000000, 0xF0F00001, 0xFFFFFFFF])
def test_the_nth_set_bit(word):
    places = [place for place in range(32) if word >> place & 1]
    signed = np.full(len(places), word, np.uint32).view(np.int32)
    found = indexer_tpu.nth_bit(jnp.asarray(signed), jnp.arange(len(places), dtype=jnp.int32))
    np.testing.assert_array_equal(found, places)


def test_too_many_keys_for_the_chip_are_refused():
    with pytest.raises(ValueError, match="k_BSC: expected at most 1,048,576 keys.*found 1,048,577"):
        indexer_tpu.selection_tiles(4096, 1_048_577)
