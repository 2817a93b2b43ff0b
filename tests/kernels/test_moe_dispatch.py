"""Grouped products and the way of tokens to their experts and back, against float64 NumPy loops."""

import functools

from hypothesis import given, settings, strategies as st
import jax
from jax import lax
from jax.experimental import checkify
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch as choices
from pallas_kernels.blocks import tuned
from pallas_kernels.moe_dispatch import pallas_gpu, pallas_tpu, tiles, xla
from pallas_kernels.moe_dispatch.api import grouped_matmul
from pallas_kernels.moe_dispatch.permute import combine, dispatch, sort_by_expert
from tests.kernels.harness import TOLERANCE, assert_close, run_with

ROWS = 50
LOADS = {
    "uneven, with rows left over": [7, 0, 20, 1, 13],
    "one group with everything": [0, 0, 50, 0, 0],
    "no rows for anyone": [0, 0, 0, 0, 0],
    "no row left over": [9, 11, 10, 12, 8],
    "a row each": [1, 1, 1, 1, 1],
}


def named(implementation):
    return functools.partial(grouped_matmul, **run_with(implementation)) if implementation else grouped_matmul


def drawn(rows, depth, width, groups, dtype="float32", seed=0):
    """x, w and a cotangent, so that products of bfloat16 are exact in float64."""
    rng = np.random.default_rng(seed)
    shapes = ((rows, depth), (groups, depth, width), (rows, width))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def by_hand(x, w, ct, sizes):
    """The product and its two gradients, in float64."""
    x, w, ct = (np.asarray(array, np.float64) for array in (x, w, ct))
    out, dx, dw = np.zeros(ct.shape), np.zeros(x.shape), np.zeros(w.shape)
    start = 0
    for e, size in enumerate(sizes):
        own = slice(start, start + size)
        out[own], dx[own], dw[e] = x[own] @ w[e], ct[own] @ w[e].T, x[own].T @ ct[own]
        start += size
    return out, dx, dw


@functools.cache
def compiled(implementation):
    """(product, dx, dw) of one program for all loads."""
    def run(x, w, ct, sizes):
        out, pull = jax.vjp(lambda x, w: named(implementation)(x, w, sizes), x, w)
        return out, *pull(ct)
    return jax.jit(run)


def with_gradients(implementation, x, w, ct, sizes):
    return compiled(implementation)(x, w, ct, jnp.asarray(sizes, jnp.int32))


def assert_all_close(found, wanted, dtype="float32"):
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, np.asarray(other, np.float64), dtype)


@pytest.mark.parametrize("implementation", choices.IMPLEMENTATIONS)
@pytest.mark.parametrize("load", LOADS, ids=lambda name: name.replace(" ", "-"))
def test_product_and_gradients_by_hand(implementation, load):
    sizes = LOADS[load]
    x, w, ct = drawn(ROWS, 24, 40, len(sizes))
    wanted = by_hand(x, w, ct, sizes)
    # What lies beyond the groups is nobody's: NaN there may reach neither the product nor a gradient.
    x, ct = (array.at[sum(sizes):].set(jnp.nan) for array in (x, ct))
    assert_all_close(with_gradients(implementation, x, w, ct, sizes), wanted)


@pytest.mark.parametrize("load", LOADS, ids=lambda name: name.replace(" ", "-"))
def test_tiles_of_several_heights(load):
    """All of each height at first, then ever lower ones; what lies beyond the groups is NaN."""
    sizes = LOADS[load]
    x, w, ct = drawn(ROWS, 24, 40, len(sizes))
    wanted = by_hand(x, w, ct, sizes)
    x, ct = (array.at[sum(sizes):].set(jnp.nan) for array in (x, ct))
    product, transposed, outer = (functools.partial(one, heights=(12, 8, 7, 2)) for one in (
        xla.product, xla.product_transposed, xla.outer))
    run = jax.jit(lambda x, w, ct, sizes: (product(x, w, sizes), transposed(ct, w, sizes), outer(x, ct, sizes)))
    assert_all_close(run(x, w, ct, jnp.asarray(sizes, jnp.int32)), wanted)


