"""Rows gathered by SparseCores and attention over them, interpreted on a CPU; and when they are used."""

import logging

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_mla import choice, gathered, pallas_tpu, sparse_core
from pallas_kernels.sparse_mla.sparse_core import ROWS, SparseCores
from tests.kernels.harness import MLA, assert_close, attention_of, selected

CHIP = SparseCores(cores=1, subcores=2, lanes=16)


def rows_and_indices(rows, count, width=32):
    """Rows of every bit pattern, NaN among them, and indices to them, -1 among them."""
    rng = np.random.default_rng(0)
    return (rng.integers(0, 1 << 16, (rows, width)).astype(np.uint16), rng.integers(-1, rows, count).astype(np.int32))


def unpacked(words):
    """uint16 rows of int32 words of two rows."""
    words = np.asarray(words).view(np.uint32)
    return np.stack([words & 0xffff, words >> 16], 1).reshape(-1, words.shape[1])


def in_order(bits, indices):
    return np.where(indices[:, None] < 0, 0, bits[np.maximum(indices, 0)])


@pytest.mark.parametrize("chip, count", [(CHIP, 150), (SparseCores(2, 2, 8), 20)], ids=["three steps", "one step"])
def test_rows_are_gathered_bit_for_bit(chip, count):
    bits, indices = rows_and_indices(40, count)
    words = sparse_core.gather(jnp.asarray(bits).view(jnp.bfloat16), jnp.asarray(indices), chip, interpret=True)
    filled = np.pad(indices, (0, 2 * len(words) - count), constant_values=-1)
    np.testing.assert_array_equal(unpacked(words), in_order(bits, filled))


