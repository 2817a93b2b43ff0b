"""The released layout in and out: bit for bit, every element once, and errors that name the tensor or the field."""

import json
from pathlib import Path
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import glm5_jax as glm5
from glm5_jax.checkpoint import hf_config, hf_names, safetensors_io
from glm5_jax.checkpoint.safetensors_io import CheckpointError
from tests.model.reference import MICRO, random_params, RICH

BARE = MICRO.replace(num_hidden_layers=1, mlp_layer_types=("dense",), indexer_types=("full",),
                     num_nextn_predict_layers=0)
CONFIGS = {"micro": MICRO.replace(latent_norm_eps=None), "rich": RICH.replace(latent_norm_eps=None), "bare": BARE}
BIAS = "mlp.gate.e_score_correction_bias"


def how_it_runs(config: Any) -> dict[str, Any]:
    """Fields that a checkpoint does not carry."""
    return {name: getattr(config, name) for name in ("remat", "query_chunk", "dense_attention_max_len", "sharding")}


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(directory: Path, name: str, dtype: str = "float32") -> tuple[Any, Any]:
    config = CONFIGS[name].replace(param_dtype=dtype, dtype=dtype)
    params = random_params(config)
    glm5.save_hf(directory, config, params)
    return config, params


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob("*.safetensors")):
        part = safetensors.numpy.load_file(file)
        assert not found.keys() & part.keys()
        found |= part
    return found


def rewrite(directory: Path, change: Any) -> None:
    tensors = tensors_of(directory)
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    found = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in found.items() if value != "absent"}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_changes_no_bit(name, dtype, tmp_path):
    config, params = save(tmp_path, name, dtype)
    config_again, params_again = glm5.load_hf(tmp_path)
    assert_same_bits(params_again, params)
    assert config_again.replace(**how_it_runs(config)) == config
    for tensor, value in tensors_of(tmp_path).items():
        assert value.dtype == jnp.dtype("float32" if tensor.endswith(BIAS) else dtype), tensor


def test_names_and_shapes_of_the_released_layout():
    """Of GLM-5 and GLM-5.2, without allocating: 59,079 tensors, 5 fewer for each shared layer, 791 of MTP."""
    shapes = {entry.name: entry.shape for entry in hf_names.entries(glm5.glm5())}
    mtp = {name for name in shapes if name.startswith("model.layers.78.")}
    assert (len(shapes) - len(mtp), len(mtp)) == (59_079, 791)
    assert len(hf_names.entries(glm5.glm5_2())) == len(shapes) - 5 * glm5.glm5_2().indexer_types.count("shared")
    attention, expert = "model.layers.7.self_attn.", "model.layers.77.mlp.experts.255."
    assert {name: shapes[name] for name in (
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", attention + "q_a_proj.weight",
        attention + "q_b_proj.weight", attention + "kv_a_proj_with_mqa.weight", attention + "kv_b_proj.weight",
        attention + "o_proj.weight", attention + "indexer.wq_b.weight", attention + "indexer.wk.weight",
        attention + "indexer.k_norm.bias", attention + "indexer.weights_proj.weight",
        "model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.down_proj.weight", "model.layers.3.mlp.gate.weight",
        "model.layers.3." + BIAS, expert + "up_proj.weight", expert + "down_proj.weight",
        "model.layers.3.mlp.shared_experts.gate_proj.weight", "model.layers.78.eh_proj.weight",
        "model.layers.78.shared_head.norm.weight")
    } == {
        "model.embed_tokens.weight": (154880, 6144), "model.norm.weight": (6144,), "lm_head.weight": (154880, 6144),
        attention + "q_a_proj.weight": (2048, 6144), attention + "q_b_proj.weight": (16384, 2048),
        attention + "kv_a_proj_with_mqa.weight": (576, 6144), attention + "kv_b_proj.weight": (28672, 512),
        attention + "o_proj.weight": (6144, 16384), attention + "indexer.wq_b.weight": (4096, 2048),
        attention + "indexer.wk.weight": (128, 6144), attention + "indexer.k_norm.bias": (128,),
        attention + "indexer.weights_proj.weight": (32, 6144), "model.layers.2.mlp.gate_proj.weight": (12288, 6144),
        "model.layers.2.mlp.down_proj.weight": (6144, 12288), "model.layers.3.mlp.gate.weight": (256, 6144),
        "model.layers.3." + BIAS: (256,), expert + "up_proj.weight": (2048, 6144),
        expert + "down_proj.weight": (6144, 2048), "model.layers.3.mlp.shared_experts.gate_proj.weight": (2048, 6144),
        "model.layers.78.eh_proj.weight": (6144, 12288), "model.layers.78.shared_head.norm.weight": (6144,)}