@pytest.mark.parametrize("implementation", choices.IMPLEMENTATIONS)
def test_bfloat16_is_added_up_in_float32(implementation):
    """More blocks of every width than one, and sums long enough to show a running sum in bfloat16."""
    sizes = [100, 0, 157, 30]
    x, w, ct = drawn(290, 300, 270, len(sizes), "bfloat16")
    found = with_gradients(implementation, x, w, ct, sizes)
    assert all(array.dtype == jnp.bfloat16 for array in found)
    assert_all_close(found, by_hand(x, w, ct, sizes), "bfloat16")


@pytest.mark.parametrize("implementation", choices.IMPLEMENTATIONS)
def test_gradient_is_the_difference_quotient(implementation):
    """The product is linear in x and in w, so a central difference is exact for any step."""
    sizes = LOADS["uneven, with rows left over"]
    x, w, ct = drawn(ROWS, 24, 40, len(sizes))
    dx, dw, _ = drawn(ROWS, 24, 40, len(sizes), seed=1)
    function = lambda x, w: with_gradients(implementation, x, w, ct, sizes)[0]
    _, grad_x, grad_w = with_gradients(implementation, x, w, ct, sizes)
    for along, grad, plus, minus in ((dx, grad_x, (x + dx, w), (x - dx, w)), (dw, grad_w, (x, w + dw), (x, w - dw))):
        difference = ((function(*plus) - function(*minus)) / 2 * ct).sum()
        np.testing.assert_allclose((grad * along).sum(), difference, rtol=1e-4)


@pytest.mark.parametrize("implementation", choices.IMPLEMENTATIONS)
def test_vmap_and_scan(implementation):
    """Batched rows, matrices and sizes, and a loop over layers that carries rows and takes gradients."""
    loads = np.array([[5, 0, 12], [0, 20, 0], [1, 1, 1]], np.int32)
    batches = [drawn(20, 16, 16, 3, seed=seed) for seed in range(3)]
    x, w, ct = (jnp.stack(arrays) for arrays in zip(*batches))

    def run(x, w, ct, sizes):
        out, pull = jax.vjp(lambda x, w: named(implementation)(x, w, sizes), x, w)
        return out, *pull(ct)

    found = jax.jit(jax.vmap(run))(x, w, ct, jnp.asarray(loads))
    for i, sizes in enumerate(loads):
        assert_all_close([array[i] for array in found], by_hand(x[i], w[i], ct[i], sizes))

    def stacked(x, w, sizes):
        return lax.scan(lambda x, layer: (named(implementation)(x, layer[0], layer[1]), None), x, (w, sizes))[0]

    def unrolled(x, w):
        out = x
        for i, sizes in enumerate(loads):
            own = (np.repeat(np.arange(4), [*sizes, 20 - sizes.sum()])[:, None] == np.arange(3)).astype(np.float32)
            out = jnp.einsum("ne,nk,ekm->nm", own, out, w[i], precision="highest")
        return out

    wanted = jax.value_and_grad(lambda x, w: (unrolled(x, w) * ct[0]).sum(), (0, 1))(x[0], w)
    value, grads = jax.jit(jax.value_and_grad(lambda x, w: (stacked(x, w, loads) * ct[0]).sum(), (0, 1)))(x[0], w)
    assert_all_close((value, *grads), (wanted[0], *wanted[1]))


def test_without_a_name_the_platform_chooses():
    x, w, ct = drawn(ROWS, 24, 40, 5)
    sizes = LOADS["uneven, with rows left over"]
    assert_all_close(with_gradients(None, x, w, ct, sizes), by_hand(x, w, ct, sizes))
    shapes = {"x_NK": (8192, 6144), "w_EKM": (32, 6144, 2048)}
    assert all(choices.explain("grouped_matmul", platform, shapes).implementation == "xla"
               for platform in choices.PLATFORMS)


def test_too_deep_a_matrix_is_refused_by_the_tpu_kernel():
    x, w = jnp.zeros((8, 40_000)), jnp.zeros((2, 40_000, 128))
    with pytest.raises(NotImplementedError, match="w_EKM: expected K and M of at most 16384, found 40000 and 128"):
        grouped_matmul(x, w, jnp.zeros(2, jnp.int32), implementation="pallas_tpu", interpret=True)


