"""FP8 weights against the converter of checkpoints, and the engine on them against the same weights turned back."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import glm5_jax as glm5
from glm5_jax.checkpoint import fp8 as released
from glm5_jax.core.params import path_name
from glm5_jax.infer.engine import Engine
from glm5_jax.infer.fp8 import Fp8, quantised
from glm5_jax.infer.request import Sampling
from tests.infer.replay import CONFIG, params
from tests.infer.test_engine import finish_one, IDS, OPTIONS
from tests.model.reference import MICRO, random_params, RICH

PLAIN = CONFIG.replace(num_nextn_predict_layers=0)  # as an engine without drafts has it
# A matrix of several blocks in every form: plain, heads behind, heads before, stacks of experts.
WIDE = MICRO.replace(hidden_size=130, num_hidden_layers=1, mlp_layer_types=("sparse",), indexer_types=("full",),
                     num_attention_heads=3, qk_nope_head_dim=50, v_head_dim=60, q_lora_rank=131)


def leaves(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, Fp8))}


@functools.cache
def turned_back(version: int) -> Any:
    packed, _ = quantised(PLAIN, params(version))
    return jax.tree.map(lambda x: x.astype(jnp.float32), packed, is_leaf=lambda x: isinstance(x, Fp8))


@pytest.mark.parametrize("name, rows", [
    ("layers/0/attention/q_a", 130), ("layers/0/attention/k_b", 8), ("layers/0/attention/o", 180),
    ("layers/0/indexer/q", 131), ("layers/0/moe/experts/down", 8), ("layers/0/moe/shared/gate", 130),
    ("mtp/layer/attention/q_b", 131)])
def test_values_and_scales_are_those_of_the_converter(name, rows):
    weights = random_params(WIDE, 1)
    weights["layers"]["0"]["attention"]["q_a"] = weights["layers"]["0"]["attention"]["q_a"].at[..., :128, :].set(0)
    exact, found = leaves(weights)[name], leaves(quantised(WIDE, weights)[0])[name]
    width = exact.shape[-1] if name.endswith(("o", "q_a", "down", "gate")) else exact.shape[-1] * exact.shape[-2]
    matrices = np.asarray(exact).reshape(-1, rows, width)
    values = np.asarray(found.values).reshape(matrices.shape)
    scales = np.asarray(found.scale).reshape(len(matrices), *found.scale.shape[-2:])
    back = np.asarray(found.astype(jnp.float32)).reshape(matrices.shape)
    for i, matrix in enumerate(matrices):
        expected, scale, _ = released.quantise(matrix)
        np.testing.assert_array_equal(values[i].view(np.uint8), expected.view(np.uint8))
        np.testing.assert_array_equal(scales[i], scale)
        np.testing.assert_array_equal(back[i], released.dequantise(expected, scale, np.dtype(np.float32)))
    assert found.values.dtype == ml_dtypes.float8_e4m3fn and found.astype(jnp.bfloat16).dtype == jnp.bfloat16


def test_what_is_quantised_is_what_the_release_quantises():
    """By the number of elements, which the two layouts share."""
    weights = random_params(RICH, 0)
    packed = leaves(jax.eval_shape(lambda: quantised(RICH, weights)[0]))
    theirs = sum(np.size(tensor) for name, tensor in glm5.to_hf(RICH, weights).items()
                 if released.is_quantised(name, np.shape(tensor)))
    assert sum(leaf.values.size for leaf in packed.values() if isinstance(leaf, Fp8)) == theirs > 0


def test_the_error_is_that_of_the_weights():
    weights = leaves(params())
    packed, error = quantised(PLAIN, params())
    square_error, square = 0.0, 0.0
    for name, leaf in leaves(packed).items():
        exact = np.float64(weights[name])
        if isinstance(leaf, Fp8):
            square_error += ((leaf.astype(jnp.float32) - exact) ** 2).sum()
            square += (exact**2).sum()
        else:
            np.testing.assert_array_equal(leaf, exact)
    np.testing.assert_allclose(error, (square_error / square) ** 0.5, rtol=1e-4)
    assert 0.01 < error < 0.04


def test_an_engine_quantises_at_every_push():
    sampling = Sampling(10, seed=4)
    one, plain = Engine(params(0), PLAIN, fp8=True, **OPTIONS), Engine(turned_back(0), PLAIN, **OPTIONS)
    held, whole = (sum(x.nbytes for x in jax.tree.leaves(each._params["layers"])) for each in (one, plain))
    assert held < 0.35 * whole and plain.quantisation_error == 0
    for version in (1, 2):
        error = float(quantised(PLAIN, params(version - 1))[1])
        np.testing.assert_allclose(one.quantisation_error, error, rtol=1e-5)
        assert_same(finish_one(one, IDS, sampling), finish_one(plain, IDS, sampling))
        for each, weights in ((one, params(version)), (plain, turned_back(version))):
            each.pause()
            each.push_weights(weights, version)
            each.resume()
    assert_same(finish_one(one, IDS, sampling), finish_one(plain, IDS, sampling))


def test_every_weight_is_read_where_it_is_quantised():
    packed = jax.eval_shape(lambda: quantised(RICH, random_params(RICH, 0))[0])
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    out = jax.eval_shape(lambda packed, tokens: glm5.forward(packed, RICH, tokens, mtp_steps=2), packed, tokens)
    assert out.mtp_logits.shape == (2, 1, 8, RICH.vocab_size)


def assert_same(one: Any, other: Any) -> None:
    assert one.completion.ids == other.completion.ids and one.completion.versions == other.completion.versions
    np.testing.assert_allclose(one.model_logprobs, other.model_logprobs, atol=1e-5)
