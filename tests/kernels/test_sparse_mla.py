"""Attention over selected rows, every implementation against dense float64 NumPy and its numerical gradient."""

import functools

import jax
from jax import lax
from jax.experimental import checkify
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import blocks
from pallas_kernels.sparse_mla import xla
from tests.kernels.harness import (
    IMPLEMENTATIONS, MLA, Selected, assert_close, attention_of, numerical_gradient, run_with, selected)

everywhere = pytest.mark.parametrize("implementation", IMPLEMENTATIONS["sparse_mla"])

CASES = {
    "few of many": selected(5, 23, 4),
    "half of all": selected(5, 11, 7),
    "all": selected(3, 9, 9, missing=0),
    "more than there are": selected(4, 6, 10),
    "one query": selected(1, 9, 3, batch=3),
    "one head": selected(4, 17, 3, heads=1),
}


def attend(case, dtype="float32", implementation=None, **options):
    """The result and the log-sum-exp."""
    q, kv = (jnp.asarray(x, dtype) for x in case[:2])
    named = run_with(implementation) if implementation else {}
    return pallas_kernels.sparse_mla(q, kv, jnp.asarray(case.indices_BTK), return_lse=True, **MLA, **named, **options)


def rounded(case, dtype):
    """The case as the operation sees it."""
    return case._replace(**{name: np.asarray(jnp.asarray(getattr(case, name), dtype), np.float64)
                            for name in ("q_BTHR", "kv_BSR")})


def weigh(out, lse, seed=3):
    """Any scalar that depends on every value, the log-sum-exp of queries with keys included."""
    rng = np.random.default_rng(seed)
    finite = np.isfinite(lse) if isinstance(lse, np.ndarray) else jnp.isfinite(lse)
    xp = np if isinstance(lse, np.ndarray) else jnp
    return (out * rng.normal(size=out.shape)).sum() + xp.where(finite, lse * rng.normal(size=lse.shape), 0).sum()


def both(case, dtype="float32", **options):
    """The result with the log-sum-exp, and the gradients by q and kv."""
    def run(q, kv):
        found = attend(case._replace(q_BTHR=q, kv_BSR=kv), dtype, **options)
        return weigh(*found), found

    gradients, found = jax.jit(jax.grad(run, (0, 1), has_aux=True))(*(jnp.asarray(x, dtype) for x in case[:2]))
    return found, gradients


def slow_gradients(case):
    return numerical_gradient(lambda q, kv: weigh(*attention_of(q, kv, case.indices_BTK, **MLA)), *case[:2])


@everywhere
@pytest.mark.parametrize("name, dtype", [(name, "float32") for name in CASES] +
                         [("half of all", "bfloat16"), ("few of many", "bfloat16")])
def test_forward_and_gradient(name, dtype, implementation):
    case = rounded(CASES[name], dtype)
    (out, lse), (d_q, d_kv) = both(case, dtype, implementation=implementation)
    assert (out.dtype, lse.dtype, d_q.dtype, d_kv.dtype) == (dtype, jnp.float32, dtype, dtype)
    for found, slow in zip((out, lse, d_q, d_kv), (*attention_of(*case, **MLA), *slow_gradients(case))):
        assert_close(found, slow, dtype)
    empty = (case.indices_BTK < 0).all(-1)
    assert empty.any()
    assert not np.asarray(out, np.float32)[empty].any() and not np.asarray(d_q, np.float32)[empty].any()
    for b, rows in enumerate(np.asarray(d_kv, np.float32)):
        unseen = np.setdiff1d(np.arange(len(rows)), case.indices_BTK[b])
        assert not rows[unseen].any()


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", ["few of many", "half of all"])
@pytest.mark.parametrize("platform, changed", [
    ("cpu", {}), ("tpu", {}), ("cuda", {}), ("cuda", {"gathered_bytes": 200, "dense_up_to": 1}),
    ("cuda", {"logits_bytes": 200, "dense_up_to": 100})], ids=["cpu", "tpu", "cuda", "gathered", "dense"])