def numbered(config: Any) -> Any:
    """Parameters whose every element is another integer."""
    start = 0

    def leaf(spec: Any) -> np.ndarray:
        nonlocal start
        start += spec.size
        return np.arange(start - spec.size, start, dtype=np.int64).reshape(spec.shape)

    return jax.tree.map(leaf, glm5.param_specs(config), is_leaf=lambda x: hasattr(x, "axes"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_element_is_written_once(name):
    tree = {path: np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(numbered(CONFIGS[name]))[0]}
    total = sum(leaf.size for leaf in tree.values())
    host = numbered(CONFIGS[name])
    written = [entry.op.to_hf(*(hf_names.leaf_at(host, path)[index] for path, index in entry.slices))
               for entry in hf_names.entries(CONFIGS[name])]
    assert [x.shape for x in written] == [entry.shape for entry in hf_names.entries(CONFIGS[name])]
    np.testing.assert_array_equal(np.sort(np.concatenate([x.reshape(-1) for x in written])), np.arange(total))
    back = hf_names.from_hf(CONFIGS[name], dict(zip(hf_names.entries(CONFIGS[name]), written)).__getitem__)
    assert_same_bits(back, host)


def test_layouts_of_the_tensors_with_heads():
    """Rows of a head stay together: kv_b holds [keys; values] of each head, the output reads heads in order."""
    tensors = glm5.to_hf(RICH, numbered(RICH))
    attention = numbered(RICH)["layers"]["0"]["attention"]
    one = {name: leaf[0, 0] for name, leaf in attention.items()}
    heads, nope = RICH.num_attention_heads, RICH.qk_nope_head_dim
    prefix = "model.layers.0.self_attn."
    kv_b = tensors[prefix + "kv_b_proj.weight"].reshape(heads, nope + RICH.v_head_dim, RICH.kv_lora_rank)
    q_b = tensors[prefix + "q_b_proj.weight"].reshape(heads, RICH.qk_head_dim, RICH.q_lora_rank)
    o = tensors[prefix + "o_proj.weight"].reshape(RICH.hidden_size, heads, RICH.v_head_dim)
    for h in range(heads):
        np.testing.assert_array_equal(kv_b[h, :nope], one["k_b"][:, h].T)
        np.testing.assert_array_equal(kv_b[h, nope:], one["v_b"][:, h].T)
        np.testing.assert_array_equal(q_b[h], one["q_b"][:, h].T)
        np.testing.assert_array_equal(o[:, h], one["o"][h].T)
    expert = numbered(RICH)["layers"]["2"]["moe"]["experts"]["down"][0, 0, 4]
    np.testing.assert_array_equal(tensors["model.layers.2.mlp.experts.4.down_proj.weight"], expert.T)


def test_gradients_have_names_too():
    params = random_params(MICRO)
    gradient = jax.jit(jax.grad(lambda p: sum((leaf ** 2).sum() for leaf in jax.tree.leaves(p))))(params)
    ours, twice = glm5.to_hf(MICRO, gradient), glm5.to_hf(MICRO, params)
    assert ours.keys() == twice.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, 2 * twice[name], err_msg=name)
        assert type(value) is np.ndarray


@pytest.mark.parametrize("name", ["micro", "rich"])
def test_many_shards(name, tmp_path):
    config, params = save(tmp_path, name)
    one = tensors_of(tmp_path)
    safetensors_io.write(tmp_path, glm5.to_hf(config, params), shard_bytes=4096)
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


def test_a_tree_of_another_config_is_refused():
    params = random_params(MICRO, 0)
    with pytest.raises(ValueError, match=r"norm: expected \(\d+,\), found \(3,\)"):
        glm5.to_hf(MICRO, {**params, "norm": np.ones(3)})
    with pytest.raises(ValueError, match="embedding: expected .*, found nothing"):
        glm5.to_hf(MICRO, {name: leaf for name, leaf in params.items() if name != "embedding"})


def test_an_indexer_in_a_shared_layer_is_unexpected(tmp_path):
    save(tmp_path, "rich")
    name = "model.layers.1.self_attn.indexer.wk.weight"
    rewrite(tmp_path, lambda t: t.update({name: np.zeros((10, 16), np.float32)}))
    with pytest.raises(CheckpointError, match="unexpected.*layers.1.self_attn.indexer.wk"):
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


def parse(**fields: Any) -> Any:
    return hf_config.from_json({"model_type": "glm_moe_dsa", **fields})


@pytest.mark.parametrize("config", [glm5.glm5(), glm5.glm5_2(), *CONFIGS.values(), glm5.tiny()],
                         ids=["glm5", "glm5_2", *CONFIGS, "tiny"])
def test_config_round_trip(config):
    fields = json.loads(json.dumps(hf_config.to_json(config, config.dtype)))
    again = hf_config.from_json(fields).replace(param_dtype=config.param_dtype, **how_it_runs(config))
    assert again == config


def test_absent_fields_are_those_of_glm5():
    config = parse(dtype="bfloat16", num_nextn_predict_layers=1)
    assert config.replace(param_dtype="float32") == glm5.glm5()
    assert parse().num_nextn_predict_layers == 0
    assert parse(num_experts=128).n_routed_experts == 128
    assert parse(num_experts=128, n_routed_experts=64).n_routed_experts == 64
    assert parse(head_dim=192, ep_size=1, moe_layer_freq=1, pretraining_tp=1).qk_rope_head_dim == 64


@pytest.mark.parametrize("fields, full", [
    (dict(), list(range(9))),
    (dict(index_topk_freq=4, index_skip_topk_offset=3), [0, 1, 2, 6]),
    (dict(index_topk_freq=4), [0, 1, 5]),
    (dict(index_topk_freq=4, index_skip_topk_offset=None), [0, 1, 5]),
    (dict(index_topk_freq=4, index_skip_topk_offset=3, index_topk_pattern=None), [0, 1, 2, 6]),
    (dict(index_topk_pattern="FSSFSSFSS", index_topk_freq=4), [0, 3, 6]),
    (dict(index_topk_pattern=["F"] + ["S"] * 8), [0]),
    (dict(indexer_types=["full"] * 2 + ["shared"] * 7, index_topk_pattern="F" * 9), [0, 1]),
    (dict(indexer_types=["full"] * 2 + ["shared"] * 7 + ["full"]), [0, 1])])
def test_which_layers_have_an_indexer(fields, full):
    config = parse(num_hidden_layers=9, **fields)
    assert [i for i, kind in enumerate(config.indexer_types) if kind == "full"] == full


@pytest.mark.parametrize("fields, theta", [
    (dict(), 1e6), (dict(rope_theta=5e4), 5e4), (dict(rope_theta=5e4, rope_scaling=None), 5e4),
    (dict(rope_parameters=dict(rope_theta=8e6, rope_type="default"), rope_theta=5e4), 8e6),
    (dict(rope_parameters=dict(rope_type="default"), rope_theta=5e4), 5e4)])
def test_where_theta_stands(fields, theta):
    assert parse(**fields).rope_theta == theta


@pytest.mark.parametrize("fields, name", [
    (dict(model_type="deepseek_v3"), "model_type"), (dict(hidden_act="gelu"), "hidden_act"),
    (dict(scoring_func="softmax"), "scoring_func"), (dict(rope_parameters=dict(rope_type="yarn")), "rope_type"),
    (dict(indexer_rope_interleave=False), "indexer_rope_interleave"), (dict(hidden_size=0), "hidden_size"),
    (dict(num_hidden_layers="many"), "num_hidden_layers"), (dict(dtype="float8"), "dtype"),
    (dict(index_topk_pattern="FSX"), "indexer_types"), (dict(indexer_types=["shared"] * 78), "indexer_types"),
    (dict(mlp_bias=True), "mlp_bias")])
def test_config_errors_name_the_field(fields, name):
    with pytest.raises(CheckpointError, match=re.escape(name)):
        parse(**fields)


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