def test_named_and_compiled_for_a_tpu_it_holds_the_kernel_and_unnamed_not():
    x, w, _ = drawn(64, 256, 128, 4)
    for name, holds in (("pallas_tpu", True), (None, False)):
        traced = jax.jit(functools.partial(grouped_matmul, implementation=name)).trace(x, w, jnp.zeros(4, jnp.int32))
        assert ("tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()) == holds


def test_tpu_kernels_under_the_tpu_interpreter():
    """Its memory starts as NaN, and its pipeline copies blocks in and out as a TPU's does."""
    sizes = [11, 0, 5]
    x, w, ct = drawn(24, 128, 128, 3)
    out, _, dw = by_hand(x, w, ct, sizes)
    run = {"interpret": pltpu.InterpretParams(uninitialized_memory="nan")}
    sizes = jnp.asarray(sizes, jnp.int32)
    assert_all_close((pallas_tpu.product(x, w, sizes, **run), pallas_tpu.outer(x, ct, sizes, **run)), (out, dw))


@pytest.mark.parametrize("wrong, message", [
    (dict(x_NK=jnp.zeros((4, 3, 2))), r"x_NK: expected shape \[N, K\] = \[N, K\], found \[4, 3, 2\]"),
    (dict(w_EKM=jnp.zeros((2, 5, 4))), r"w_EKM: expected shape \[E, K, M\] = \[E, 3, M\], found \[2, 5, 4\]"),
    (dict(group_sizes_E=jnp.zeros(3, jnp.int32)), r"group_sizes_E: expected shape \[E\] = \[2\], found \[3\]"),
    (dict(group_sizes_E=jnp.zeros(2)), r"group_sizes_E: expected a dtype that is integer, found float32"),
    (dict(w_EKM=jnp.zeros((2, 3, 4), jnp.bfloat16)), r"w_EKM: expected the dtype of x_NK, float32, found bfloat16"),
    (dict(implementation="cuda"), r"implementation: expected one of reference, xla, .*, found 'cuda'"),
], ids=["rank", "shape", "groups", "kind", "dtype", "name"])
def test_wrong_arguments(wrong, message):
    right = dict(x_NK=jnp.zeros((4, 3)), w_EKM=jnp.zeros((2, 3, 4)), group_sizes_E=jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**right | wrong)


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_a_kernel_that_cannot_run_says_why(implementation):
    x, w, _ = drawn(8, 16, 16, 2)
    with pytest.raises(NotImplementedError, match=f"{implementation} runs on .* alone"):
        jax.jit(functools.partial(grouped_matmul, implementation=implementation))(x, w, jnp.asarray([4, 4]))
    deep = jax.ShapeDtypeStruct((1, 20_000, 128), jnp.float32)
    if implementation == "pallas_tpu":
        with pytest.raises(NotImplementedError, match="expected K and M of at most 16384, found 20000 and 128"):
            jax.eval_shape(functools.partial(grouped_matmul, implementation=implementation),
                           jax.ShapeDtypeStruct((8, 20_000), jnp.float32), deep, jnp.asarray([8]))


def test_checks():
    x, w, _ = drawn(8, 4, 4, 2)
    checked = checkify.checkify(jax.jit(functools.partial(grouped_matmul, checks=True)))
    error = lambda *args: checked(*args)[0].get()
    assert error(x.at[6:].set(jnp.nan), w, jnp.asarray([4, 2])) is None
    assert "found a sum of 9" in error(x, w, jnp.asarray([4, 5]))
    assert "group_sizes_E" in error(x, w, jnp.asarray([4, -1]))
    assert "x_NK: expected numbers, found NaN" in error(x.at[5].set(jnp.nan), w, jnp.asarray([4, 2]))
    assert "w_EKM: expected numbers, found NaN" in error(x, w.at[1, 0, 0].set(jnp.nan), jnp.asarray([4, 2]))


# Tiles: GLM-5's 32 experts of a device.

ALIGNED = jax.jit(tiles.aligned_visits, static_argnums=(1, 2), static_argnames="rest")
GROUPED = jax.jit(tiles.grouped_visits, static_argnums=(1, 2))


def shares(kind, groups):
    weights = {"even": np.ones(groups), "zipf": 1 / np.arange(1, groups + 1), "one": np.eye(groups)[groups // 2]}[kind]
    return weights / weights.sum()


def spent(name, rows, groups, sizes, depth=6144, width=2048):
    """Rows multiplied, the tiles' whole height counted, in each of the three products of an implementation."""
    def listed(visits, tile):
        row_V, group_V, begin_V, end_V = map(np.asarray, visits)
        return ((end_V > begin_V) & (group_V < groups)).sum() * tile

    if name == "pallas_tpu":
        for deep, rest in ((depth, True), (width, True), (1024, False)):
            tile = pallas_tpu.row_tile_of(rows, groups, deep, 2)
            yield listed(ALIGNED(sizes, rows, tile, rest=rest), tile)
    elif name == "pallas_gpu":
        tile = tiles.row_tile(rows, groups, pallas_gpu.SMALLEST, pallas_gpu.LARGEST)
        yield listed(GROUPED(sizes, rows, tile), tile)
        tile = tiles.row_tile(rows, groups, pallas_gpu.SMALLEST, pallas_gpu.LARGEST_SUMMED)
        yield (-(-sizes // tile)).sum() * tile
    else:
        heights = xla.heights_of(rows, groups, tuned(xla.RowTiles, "grouped_matmul", "xla", name))
        total, rest = 0, sizes
        for height, lower in zip(heights, (*heights[1:], 0)):
            count = np.maximum(-(-(rest - lower) // height), 0)
            total, rest = total + count.sum() * height, rest - count * height
        assert (rest <= 0).all()
        yield total


@pytest.mark.parametrize("name", ["cpu", "elsewhere", "pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize("kind", ["even", "zipf", "one"])
@pytest.mark.parametrize("rows", [1024, 8192, 32768])
def test_tiles_spend_at_most_half_more_than_is_useful(name, kind, rows):
    sizes = np.random.default_rng(rows).multinomial(rows, shares(kind, 32))
    found = list(spent(name, rows, 32, sizes))
    assert all(rows <= count <= 1.5 * rows for count in found), [count / rows for count in found]


def test_too_few_rows_take_the_smallest_tile():
    """A decode step: 64 rows of 32 experts; what is spent is a register's rows per expert that has any."""
    sizes = np.random.default_rng(0).multinomial(64, shares("even", 32))
    assert list(spent("pallas_gpu", 64, 32, sizes)) == [16 * (sizes > 0).sum()] * 2
    assert tiles.row_tile(64, 32, 8, 256) == 8 and tiles.row_tile(64, 1, 8, 256) == 64


@settings(max_examples=60)
@given(st.sampled_from([(3, 8), (40, 8), (61, 16)]), st.lists(st.integers(0, 30), min_size=4, max_size=4))
def test_visits_own_every_row_once(shape, sizes):
    """As lists of work; sizes that exceed the rows are cut."""
    rows, tile = shape
    owner = np.repeat(np.arange(len(sizes) + 1), [*sizes, rows])[:rows]
    lists = {"aligned": ALIGNED(jnp.asarray(sizes), rows, tile, rest=True),
             "owned": ALIGNED(jnp.asarray(sizes), rows, tile, rest=False),
             "grouped": GROUPED(jnp.asarray(sizes), rows, tile)}
    for kind, visits in lists.items():
        found = np.full(rows, -1)
        for row, group, begin, end in np.stack(visits, 1):
            assert begin == end or (row <= begin and end <= row + tile), kind
            assert kind == "grouped" or row % tile == 0 and row < rows, kind
            assert (found[begin:end] == -1).all(), kind
            found[begin:end] = group
        wanted = owner if kind != "owned" else np.where(owner < len(sizes), owner, -1)
        np.testing.assert_array_equal(found, wanted, kind)
    # Every tile is covered from its first row on, and every group is visited.
    aligned = lists["aligned"]
    first = np.asarray(aligned.begin_V)[np.unique(np.asarray(aligned.row_V), return_index=True)[1]]
    np.testing.assert_array_equal(first, np.arange(0, rows, tile))
    assert set(np.asarray(lists["owned"].group_V)) == set(range(len(sizes)))


# Tokens to experts and back.

def choices_of(tokens, active, experts, seed=0):
    rng = np.random.default_rng(seed)
    chosen = np.stack([rng.permutation(experts)[:active] for _ in range(tokens)]).astype(np.int32)
    chosen[3], chosen[5, 0], chosen[6, 1] = -1, experts, -7  # padding, and choices that are none
    return jnp.asarray(chosen)


def test_sorted_by_expert_and_stable():
    chosen = choices_of(20, 3, 4)
    permutation, counts = jax.jit(sort_by_expert, static_argnums=1)(chosen, 4)
    wanted = [(e, n, a) for e in range(4) for n in range(20) for a in range(3) if chosen[n, a] == e]
    np.testing.assert_array_equal(counts, np.bincount([e for e, _, _ in wanted], minlength=4))
    np.testing.assert_array_equal(permutation.token_R, [n for _, n, _ in wanted] + [-1] * (60 - len(wanted)))
    rows = np.full((20, 3), -1)
    for row, (_, n, a) in enumerate(wanted):
        rows[n, a] = row
    np.testing.assert_array_equal(permutation.rows_NA, rows)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dispatch_and_combine_by_hand(dtype):
    """Values and gradients, with NaN in the token that goes nowhere and in the rows that are nobody's."""
    chosen = choices_of(20, 3, 4)
    permutation, _ = sort_by_expert(chosen, 4)
    token, rows = np.asarray(permutation.token_R), np.asarray(permutation.rows_NA)
    rng = np.random.default_rng(1)
    x, dout = (jnp.asarray(rng.standard_normal((20, 6)), dtype) for _ in range(2))
    y, drows = (jnp.asarray(rng.standard_normal((60, 6)), dtype) for _ in range(2))
    weights = jnp.asarray(rng.standard_normal((20, 3)), jnp.float32)
    x, y, drows = x.at[3].set(jnp.nan), *(array.at[token == -1].set(jnp.nan) for array in (y, drows))

    def run(x, y, weights):
        sent, pull_dispatch = jax.vjp(lambda x: dispatch(x, permutation), x)
        out, pull_combine = jax.vjp(lambda y, weights: combine(y, permutation, weights), y, weights)
        return sent, *pull_dispatch(drows), out, *pull_combine(dout)

    wide = lambda array: np.asarray(array, np.float64)
    wanted_sent, wanted_dx, wanted_out = np.zeros((60, 6)), np.zeros((20, 6)), np.zeros((20, 6))
    wanted_dy, wanted_dweights = np.zeros((60, 6)), np.zeros((20, 3))
    for n, a in np.argwhere(rows >= 0):
        row = rows[n, a]
        wanted_sent[row] = wide(x)[n]
        wanted_dx[n] += wide(drows)[row]
        wanted_out[n] += wide(weights)[n, a] * wide(y)[row]
        wanted_dy[row] = wide(weights)[n, a] * wide(dout)[n]
        wanted_dweights[n, a] = wide(dout)[n] @ wide(y)[row]
    wanted = (wanted_sent, wanted_dx, wanted_out, wanted_dy, wanted_dweights)
    assert_all_close(jax.jit(run)(x, y, weights), wanted, dtype)


def test_the_three_make_a_mixture():
    """Sort, products and combination equal every token through every expert, in value and in every gradient."""
    rng = np.random.default_rng(2)
    shapes = {"gate": (4, 16, 8), "up": (4, 16, 8), "down": (4, 8, 16)}
    params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    x, ct = (jnp.asarray(rng.standard_normal((24, 16)), jnp.float32) for _ in range(2))
    chosen = jnp.asarray(np.stack([rng.permutation(4)[:2] for _ in range(24)]), jnp.int32)
    weights = jnp.asarray(rng.random((24, 2)), jnp.float32)

    def ours(params, x, weights):
        permutation, sizes = sort_by_expert(chosen, 4)
        rows = dispatch(x, permutation)
        product = lambda rows, name: grouped_matmul(rows, params[name], sizes)
        return combine(product(jax.nn.silu(product(rows, "gate")) * product(rows, "up"), "down"), permutation, weights)

    def by_every_expert(params, x, weights):
        product = functools.partial(jnp.einsum, precision="highest")
        hidden = jax.nn.silu(product("nd,edf->nef", x, params["gate"])) * product("nd,edf->nef", x, params["up"])
        y_NED = product("nef,efd->ned", hidden, params["down"])
        return product("na,nae,ned->nd", weights, jax.nn.one_hot(chosen, 4), y_NED)

    def measured(mixture):
        value_and_grad = jax.value_and_grad(lambda *args: (mixture(*args) * ct).sum(), (0, 1, 2))
        return jax.tree.leaves(jax.jit(value_and_grad)(params, x, weights))

    assert_all_close(measured(ours), measured(by_every_expert))