def test_no_buffer_is_used_before_its_time(capfd):
    """Three steps of one worker, with the copies as late as they may be. Interpreters copy row by row alone."""
    bits, indices = rows_and_indices(40, 3 * ROWS, width=16)
    words = np.ascontiguousarray((bits[::2] | bits[1::2].astype(np.uint32) << 16).view(np.int32))

    def row_by_row(words_ref, pairs, place_ref, semaphore):
        return [pltpu.make_async_copy(words_ref.at[pl.ds(pairs[row], 1)], place_ref.at[pl.ds(row, 1)], semaphore)
                for row in range(len(pairs))]

    def kernel(*refs):
        sparse_core.gather_kernel(sparse_core.Memory(*refs), steps=3, lanes=16, worker=jnp.int32(0), loop=pl.loop,
                                  fetch=row_by_row)

    in_place = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        kernel, in_specs=[in_place, in_place], out_specs=in_place, scratch_shapes=sparse_core.buffers(words.shape[1]),
        out_shape=jax.ShapeDtypeStruct((3 * ROWS // 2, words.shape[1]), jnp.int32),
        interpret=pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait"))(words, indices)
    np.testing.assert_array_equal(unpacked(out), in_order(bits, indices))
    assert "RACE" not in capfd.readouterr().out  # newer versions raise


@pytest.mark.parametrize("case", [selected(5, 23, 4), selected(3, 6, 18), selected(1, 9, 3, batch=3, heads=1)],
                         ids=["few of many", "more than there are", "one query"])
def test_attention_over_gathered_rows(case):
    q, kv = (jnp.asarray(x, jnp.bfloat16) for x in case[:2])
    out, lse = gathered.forward(q, kv, jnp.asarray(case.indices_BTK), chip=CHIP, interpret=True, **MLA,
                                gathered_bytes=4 * 16 * 128 * 2)  # of four queries
    expected = attention_of(np.asarray(q, np.float64), np.asarray(kv, np.float64), case.indices_BTK, **MLA)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    for found, slow in zip((out, lse), expected):
        assert_close(found, slow, "bfloat16")
    empty = (case.indices_BTK < 0).all(-1)
    assert empty.any() and not np.asarray(out, np.float32)[empty].any()


def test_nan_stays_where_it_was_selected():
    """Also in row 0, which stands in for a key that is missing, and in the row that shares its words."""
    case = selected(8, 20, 3, batch=1)
    q, kv = (jnp.asarray(x, jnp.bfloat16) for x in case[:2])
    touched = np.isin(case.indices_BTK, [0, 7]).any(-1)
    assert touched.any() and not touched.all()
    indices = jnp.asarray(case.indices_BTK)
    run = jax.jit(lambda kv: gathered.forward(q, kv, indices, chip=CHIP, interpret=True, **MLA)[0])
    broken, sound = (np.asarray(run(x), np.float32) for x in (kv.at[:, 0].set(jnp.nan).at[:, 7].set(jnp.inf), kv))
    assert np.isnan(broken[touched]).all()
    np.testing.assert_array_equal(broken[~touched], sound[~touched])


def test_mapped():
    """Two pairs of sequences with their own keys; the queries of both are the same."""
    cases = [selected(2, 9, 3, seed=seed) for seed in range(2)]
    q = jnp.asarray(cases[0].q_BTHR, jnp.bfloat16)
    kv = jnp.asarray(np.stack([case.kv_BSR for case in cases]), jnp.bfloat16)
    run = lambda kv, indices: gathered.forward(q, kv, indices, chip=CHIP, interpret=True, **MLA)[0]
    out = jax.vmap(run)(kv, jnp.asarray(np.stack([case.indices_BTK for case in cases])))
    for i, case in enumerate(cases):
        assert_close(out[i], attention_of(np.asarray(q, np.float64), np.asarray(kv[i], np.float64), case.indices_BTK,
                                          **MLA)[0], "bfloat16")


def shapes(batch=1, queries=1, keys=131072, width=640, top_k=2048):
    return {"q_BTHR": (batch, queries, 64, width), "kv_BSR": (batch, keys, width),
            "indices_BTK": (batch, queries, top_k)}


@pytest.mark.parametrize("form, reason, sizes, dtype, missing", [
    ("gathered", "8,192 rows are moved for a sequence, by tiles 393,216", {"batch": 32}, "bfloat16", None),
    ("gathered", "copies all 131,072 first, for 576 is no multiple of 128", {"width": 576}, "bfloat16", None),
    ("gathered", "by tiles 1,310,720", {"queries": 64}, "bfloat16", None),
    ("tiles", "by tiles 16,842,752", {"queries": 4096, "keys": 32768}, "bfloat16", None),
    ("tiles", "by tiles 6,144", {"keys": 2048}, "bfloat16", None),
    ("tiles", "not 2048 float32 rows of 640", {}, "float32", None),
    ("tiles", "not 2048 bfloat16 rows of 768", {"width": 768}, "bfloat16", None),
    ("tiles", "not 8192 bfloat16 rows of 640", {"top_k": 8192}, "bfloat16", None),
    ("tiles", "a chip without", {}, "bfloat16", "a chip without"),
])
def test_rows_are_gathered_where_that_moves_less(form, reason, sizes, dtype, missing):
    found = choice.form_on_tpu(shapes(**sizes), dtype, missing)
    assert found[0] == form and reason in found[1]


def test_no_sparse_cores_on_this_platform():
    assert "SparseCores" in sparse_core.of_target()


@pytest.mark.parametrize("target, form", [(CHIP, "gathered"), ("there are none", "tiles")])
def test_the_form_that_was_chosen_runs_and_is_logged(monkeypatch, caplog, target, form):
    monkeypatch.setattr(sparse_core, "of_target", lambda: target)
    monkeypatch.setattr(gathered, "forward", lambda *args, chip, **options: ("gathered", chip))
    monkeypatch.setattr(pallas_tpu, "_arrange", lambda *args: pytest.fail("tiles"))
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(
        shapes().values(), (jnp.bfloat16, jnp.bfloat16, jnp.int32))]
    with caplog.at_level(logging.INFO):
        if form == "gathered":
            assert pallas_tpu.forward(*arguments, **MLA) == ("gathered", CHIP)
        else:
            with pytest.raises(pytest.fail.Exception, match="tiles"):
                pallas_tpu.forward(*arguments, **MLA)
    assert f"sparse_mla: pallas_tpu by {form} (" in caplog.text
