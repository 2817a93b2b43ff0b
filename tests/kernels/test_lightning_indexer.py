"""Index scores and their selection, every implementation against float64 NumPy and the contract by brute force."""

import jax
from jax import lax
from jax.experimental import checkify
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.blocks import SelectionBlocks
from pallas_kernels.lightning_indexer import reference, xla
from tests.kernels.harness import (
    IMPLEMENTATIONS, SCALE, assert_close, indexed, numerical_gradient, run_with, scores_of, selection_of)

scored = pytest.mark.parametrize("implementation", IMPLEMENTATIONS["index_scores"])
selecting = pytest.mark.parametrize("implementation", IMPLEMENTATIONS["select_topk"])


def packed(case):
    """Two sequences in each row, each with positions of its own, then padding."""
    keys = case.k_positions.shape[1]
    segments = np.tile(np.repeat([1, 2, 0], [keys // 3, keys - keys // 3 - 2, 2]), (len(case.k_positions), 1))
    positions = np.where(segments == 2, case.k_positions - keys // 3, case.k_positions)
    last = slice(keys - case.q_positions.shape[1], keys)
    return case._replace(k_segments=segments, q_segments=segments[:, last],
                         k_positions=positions, q_positions=positions[:, last])


def left_padded(case):
    keys = case.k_positions.shape[1]
    segments = np.tile((np.arange(keys) >= keys // 2).astype(np.int32), (len(case.k_positions), 1))
    segments[1] = 0  # nothing but padding
    positions = np.maximum(case.k_positions - keys // 2, 0)
    last = slice(keys - case.q_positions.shape[1], keys)
    return case._replace(k_segments=segments, q_segments=segments[:, last],
                         k_positions=positions, q_positions=positions[:, last])


def shuffled(case):
    """A cache whose slots are in no order."""
    order = np.random.default_rng(1).permutation(case.k_positions.shape[1])
    return case._replace(k_BSC=case.k_BSC[:, order], k_positions=case.k_positions[:, order],
                         k_segments=case.k_segments[:, order])


def all_zero(case):
    """Every product negative, so that all scores are zeros, of either sign."""
    return case._replace(q_BTIC=np.abs(case.q_BTIC), k_BSC=-np.abs(case.k_BSC))


def with_nan(case):
    case.k_BSC[:, [1, 4]] = np.nan
    case.q_BTIC[0, 1] = np.nan
    return case


CASES = {
    "causal": indexed(5, 11),
    "one query": indexed(1, 9),
    "longer than a block": indexed(70, 130, batch=1),
    "more queries than keys": indexed(9, 4),
    "packed": packed(indexed(11, 11)),
    "left padding": left_padded(indexed(6, 12)),
    "no order": shuffled(indexed(4, 13)),
    "all zero": all_zero(indexed(5, 11)),
    "NaN": with_nan(indexed(5, 11)),
}


@scored
@pytest.mark.parametrize("name, dtype", [(name, "float32") for name in CASES] + [("longer than a block", "bfloat16")])
def test_scores(name, dtype, implementation):
    """Whole numbers are exact in bfloat16 too."""
    scores = CASES[name].call(pallas_kernels.index_scores, dtype, scale=SCALE, **run_with(implementation))
    assert scores.dtype == jnp.float32
    np.testing.assert_array_equal(scores, scores_of(CASES[name]))


@scored
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_of_real_numbers(dtype, implementation):
    case = indexed(7, 19, whole=False)
    rounded = case._replace(**{name: np.asarray(jnp.asarray(getattr(case, name), dtype), np.float64)
                               for name in ("q_BTIC", "k_BSC")})
    scores = case.call(pallas_kernels.index_scores, dtype, scale=SCALE, **run_with(implementation))
    assert_close(scores, scores_of(rounded))


@scored
def test_the_lowest_visible_score_is_finite(implementation):
    case = indexed(2, 5)
    low = case._replace(q_BTIC=np.abs(case.q_BTIC) + 1, k_BSC=np.abs(case.k_BSC) + 1,
                        w_BTI=np.full(case.w_BTI.shape, -np.inf))
    scores = low.call(pallas_kernels.index_scores, scale=SCALE, **run_with(implementation))
    expected = np.where(scores_of(case) > -np.inf, np.finfo(np.float32).min, -np.inf)
    np.testing.assert_array_equal(scores, expected)
    chosen = low.call(pallas_kernels.select_topk, scale=SCALE, top_k=2, **run_with(implementation))
    np.testing.assert_array_equal(chosen, selection_of(expected, 2))


@scored
def test_gradient(implementation):
    case = packed(indexed(7, 7, whole=False))
    weights = np.random.default_rng(2).normal(size=(2, 7, 7))

    def expected(q, k, w):
        scores = scores_of(case._replace(q_BTIC=q, k_BSC=k, w_BTI=w))
        return np.sum(weights * np.where(scores > -np.inf, scores, 0) ** 2)

    def found(q, k, w):
        scores = case._replace(q_BTIC=q, k_BSC=k, w_BTI=w).call(
            pallas_kernels.index_scores, scale=SCALE, **run_with(implementation))
        return jnp.sum(weights * jnp.where(scores > -jnp.inf, scores, 0) ** 2)

    floats = case.q_BTIC, case.k_BSC, case.w_BTI
    gradients = jax.jit(jax.grad(found, (0, 1, 2)))(*(jnp.asarray(x, jnp.float32) for x in floats))
    for gradient, slow in zip(gradients, numerical_gradient(expected, *floats)):
        assert_close(gradient, slow)
        assert np.all(np.asarray(gradient)[slow == 0] == 0)  # what is not visible


@selecting
@pytest.mark.parametrize("name, top_k", [(name, 4) for name in CASES] + [
    ("NaN", 1), ("packed", 11), ("causal", 14), ("more queries than keys", 5)])
def test_selection(name, top_k, implementation):
    chosen = CASES[name].call(pallas_kernels.select_topk, scale=SCALE, top_k=top_k, **run_with(implementation))
    assert chosen.dtype == jnp.int32
    np.testing.assert_array_equal(chosen, selection_of(scores_of(CASES[name]), top_k))


@selecting
def test_selection_from_bfloat16_is_the_same(implementation):
    case = CASES["longer than a block"]
    chosen = case.call(pallas_kernels.select_topk, "bfloat16", scale=SCALE, top_k=20, **run_with(implementation))
    np.testing.assert_array_equal(chosen, selection_of(scores_of(case), 20))


@selecting
def test_selection_is_the_same_jitted_mapped_and_scanned(implementation):
    cases = [indexed(5, 11, seed=seed) for seed in range(3)]
    select = lambda *arrays: type(cases[0])(*arrays).call(
        pallas_kernels.select_topk, scale=SCALE, top_k=4, **run_with(implementation))
    stacked = [jnp.asarray(np.stack(arrays)) for arrays in zip(*cases)]
    expected = np.stack([selection_of(scores_of(case), 4) for case in cases])
    np.testing.assert_array_equal(jax.jit(select)(*cases[0]), expected[0])
    np.testing.assert_array_equal(jax.vmap(select)(*stacked), expected)
    scanned = lax.scan(lambda carry, arrays: (carry, select(*arrays)), 0, stacked)[1]
    np.testing.assert_array_equal(scanned, expected)


@scored
def test_scores_are_the_same_mapped_and_their_gradient_too(implementation):
    cases = [indexed(3, 6, seed=seed) for seed in range(2)]

    def total(*arrays):
        scores = type(cases[0])(*arrays).call(pallas_kernels.index_scores, scale=SCALE, **run_with(implementation))
        return jnp.sum(jnp.where(scores > -jnp.inf, scores, 0) ** 2)

    stacked = [jnp.asarray(np.stack(arrays), None if np.asarray(arrays[0]).dtype.kind == "i" else jnp.float32)
               for arrays in zip(*cases)]
    mapped = jax.jit(jax.vmap(jax.value_and_grad(total, (0, 1, 2))))(*stacked)
    for i in range(2):
        one = jax.value_and_grad(total, (0, 1, 2))(*(array[i] for array in stacked))
        for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(one)):
            np.testing.assert_allclose(a[i], b, rtol=1e-6)


@pytest.mark.parametrize("top_k", [1, 5, 128, 300, 400])
@pytest.mark.parametrize("best", [reference.best, xla.best_by_bisection, xla.best_by_sorting])
def test_every_way_of_selecting(best, top_k):
    """Ties, both zeros, both infinities, NaN, both ends of float32, tiny numbers, rows without anything."""
    values = np.float32([-np.inf, -3e38, -2.5, -1.0, -1e-37, -0.0, 0.0, 1e-37, 1.0, 2.5, 3e38, np.inf, np.nan])
    scores = np.random.default_rng(0).choice(values, (2, 7, 300))
    scores[0, 0], scores[0, 1], scores[1, 0] = -np.inf, np.nan, 0
    np.testing.assert_array_equal(jax.jit(best, static_argnums=1)(scores, top_k), selection_of(scores, top_k))


@pytest.mark.parametrize("change", [lambda case: case, packed, left_padded, with_nan])
def test_selection_in_blocks_of_queries_and_keys(change):
    """Neither divides what it cuts."""
    case = change(indexed(5, 11))
    selection = lambda case: case.call(xla.select_topk, scale=SCALE, top_k=4, blocks=SelectionBlocks(2, 4, 1))
    np.testing.assert_array_equal(jax.jit(selection)(case), selection_of(scores_of(case), 4))


def test_no_buffer_of_all_pairs():
    """Selecting for 512 queries takes hardly more memory than for 128."""
    def temporaries(queries):
        case = indexed(queries, 1024, batch=1)
        run = jax.jit(lambda case: case.call(pallas_kernels.select_topk, scale=SCALE, top_k=16))
        return run.lower(case).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(512) < 1.2 * temporaries(128) < 512 * 1024 * 4


@pytest.mark.parametrize("change, named", [
    ({"q_BTIC": np.zeros((2, 5, 3))}, r"q_BTIC: expected shape \[B, T, I, C\] = .*found \[2, 5, 3\]"),
    ({"k_BSC": np.zeros((1, 11, 4))}, r"k_BSC: expected shape \[B, S, C\] = \[2, S, 4\], found \[1, 11, 4\]"),
    ({"w_BTI": np.zeros((2, 5, 2))}, r"w_BTI: expected shape \[B, T, I\] = \[2, 5, 3\], found \[2, 5, 2\]"),
    ({"q_positions": np.zeros((2, 4), int)}, r"q_positions: expected shape \[B, T\] = \[2, 5\], found \[2, 4\]"),
    ({"k_segments": np.zeros((2, 11))}, "k_segments: expected a dtype that is integer, found float32"),
])
@pytest.mark.parametrize("op, more", [("index_scores", {}), ("select_topk", {"top_k": 2})])
def test_wrong_shapes_and_dtypes(op, more, change, named):
    with pytest.raises(ValueError, match=f"{op}: {named}"):
        indexed(5, 11)._replace(**change).call(getattr(pallas_kernels, op), scale=SCALE, **more)


def test_other_wrong_arguments():
    case = indexed(2, 3)
    with pytest.raises(ValueError, match="select_topk: top_k: expected at least 1, found 0"):
        case.call(pallas_kernels.select_topk, scale=SCALE, top_k=0)
    arrays = {name: jnp.asarray(getattr(case, name)) for name in case._fields[3:]}
    q, k, w = (jnp.asarray(x, jnp.float32) for x in case[:3])
    with pytest.raises(ValueError, match="index_scores: k_BSC: expected the dtype of q_BTIC, float32, found bfloat16"):
        pallas_kernels.index_scores(q, k.astype(jnp.bfloat16), w, scale=1.0, **arrays)
    with pytest.raises(ValueError, match="index_scores: w_BTI: expected an array .*found float"):
        pallas_kernels.index_scores(q, k, 1.0, scale=1.0, **arrays)


@pytest.mark.parametrize("op, more", [("index_scores", {}), ("select_topk", {"top_k": 2})])
@pytest.mark.parametrize("name", ["q_BTIC", "k_BSC", "w_BTI"])
def test_checks_find_nan(name, op, more):
    case = indexed(2, 3)
    run = lambda case: case.call(getattr(pallas_kernels, op), scale=SCALE, checks=True, **more)
    run(case)
    getattr(case, name)[0, 0] = np.nan
    with pytest.raises(ValueError, match=f"{op}: {name}: expected numbers, found NaN"):
        run(case)
    error, _ = jax.jit(checkify.checkify(run))(case)
    assert f"{name}: expected numbers, found NaN" in error.get()
