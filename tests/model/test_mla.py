"""The forms of attention are equal, in values and gradients, and rows that see nothing give nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.model import dsa, mla
from glm5_jax.model.primitives import rope_table, rotate
from pallas_kernels import sparse_mla
from pallas_kernels.blocks import over_queries
from tests.model import reference
from tests.model.reference import MICRO

B, T, S, K = 2, 5, 9, 4
SCALE = 0.3


@functools.cache
def inputs():
    """(attention parameters, queries [B, T, H, C], latent rows [B, S, R], selection [B, T, K])."""
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=spec.shape).astype(np.float32) * 0.5 for name, spec in mla.specs(MICRO).items()}
    q = rng.normal(size=(B, T, MICRO.num_attention_heads, MICRO.qk_head_dim)).astype(np.float32)
    rows = rng.normal(size=(B, S, MICRO.latent_dim)).astype(np.float32)
    selected = np.full((B, T, K), -1, np.int32)
    for b, t in np.ndindex(B, T):
        keys = np.sort(rng.choice(S, (b + 2 * t) % (K + 1), replace=False))  # none up to K of them
        selected[b, t, :len(keys)] = keys
    return params, q, rows, selected


def expanded(params, q, rows, selected):
    k, v = mla.expand_rows(params, MICRO, rows)
    return mla.attend_dense(q, k, v, dsa.selection_mask(selected, S), SCALE)[0]


def absorbed(params, q, rows, selected):
    mixed, _ = mla.attend_dense(mla.absorb_queries(params, MICRO, q), rows, rows[..., :MICRO.kv_lora_rank],
                                dsa.selection_mask(selected, S), SCALE)
    return mla.values_from_latent(params, mixed)


def gathered(params, q, rows, selected):
    mixed = sparse_mla(mla.absorb_queries(params, MICRO, q), rows, selected, value_dim=MICRO.kv_lora_rank, scale=SCALE)
    return mla.values_from_latent(params, mixed)


FORMS = {"absorbed": absorbed, "gathered": gathered}


def values_and_gradients(form):
    params, q, rows, selected = inputs()
    weight = np.random.default_rng(1).normal(size=(B, T, MICRO.num_attention_heads, MICRO.v_head_dim))

    def loss(params, q, rows):
        out = form(params, q, rows, selected)
        return (out * weight.astype(np.float32)).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(params, q, rows)
    return out, gradients


@functools.cache
def truth():
    return values_and_gradients(expanded)


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_equal(form):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), values_and_gradients(FORMS[form]),
                 truth())


def test_expanded_attention_by_hand():
    params, q, rows, selected = inputs()
    out, _ = truth()
    latent, shared = rows[..., :MICRO.kv_lora_rank], rows[..., MICRO.kv_lora_rank:]
    for b, t, h in np.ndindex(B, T, MICRO.num_attention_heads):
        keys = [s for s in selected[b, t] if s >= 0]
        k = np.array([np.concatenate([latent[b, s] @ params["k_b"][:, h], shared[b, s]]) for s in keys])
        v = np.array([latent[b, s] @ params["v_b"][:, h] for s in keys])
        p = np.exp([SCALE * q[b, t, h] @ key for key in k])
        by_hand = p / p.sum() @ v if keys else np.zeros(MICRO.v_head_dim)
        np.testing.assert_allclose(out[b, t, h], by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["absorbed", "gathered"])
def test_rows_that_see_nothing_are_zero_with_zero_gradient(form):
    out, (_, to_q, to_rows) = values_and_gradients(FORMS[form])
    blind = (inputs()[3] == -1).all(-1)
    assert blind.any()
    assert not np.asarray(out)[blind].any() and not np.asarray(to_q)[blind].any()
    unread = [(b, s) for b in range(B) for s in range(S) if s not in inputs()[3][b]]
    assert all(not np.asarray(to_rows)[b, s].any() for b, s in unread)


def test_bfloat16_attention_accumulates_in_float32():
    """1,000 equal keys: their probabilities cannot be added up in bfloat16."""
    keys = 1000
    q, rows = jnp.zeros((1, 1, 1, 4), jnp.bfloat16), jnp.ones((1, keys, 4), jnp.bfloat16)
    dense, p_dense = mla.attend_dense(q, rows, rows[..., :2], jnp.ones((1, 1, keys), bool), 1.0)
    assert p_dense.dtype == jnp.float32 and dense.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(dense), 1, rtol=2e-2)


def test_probabilities_from_the_log_sum_exp():
    params, q, rows, selected = inputs()
    q = mla.absorb_queries(params, MICRO, q)
    _, lse = sparse_mla(q, rows, selected, value_dim=1, scale=SCALE, return_lse=True)
    p = mla.probabilities(q, dsa.gather_rows(rows, selected), selected >= 0, lse, SCALE)
    logits = SCALE * np.einsum("bthr,btkr->bthk", np.float64(q), rows[np.arange(B)[:, None, None], selected])
    by_hand = reference.softmax(logits, np.broadcast_to((selected >= 0)[:, :, None], logits.shape))
    np.testing.assert_allclose(p, by_hand, rtol=1e-5, atol=1e-6)


def test_rotation_turns_interleaved_pairs():
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, T, 3, 6)).astype(np.float32), rng.integers(0, 5000, (2, T))
    turned = rotate(x, rope_table(positions, 6, 1e4))
    by_hand = [reference.rotate(x[b], positions[b], 1e4) for b in range(2)]
    np.testing.assert_allclose(turned, by_hand, rtol=1e-3, atol=2e-3)  # float32 angles of up to 5,000 radians
    near = rotate(x, rope_table(positions % 10, 6, 1e4))
    np.testing.assert_allclose(near, [reference.rotate(x[b], positions[b] % 10, 1e4) for b in range(2)], atol=1e-5)


def test_the_cheaper_form_is_preferred():
    glm_like = MICRO.replace(kv_lora_rank=512, qk_nope_head_dim=192, v_head_dim=256, qk_rope_head_dim=64,
                             index_head_dim=128)
    assert mla.prefers_absorbed(glm_like, 1, 4096)
    assert not mla.prefers_absorbed(glm_like, 4096, 4096)


@pytest.mark.parametrize("length, chunk", [(1, 2), (5, 2), (6, 3), (3, 8)])
def test_blocks_of_queries_are_put_together_again(length, chunk):
    x, ids = np.arange(2 * length * 3.0).reshape(2, length, 3), np.arange(2 * length).reshape(2, length)
    double, plus = over_queries(lambda x, ids: (x * 2, ids + 1), chunk, jnp.asarray(x), jnp.asarray(ids))
    np.testing.assert_array_equal(double, x * 2)
    np.testing.assert_array_equal(plus, ids + 1)
