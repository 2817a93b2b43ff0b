"""The released layout in and out: bit for bit, in files that appear whole, and errors that name the tensor."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm5_jax as glm5
from glm5_jax.checkpoint.errors import CheckpointError
from tests.checkpoint.directories import (assert_same_bits, BIAS, CONFIGS, edit_config, how_it_runs, rewrite, save,
                                          tensors_of)
from tests.model.reference import MICRO, random_params, RICH


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_changes_no_bit(name, dtype, tmp_path):
    config, params = save(tmp_path, name, dtype)
    config_again, params_again = glm5.load_hf(tmp_path)
    assert_same_bits(params_again, params)
    assert config_again.replace(**how_it_runs(config)) == config
    for tensor, value in tensors_of(tmp_path).items():
        assert value.dtype == jnp.dtype("float32" if tensor.endswith(BIAS) else dtype), tensor


@pytest.mark.parametrize("name", ["micro", "rich"])
def test_many_shards(name, tmp_path):
    config, params = save(tmp_path, name)
    one = tensors_of(tmp_path)
    glm5.save_hf(tmp_path, config, params, shard_bytes=4096)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files) and index["weight_map"].keys() == one.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in one.values())
    assert_same_bits(tensors_of(tmp_path), one)
    assert_same_bits(glm5.load_hf(tmp_path)[1], params)
    glm5.save_hf(tmp_path, config, params)  # and back to one file, nothing stale left
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same_bits(glm5.load_hf(tmp_path)[1], params)


@pytest.mark.parametrize("stored, asked", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_asked_dtype_on_load(stored, asked, tmp_path):
    _, params = save(tmp_path, "micro", stored)
    config, loaded = glm5.load_hf(tmp_path, dtype=asked)
    assert config.dtype == config.param_dtype == asked
    for (path, leaf), original in zip(jax.tree_util.tree_flatten_with_path(loaded)[0], jax.tree.leaves(params)):
        bias = "router_bias" in jax.tree_util.keystr(path)
        assert leaf.dtype == ("float32" if bias else asked)
        np.testing.assert_array_equal(leaf, original if bias else original.astype(asked))


def test_asked_dtype_on_save(tmp_path):
    params = random_params(MICRO)
    glm5.save_hf(tmp_path, MICRO, params, dtype="bfloat16")
    config, loaded = glm5.load_hf(tmp_path)
    assert config.param_dtype == "bfloat16"
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert loaded["embedding"].dtype == jnp.bfloat16
    assert_same_bits(loaded["layers"]["1"]["moe"]["router_bias"], params["layers"]["1"]["moe"]["router_bias"])


def test_a_correction_bias_in_another_dtype_is_written_as_float32(tmp_path):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(MICRO))
    glm5.save_hf(tmp_path, MICRO, params)
    assert tensors_of(tmp_path)[f"model.layers.1.{BIAS}"].dtype == np.float32


def test_one_expert_in_float32_keeps_its_bits(tmp_path):
    save(tmp_path, "micro", "bfloat16")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    precise = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    rewrite(tmp_path, lambda tensors: tensors.update({name: precise}))
    _, params = glm5.load_hf(tmp_path)
    up = params["layers"]["1"]["moe"]["experts"]["up"]
    assert up.dtype == jnp.float32
    np.testing.assert_array_equal(up[0, 0, 2], precise.T)


def test_latent_norm_eps(tmp_path):
    save(tmp_path, "rich")
    assert glm5.load_hf(tmp_path)[0].latent_norm_eps == RICH.rms_norm_eps
    assert glm5.load_hf(tmp_path, latent_norm_eps=1e-6)[0].latent_norm_eps == 1e-6


@pytest.mark.parametrize("change, names", [
    (lambda t: t.pop("model.layers.2.self_attn.o_proj.weight"), ["missing", "model.layers.2.self_attn.o_proj.weight"]),
    (lambda t: t.update({"model.layers.9.extra": np.zeros(2)}), ["unexpected", "model.layers.9.extra"]),
    (lambda t: t.update({"model.norm.weight": np.zeros((17,), np.float32)}), ["model.norm.weight", "[16]", "[17]"]),
    (lambda t: t.update({"lm_head.weight": np.ascontiguousarray(t["lm_head.weight"].T)}),
     ["lm_head.weight", "[64, 16]", "[16, 64]"]),
    (lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.3.")], ["num_nextn_predict_layers"]),
], ids=["missing", "unexpected", "shape", "transposed", "no MTP"])
def test_errors_name_the_tensor(change, names, tmp_path):
    save(tmp_path, "micro")
    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError) as error:
        glm5.load_hf(tmp_path)
    for name in (*names, str(tmp_path)):
        assert name in str(error.value), str(error.value)


def test_what_save_hf_notes_of_the_latent_norm_comes_back(tmp_path):
    config = MICRO.replace(latent_norm_eps=3e-6)
    glm5.save_hf(tmp_path, config, random_params(config, 0))
    assert glm5.load_hf(tmp_path)[0].latent_norm_eps == 3e-6
    assert glm5.load_hf(tmp_path, latent_norm_eps=1e-6)[0].latent_norm_eps == 1e-6


def test_an_indexer_in_a_shared_layer_is_unexpected(tmp_path):
    save(tmp_path, "rich")
    name = "model.layers.1.self_attn.indexer.wk.weight"
    rewrite(tmp_path, lambda t: t.update({name: np.zeros((10, 16), np.float32)}))
    with pytest.raises(CheckpointError, match="unexpected.*layers.1.self_attn.indexer.wk.*layer 1, which shares"):
        glm5.load_hf(tmp_path)


def test_repeated_tables_of_the_mtp_layer_are_accepted(tmp_path):
    _, params = save(tmp_path, "micro")
    table = np.zeros((64, 16), np.float32)
    rewrite(tmp_path, lambda t: t.update({"model.layers.3.embed_tokens.weight": table,
                                          "model.layers.3.shared_head.head.weight": table}))
    assert_same_bits(glm5.load_hf(tmp_path)[1], params)
    config, tied = save(tmp_path, "rich")
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": table}))
    assert_same_bits(glm5.load_hf(tmp_path)[1], tied)
    assert "head" not in tied and config.tie_word_embeddings


def test_an_empty_directory_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="config.json"):
        glm5.load_hf(tmp_path)
    save(tmp_path, "bare")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors"):
        glm5.load_hf(tmp_path)


def test_an_index_may_not_leave_the_directory(tmp_path):
    save(tmp_path, "bare")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "../x"}}))
    with pytest.raises(CheckpointError, match="model.norm.weight"):
        glm5.load_hf(tmp_path)


def test_a_config_without_model_type(tmp_path):
    save(tmp_path, "bare")
    edit_config(tmp_path, model_type="absent")
    with pytest.raises(CheckpointError, match="model_type"):
        glm5.load_hf(tmp_path)


def test_a_checkpoint_that_says_nothing_of_its_dtype(tmp_path):
    """Parameters keep their own, whatever the config computes in."""
    _, params = save(tmp_path, "bare", "bfloat16")
    edit_config(tmp_path, dtype="absent", torch_dtype="bfloat16")
    assert glm5.load_hf(tmp_path)[0].dtype == "bfloat16"
    edit_config(tmp_path, torch_dtype="absent")
    assert_same_bits(glm5.load_hf(tmp_path)[1], params)