def test_every_way_of_cutting_up_is_the_same(monkeypatch, platform, changed, name, deterministic):
    sizes = blocks.tuned(blocks.AttentionBlocks, "sparse_mla", "xla", platform)._replace(**changed)
    for function in ("forward", "backward"):
        monkeypatch.setattr(xla, function, functools.partial(getattr(xla, function), sizes=sizes))
    jax.clear_caches()
    case = CASES[name]
    (out, _), gradients = both(case, implementation="xla", deterministic=deterministic)
    for found, slow in zip((out, *gradients), (attention_of(*case, **MLA)[0], *slow_gradients(case))):
        assert_close(found, slow)
    monkeypatch.undo()
    jax.clear_caches()


@everywhere
@pytest.mark.parametrize("around", ["vmap", "scan"])
def test_mapped_and_scanned(around, implementation):
    cases = [selected(4, 13, 5, seed=seed) for seed in range(3)]
    stacked = Selected(*(jnp.asarray(np.stack(arrays), None if arrays[0].dtype.kind == "i" else jnp.float32)
                         for arrays in zip(*cases)))
    run = lambda arrays: both(Selected(*arrays), implementation=implementation)
    scan = lambda arrays: lax.scan(lambda carry, one: (carry, run(one)), 0, arrays)[1]
    (out, _), gradients = jax.jit(jax.vmap(run) if around == "vmap" else scan)(stacked)
    for i, case in enumerate(cases):
        for found, slow in zip((out, *gradients), (attention_of(*case, **MLA)[0], *slow_gradients(case))):
            assert_close(found[i], slow)


@everywhere
@pytest.mark.parametrize("top_k", [3, 9], ids=["gathered", "masked"])
def test_nan_stays_where_it_was_selected(top_k, implementation):
    """Row 2 is NaN and row 5 infinite: who did not select them sees nothing of it, neither do the rows they share."""
    case = selected(8, 20 if top_k == 3 else 9, top_k, batch=1)
    broken = case._replace(kv_BSR=case.kv_BSR.copy())
    broken.kv_BSR[:, 2], broken.kv_BSR[:, 5] = np.nan, np.inf
    touched = np.isin(case.indices_BTK, [2, 5]).any(-1)
    assert touched.any() and not touched.all()
    clean = case._replace(indices_BTK=np.where(touched[..., None], -1, case.indices_BTK))
    expected, _ = attention_of(*clean, **MLA)
    out, _ = attend(broken, implementation=implementation)
    assert np.isnan(np.asarray(out)[touched]).all()
    assert_close(np.asarray(out)[~touched], expected[~touched])

    spared = both(broken._replace(indices_BTK=clean.indices_BTK), implementation=implementation)[1]
    for found, slow in zip(spared, slow_gradients(clean)):
        assert_close(found, slow)


@everywhere
def test_garbage_in_a_query_without_keys_goes_nowhere(implementation):
    case = CASES["half of all"]
    empty = (case.indices_BTK < 0).all(-1)
    broken = case._replace(q_BTHR=np.where(empty[..., None, None], np.nan, case.q_BTHR))
    for found, slow in zip(both(broken, implementation=implementation)[1], slow_gradients(case)):
        assert_close(found, slow)


@everywhere
def test_what_many_queries_add_to_a_key_is_summed_in_float32(implementation):
    """600 ones: summed in bfloat16 they would stop at 256."""
    queries, heads = 300, 2
    case = Selected(np.zeros((1, queries, heads, 4)), np.ones((1, 5, 4)), np.full((1, queries, 1), 3, np.int32))
    run = lambda kv: attend(case._replace(kv_BSR=kv), "bfloat16", implementation)[0].astype(jnp.float32).sum()
    d_kv = jax.jit(jax.grad(run))(jnp.asarray(case.kv_BSR, jnp.bfloat16))
    expected = np.zeros((1, 5, 4))
    expected[0, 3, :MLA["value_dim"]] = queries * heads
    np.testing.assert_array_equal(np.asarray(d_kv, np.float32), expected)


@everywhere
def test_the_same_bits_in_every_run(implementation):
    case = selected(9, 12, 5, missing=0)
    run = jax.jit(jax.grad(lambda kv: weigh(*attend(case._replace(kv_BSR=kv), implementation=implementation))))
    kv = jnp.asarray(case.kv_BSR, jnp.float32)
    np.testing.assert_array_equal(run(kv), run(kv))


@everywhere
def test_an_index_outside_selects_nothing(implementation):
    case = CASES["few of many"]
    outside = case._replace(indices_BTK=np.where(case.indices_BTK < 0, np.int32([-7, 23, 1000, -1]), case.indices_BTK))
    for a, b in zip(attend(outside, implementation=implementation), attend(case, implementation=implementation)):
        np.testing.assert_array_equal(a, b)


