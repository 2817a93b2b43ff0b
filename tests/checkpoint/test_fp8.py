"""FP8 blocks against the definition; what comes through FP8 -> bfloat16 -> FP8; the form of the release."""

import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import glm5_jax as glm5
from glm5_jax.checkpoint import fp8, hf_names, safetensors_io
from glm5_jax.checkpoint.errors import CheckpointError
from tests.checkpoint.directories import assert_same_bits
from tests.model.reference import random_params, RICH

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
SHAPES = [(128, 128), (256, 384), (1, 1), (130, 5), (3, 257), (200, 300)]
# Wide enough that most matrices have several blocks, and edges that are cut off.
WIDE = RICH.replace(hidden_size=136, q_lora_rank=130, moe_intermediate_size=129, intermediate_size=260)


def weights(shape, seed=0, dtype=BF16):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.exp(rng.normal(size=shape))).astype(dtype)


def e4m3_value(byte):
    """What a byte means by the format's definition: sign, four bits of exponent, three of fraction."""
    sign, exponent, fraction = int(byte) >> 7, int(byte) >> 3 & 15, int(byte) & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    return (-1) ** sign * (fraction / 8 * 2**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantised_by_the_definition(shape):
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 0x7f) == 0x7f] = 0
    scale = rng.uniform(0.5, 2, fp8.scale_shape(shape)).astype(np.float32)
    found = fp8.dequantise(codes.view(E4M3), scale, np.dtype(np.float32))
    for i, j in {(0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 2), (0, shape[1] - 1)}:
        assert found[i, j] == np.float32(e4m3_value(codes[i, j]) * float(scale[i // 128, j // 128]))


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_and_rounding_by_the_definition(shape):
    weight = weights(shape).astype(np.float32)
    quantised, scale, error = fp8.quantise(weight)
    table = np.array([e4m3_value(byte) for byte in range(127)])
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            assert scale[i, j] == np.float32(np.abs(weight[block]).max() / np.float32(448))
            exact = np.abs(weight[block].astype(np.float64)) / scale[i, j]
            nearest = np.abs(exact[..., None] - table).min(-1)
            off = np.abs(np.abs(quantised[block].astype(np.float64)) - exact)
            np.testing.assert_allclose(off, nearest, rtol=1e-5, atol=1e-5)
    lost = quantised.astype(np.float64) * np.repeat(np.repeat(scale, 128, 0)[:shape[0]], 128, 1)[:, :shape[1]] - weight
    assert error.max_abs == pytest.approx(np.abs(lost).max(), rel=1e-5, abs=1e-7)
    relative = np.sqrt((lost**2).sum() / (weight.astype(np.float64)**2).sum())
    assert error.relative_rms == pytest.approx(relative, rel=1e-4, abs=1e-6)
    assert error.relative_rms < 0.04


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_through_bfloat16_is_exact(shape):
    first = fp8.quantise(weights(shape))[:2]
    again = fp8.quantise(fp8.dequantise(*first, np.dtype(BF16)))[:2]
    for a, b in zip(first, again):
        assert a.tobytes() == b.tobytes()


def test_scales_of_another_origin_keep_every_weight():
    rng = np.random.default_rng(2)
    quantised = fp8.quantise(weights((256, 256)))[0]
    scale = rng.uniform(1e-3, 1, (2, 2)).astype(np.float32)
    again, scale_again, _ = fp8.quantise(fp8.dequantise(quantised, scale, np.dtype(BF16)))
    assert again.tobytes() == quantised.tobytes()
    np.testing.assert_allclose(scale_again, scale, rtol=2**-8)


@pytest.mark.parametrize("value", [0.0, 1e-40, -1e-45, 3e38, -2.0])
def test_blocks_of_one_value(value):
    quantised, scale, error = fp8.quantise(np.full((130, 3), value, np.float32))
    assert np.isfinite(scale).all() and (scale > 0).all()
    back = fp8.dequantise(quantised, scale, np.dtype(np.float32))
    np.testing.assert_allclose(back, value, rtol=1e-6, atol=2.0**-136)
    assert np.isfinite(error.max_abs) and np.isfinite(error.relative_rms)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value):
    weight = np.ones((300, 300), np.float32)
    weight[200, 7] = value
    with pytest.raises(ValueError, match="rows 128 to 255"):
        fp8.quantise(weight)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fp8") / "GLM-FP8"
    params = random_params(WIDE)
    return directory, params, glm5.save_hf(directory, WIDE, params, fp8=True)


def test_the_form_of_the_release(released):
    """In e4m3 are exactly the matrices of the layers, but router, indexer head weights and MTP projection."""
    directory, _, errors = released
    tensors = safetensors_io.open_directory(directory).tensors
    quantised = {name for name, tensor in tensors.items() if tensor.dtype == E4M3}
    parts = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "indexer.wq_b", "indexer.wk",
             "gate_proj", "up_proj", "down_proj")
    assert quantised == {name for name in tensors if name.endswith(tuple(f".{part}.weight" for part in parts))}
    assert quantised == errors.keys() and all(0 < error.relative_rms < 0.04 for error in errors.values())
    for name in quantised:
        scale = tensors[name + "_scale_inv"]
        assert scale.shape == tuple(-(-size // 128) for size in tensors[name].shape) and scale.dtype == np.float32
    for name in tensors.keys() - quantised:
        bias = name.endswith(("e_score_correction_bias", "_scale_inv"))
        assert tensors[name].dtype == (np.float32 if bias else BF16), name
    stated = json.loads((directory / "config.json").read_text())["quantization_config"]
    left = stated.pop("modules_to_not_convert")
    assert stated == {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                      "weight_block_size": [128, 128]}
    assert {"model.embed_tokens", "model.norm", "model.layers.2.mlp.gate",
            "model.layers.0.self_attn.indexer.weights_proj", "model.layers.0.self_attn.indexers_proj",
            "model.layers.0.self_attn.indexer.k_norm"} <= set(left)
    assert not {name.removesuffix(".weight") for name in quantised} & set(left)


def test_read_as_bfloat16_and_written_again_bit_for_bit(released, tmp_path):
    directory, params, _ = released
    config, loaded = glm5.load_hf(directory)
    assert config.param_dtype == "bfloat16"
    tensors = glm5.to_hf(config, loaded)
    reader = safetensors_io.open_directory(directory)
    for name, value in tensors.items():
        original = np.asarray(reader.read(name))
        if original.dtype == E4M3:
            scale = np.repeat(np.repeat(np.asarray(reader.read(name + "_scale_inv")), 128, 0), 128, 1)
            original = (original.astype(np.float32) * scale[:value.shape[0], :value.shape[1]]).astype(BF16)
        assert value.tobytes() == original.tobytes(), name
    exact = glm5.to_hf(config, params)
    for name in tensors:
        close = np.abs(tensors[name].astype(np.float32) - exact[name]).max() / np.abs(exact[name]).max()
        assert close < 1 / 28 + 2**-7, name  # half a step of e4m3 below 448, and the rounding to bfloat16
    glm5.save_hf(tmp_path / "again", config, loaded, fp8=True)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (directory / file).read_bytes()


def test_read_in_float32_and_onto_a_mesh(released):
    directory, _, _ = released
    _, wanted = glm5.load_hf(directory)
    config, found = glm5.load_hf(directory, dtype="float32")
    assert config.dtype == "float32"
    assert_same_bits(jax.tree.map(lambda x: x.astype(jnp.float32), wanted), found)


def test_a_tensor_that_fp8_cannot_hold_is_named_and_nothing_is_lost(released, tmp_path):
    _, params, _ = released
    glm5.save_hf(tmp_path / "it", WIDE, params)
    before = (tmp_path / "it" / "model.safetensors").read_bytes()
    broken = jax.tree.map(lambda x: x, params)
    broken["layers"]["0"]["attention"]["kv_a"] = broken["layers"]["0"]["attention"]["kv_a"].at[0].set(jnp.nan)
    with pytest.raises(CheckpointError, match=r"tensor model.layers.0.self_attn.kv_a_proj_with_mqa.weight: .* NaN"):
        glm5.save_hf(tmp_path / "it", WIDE, broken, fp8=True)
    assert (tmp_path / "it" / "model.safetensors").read_bytes() == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["it"]


def test_every_kind_of_tensor_of_glm5_has_its_place():
    """Of GLM-5 itself: 78 layers of attention, indexer and feed-forward matrices, and the MTP layer's."""
    entries = hf_names.entries(glm5.glm5())
    quantised = sum(fp8.is_quantised(entry.name, entry.shape) for entry in entries)
    assert quantised == 79 * (5 + 2) + 3 * 3 + 76 * 3 * 257