@everywhere
def test_decode(implementation):
    """One token of each of three sequences; beyond its length a cache holds garbage."""
    case = selected(1, 12, 6, batch=3, missing=0)
    lengths = np.int32([12, 5, 0])
    beyond = np.arange(12) >= lengths[:, None]
    garbage = np.where(beyond[..., None], np.nan, case.kv_BSR)
    within = case._replace(indices_BTK=np.where(case.indices_BTK < lengths[:, None, None], case.indices_BTK, -1))
    expected, expected_lse = attention_of(*within, **MLA)
    out, lse = pallas_kernels.sparse_mla_decode(
        jnp.asarray(case.q_BTHR[:, 0], jnp.float32), jnp.asarray(garbage, jnp.float32), case.indices_BTK[:, 0], lengths,
        return_lse=True, **MLA, **run_with(implementation))
    assert_close(out, expected[:, 0])
    assert_close(lse, expected_lse[:, 0])


def test_memory_is_that_of_a_block_of_queries():
    def temporaries(queries):
        q, kv = jnp.zeros((1, queries, 2, 32)), jnp.zeros((1, 4096, 32))
        run = jax.jit(jax.grad(lambda q, kv, i: pallas_kernels.sparse_mla(q, kv, i, scale=1.0, value_dim=32).sum(),
                               (0, 1)))
        program = run.lower(q, kv, jnp.zeros((1, queries, 1024), jnp.int32)).compile()
        return program.memory_analysis().temp_size_in_bytes

    gathered = 128 * 1024 * 32 * 4
    assert temporaries(256) - temporaries(128) < gathered / 4


@pytest.mark.parametrize("change, named", [
    ({"q_BTHR": np.zeros((2, 5, 5))}, r"q_BTHR: expected shape \[B, T, H, R\] = .*found \[2, 5, 5\]"),
    ({"kv_BSR": np.zeros((2, 11, 4))}, r"kv_BSR: expected shape \[B, S, R\] = \[2, S, 5\], found \[2, 11, 4\]"),
    ({"indices_BTK": np.zeros((2, 4, 7), int)}, r"indices_BTK: expected shape \[B, T, K\] = \[2, 5, K\], found"),
    ({"indices_BTK": np.zeros((2, 5, 7))}, "indices_BTK: expected a dtype that is integer, found float"),
])
def test_wrong_shapes_and_dtypes(change, named):
    with pytest.raises(ValueError, match=f"sparse_mla: {named}"):
        attend(CASES["half of all"]._replace(**change))


def test_other_wrong_arguments():
    q, kv, indices = (jnp.asarray(x) for x in CASES["all"])
    with pytest.raises(ValueError, match="value_dim: expected 1 to R = 5, found 6"):
        pallas_kernels.sparse_mla(q, kv, indices, scale=1.0, value_dim=6)
    with pytest.raises(ValueError, match="kv_BSR: expected the dtype of q_BTHR, bfloat16, found float32"):
        pallas_kernels.sparse_mla(q.astype(jnp.bfloat16), kv, indices, scale=1.0, value_dim=3)
    with pytest.raises(ValueError, match=r"sparse_mla_decode: lengths_B: expected shape \[B\] = \[2\], found \[3\]"):
        pallas_kernels.sparse_mla_decode(q[:, 0], kv, indices[:, 0], jnp.ones(3, int), **MLA)


@pytest.mark.parametrize("name, place, value, message", [
    ("q_BTHR", (0, 0, 0, 0), np.nan, "q_BTHR: expected numbers, found NaN"),
    ("kv_BSR", (1, 2, 3), np.nan, "kv_BSR: expected numbers, found NaN"),
    ("indices_BTK", (0, 0, 0), 9, "indices_BTK: expected -1 to S - 1, found -1 to 9"),
    ("indices_BTK", (0, 0, 0), -2, "indices_BTK: expected -1 to S - 1, found -2 to 8"),
])
def test_checks(name, place, value, message):
    case = selected(3, 9, 9, missing=0)
    run = lambda case: attend(case, checks=True)
    run(case)
    getattr(case, name)[place] = value
    with pytest.raises(ValueError, match=message):
        run(case)
    error, _ = jax.jit(checkify.checkify(run))(case)
    assert message in error.get()
