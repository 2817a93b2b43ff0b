"""Everything that can be wrong with a directory: one error that names it, several together, and nothing else ever."""

import json
import os
import random
import resource
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

import glm5_jax as glm5
from glm5_jax.checkpoint import released, safetensors_io
from glm5_jax.checkpoint.errors import CheckpointError, ConfigError
from glm5_jax.checkpoint.safetensors_io import Tensor
from tests.checkpoint.directories import assert_same_bits, edit_config, save
from tests.model.reference import random_params, RICH

Q_A = "model.layers.0.self_attn.q_a_proj.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One directory in float32, where layer 1 shares its indexer, and one in FP8; with what they hold."""
    root = tmp_path_factory.mktemp("originals")
    save(root / "plain", "rich")
    glm5.save_hf(root / "fp8", RICH, random_params(RICH), fp8=True)
    return root


def spoil(originals, directory, change=None, *, kind="plain", **fields):
    """A copy with its tensors and its config changed."""
    shutil.copytree(originals / kind, directory)
    if change is not None:
        reader = safetensors_io.open_directory(directory)
        tensors = {name: np.array(reader.read(name)) for name in reader.tensors}
        change(tensors)
        safetensors_io.write(directory, [Tensor(name, x.dtype, x.shape) for name, x in tensors.items()],
                             tensors.values())
    edit_config(directory, **fields)
    return directory


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def put(name, value):
    return lambda tensors: tensors.update({name: value})


TENSORS = {
    "missing": (lambda t: t.pop(Q_A), [Q_A, "1 missing", "fetch the shards"]),
    "extra": (put("model.layers.0.rubbish", np.ones(2)), ["unexpected tensor 'model.layers.0.rubbish'", "remove it"]),
    "misspelt": (rename(Q_A, Q_A.replace("q_a_proj", "q_a_porj")), ["q_a_porj", f"expected {Q_A}", "rename it"]),
    "shape": (put("model.norm.weight", np.ones(17, np.float32)), ["model.norm.weight", "[16]", "[17]"]),
    "integers": (put("model.norm.weight", np.ones(16, np.int32)), ["model.norm.weight", "F32, BF16", "int32"]),
    "double": (put("model.norm.weight", np.ones(16)), ["model.norm.weight", "F32, BF16", "float64"]),
    "indexer on a shared layer": (put("model.layers.1.self_attn.indexer.wk.weight", np.ones((10, 16), np.float32)),
                                  ["model.layers.1.self_attn.indexer.wk.weight", "layer 1", "indexer_types"]),
    "FP8 vector": (put("model.norm.weight", np.ones(16, ml_dtypes.float8_e4m3fn)), ["model.norm.weight", "no matrix"]),
    "FP8 without scales": (put(Q_A, np.ones((12, 16), ml_dtypes.float8_e4m3fn)),
                           [Q_A, f"{Q_A}_scale_inv", "float32 [1, 1]", "found none"]),
    "scales without FP8": (put(f"{Q_A}_scale_inv", np.ones((1, 1), np.float32)), [f"{Q_A}_scale_inv", "remove them"]),
}


@pytest.mark.parametrize("change, names", TENSORS.values(), ids=TENSORS)
def test_a_wrong_tensor(change, names, originals, tmp_path):
    directory = spoil(originals, tmp_path / "it", change)
    with pytest.raises(CheckpointError) as error:
        glm5.load_hf(directory)
    text = str(error.value)
    assert len(error.value.faults) == 1 and "\n" not in text and type(error.value) is CheckpointError
    for name in [*names, str(directory)]:
        assert name in text, text


@pytest.mark.parametrize("shape, dtype", [((2, 1), np.float32), ((1,), np.float32), ((1, 1), np.float16)])
def test_wrong_scales(shape, dtype, originals, tmp_path):
    directory = spoil(originals, tmp_path / "it", put(f"{Q_A}_scale_inv", np.ones(shape, dtype)), kind="fp8")
    with pytest.raises(CheckpointError, match=rf"{Q_A}: expected scales of float32 \[1, 1\]"):
        glm5.load_hf(directory)


def quantisation(**changes):
    stated = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]} | changes
    return {"quantization_config": stated}


CONFIGS = {
    "index_topk 0": (dict(index_topk=0), ["index_topk", "positive integer", "0"]),
    "more experts than exist": (dict(num_experts_per_tok=99), ["num_experts_per_tok", "at most", "99"]),
    "activation": (dict(hidden_act="gelu"), ["hidden_act", "'silu'", "'gelu'"]),
    "rope scaling": (dict(rope_parameters=None, rope_scaling={"type": "yarn"}), ["rope_scaling", "default", "yarn"]),
    "rope no object": (dict(rope_parameters=[1]), ["rope_parameters", "object", "[1]"]),
    "theta": (dict(rope_parameters={"rope_theta": "big"}), ["rope_parameters.rope_theta", "number", "'big'"]),
    "first layer shares": (dict(indexer_types=["shared"] * 4), ["indexer_types", "'full' first"]),
    "first layer shares, by pattern": (dict(indexer_types=None, index_topk_pattern="SFFF"), ["indexer_types"]),
    "unknown kind": (dict(mlp_layer_types=["dense", "moe", "sparse", "sparse"]), ["mlp_layer_types", "'moe'"]),
    "kinds no list": (dict(mlp_layer_types={"dense": 3}), ["mlp_layer_types", "list of names"]),
    "other architecture": (dict(model_type="llama"), ["model_type", "glm_moe_dsa", "llama"]),
    "no architecture": (dict(model_type="absent"), ["model_type", "found nothing"]),
    "text for a number": (dict(hidden_size="wide"), ["hidden_size", "a number", "'wide'"]),
    "a list for a number": (dict(vocab_size=[[[[[[[[[[64]]]]]]]]]]), ["vocab_size", "a number"]),
    "a fraction": (dict(num_attention_heads=2.5), ["num_attention_heads", "positive integer", "2.5"]),
    "true for a number": (dict(n_routed_experts=True), ["n_routed_experts", "positive integer", "True"]),
    "endless": (dict(rms_norm_eps=float("inf")), ["rms_norm_eps", "positive number", "inf"]),
    "layers without end": (dict(num_hidden_layers=10**12), ["num_hidden_layers", "1 to 1000", "1000000000000"]),
    "negative frequency": (dict(indexer_types=None, index_topk_freq=-4), ["index_topk_freq", "1 or more", "-4"]),
    "number for a truth": (dict(tie_word_embeddings=2), ["tie_word_embeddings", "True or False"]),
    "thousands of digits": (dict(topk_group=10**4000, n_routed_experts=10**4000), ["topk_group", "below 2**53"]),
    "theta beyond floats": (dict(rope_parameters=None, rope_theta=10**400), ["rope_theta", "a number"]),
    "dtype": (dict(dtype="float8"), ["dtype", "'float32' or 'bfloat16'", "float8"]),
    "contradicting heads": (dict(num_key_value_heads=8), ["num_key_value_heads", "num_attention_heads", "8"]),
    "quantised otherwise": (quantisation(quant_method="awq"), ["quantization_config.quant_method", "fp8", "awq"]),
    "blocks": (quantisation(weight_block_size=[128, 0]), ["weight_block_size", "two positive integers", "[128, 0]"]),
    "no blocks": (quantisation(weight_block_size=None), ["weight_block_size", "None"]),
    "quantised no object": (dict(quantization_config="fp8"), ["quantization_config", "an object", "'fp8'"]),
}


@pytest.mark.parametrize("fields, names", CONFIGS.values(), ids=CONFIGS)
def test_a_wrong_config(fields, names, originals, tmp_path):
    directory = spoil(originals, tmp_path / "it", **fields)
    with pytest.raises(ConfigError) as error:
        glm5.load_hf(directory)
    for name in [*names, str(directory / "config.json")]:
        assert name in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"model_type": "glm_moe_dsa", "model_type": "glm_moe_dsa"}',
                                  "[" * 100_000, "\x00", '{"a": 1e}'])
def test_a_broken_config(text, originals, tmp_path):
    directory = spoil(originals, tmp_path / "it")
    (directory / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json"):
        glm5.load_hf(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ConfigError, match="config.json: expected a file, found none"):
        glm5.load_hf(directory)


def test_several_faults_together(originals, tmp_path):
    """Of config and files at once; of many tensors as many as one can read."""
    directory = spoil(originals, tmp_path / "both", hidden_size="wide", index_topk=0, hidden_act="gelu",
                      **quantisation(fmt="e5m2"))
    (directory / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="^5 faults: ") as error:
        glm5.load_hf(directory)
    for name in ("quantization_config.fmt", "hidden_size", "index_topk", "hidden_act", "model.safetensors"):
        assert name in str(error.value)

    def change(tensors):
        for name in list(tensors)[:12]:
            tensors[name] = np.ones(3, np.float32)
        del tensors[list(tensors)[-1]]
        tensors["rubbish"] = np.ones(1)

    with pytest.raises(CheckpointError, match="^14 faults: .*unexpected tensor 'rubbish'.*1 missing.*and 6 more$"):
        glm5.load_hf(spoil(originals, tmp_path / "tensors", change))


@pytest.mark.parametrize("fields", [dict(num_hidden_layers=999, mlp_layer_types=None, indexer_types=None),
                                    dict(n_routed_experts=10**9), dict(vocab_size=10**15, hidden_size=2**50),
                                    dict(num_attention_heads=10**9, num_key_value_heads=10**9)])
def test_a_config_of_another_size_costs_nothing(fields, originals, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="expected"):
        glm5.load_hf(spoil(originals, tmp_path / "it", **fields))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_write_that_fails_ends_at_once(tmp_path, monkeypatch):
    """The tensors behind the one that found the disk full are not made any more."""
    made = []
    to_host = released.streaming.to_host
    monkeypatch.setattr(released.streaming, "to_host", lambda *where: made.append(where) or to_host(*where))

    def full(directory, tensors, values, **options):
        next(values)
        raise OSError("disk full")

    monkeypatch.setattr(released.safetensors_io, "write", full)
    with pytest.raises(OSError, match="disk full"):
        glm5.save_hf(tmp_path / "it", RICH, random_params(RICH))
    assert len(made) == 1 and not os.listdir(tmp_path)


def test_a_directory_that_is_none(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(CheckpointError, match="^2 faults: .*found neither.*config.json: expected a file"):
            glm5.load_hf(path)


def test_a_config_that_is_a_link_to_itself_or_elsewhere(originals, tmp_path):
    directory = spoil(originals, tmp_path / "it")
    (directory / "config.json").unlink()
    for target, message in (("config.json", "expected a file, found none"), ("/etc/passwd", "found a link to /etc")):
        (directory / "config.json").symlink_to(target)
        with pytest.raises(ConfigError, match=message):
            glm5.load_hf(directory)
        (directory / "config.json").unlink()


def test_what_is_not_ours_is_not_overwritten(originals, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for target in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(CheckpointError, match="choose another place"):
            glm5.save_hf(target, RICH, random_params(RICH))
    assert (tmp_path / "thesis.tex").read_text() == "precious" and os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"train": {"steps": 3}}, "broken"])
def test_a_directory_of_something_else_with_a_config_is_not_overwritten(config, tmp_path):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (tmp_path / "it" / "model-lora.safetensors").write_text("precious")
    with pytest.raises(CheckpointError, match="choose another place"):
        glm5.save_hf(tmp_path / "it", RICH, random_params(RICH))
    assert sorted(os.listdir(tmp_path / "it")) == ["config.json", "model-lora.safetensors"]


@pytest.mark.parametrize("dtype", ["float16", "int8", "float8_e4m3fn", "banana"])
def test_only_what_can_be_read_again_is_written(dtype, originals, tmp_path):
    with pytest.raises(CheckpointError, match="dtype: expected 'float32' or 'bfloat16', found"):
        glm5.save_hf(tmp_path / "it", RICH, random_params(RICH), dtype=dtype)
    with pytest.raises(CheckpointError, match="dtype: expected 'float32' or 'bfloat16', found"):
        glm5.load_hf(originals / "plain", dtype=dtype)
    assert not os.listdir(tmp_path)


def test_parameters_of_another_dtype_are_named(tmp_path):
    double = jax.tree.map(lambda x: np.asarray(x, np.float64), random_params(RICH))
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight: .* found float64; pass dtype='float32'"):
        glm5.save_hf(tmp_path / "it", RICH, double)
    glm5.save_hf(tmp_path / "it", RICH, double, dtype="float32")


def test_a_float16_checkpoint_is_read_as_float32(originals, tmp_path):
    def halve(tensors):
        for name, value in tensors.items():
            tensors[name] = value.astype(np.float16)

    config, params = glm5.load_hf(spoil(originals, tmp_path / "it", halve, dtype="float16"))
    assert config.dtype == config.param_dtype == "float32"
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(np.float16).astype(np.float32), random_params(RICH))
    assert_same_bits(params, rounded)


def test_companions_do_not_take_the_place_of_the_checkpoint(originals, tmp_path):
    with pytest.raises(CheckpointError, match="companions: .* found model.safetensors"):
        glm5.save_hf(tmp_path / "it", RICH, random_params(RICH), companions=[originals / "plain" / "model.safetensors"])


def test_what_lies_beside_a_checkpoint_stays_when_it_is_replaced(originals, tmp_path):
    directory = spoil(originals, tmp_path / "it")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "notes").mkdir()
    (directory / "notes" / "one.txt").write_text("mine")
    (directory / "model-00001-of-00009.safetensors").write_text("stale")
    glm5.save_hf(directory, RICH, random_params(RICH))
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors", "notes", "tokenizer.json"]
    assert (directory / "notes" / "one.txt").read_text() == "mine"
    assert_same_bits(glm5.load_hf(directory)[1], random_params(RICH))


JUNK = [None, True, 0, -1, 1, 2, 3.5, 10**6, 10**30, 10**4299, -(2**63), 1e308, float("nan"), "", "x", "full",
        "x" * 10_000, [], {}, [[]], ["full"], {"rope_theta": -1}, [0, 8], [8, 0], "F32", "BF16", "F8_E4M3",
        "glm_moe_dsa"]


def corrupt_json(value, chance):
    """One random place of a JSON value replaced, removed, doubled or renamed."""
    places = []

    def walk(node, parent, key):
        if parent is not None:
            places.append((parent, key))
        if isinstance(node, (dict, list)):
            for name, child in node.items() if isinstance(node, dict) else enumerate(node):
                walk(child, node, name)

    walk(value, None, None)
    parent, key = chance.choice(places)
    what = chance.random()
    if what < 0.6:
        parent[key] = chance.choice(JUNK)
    elif what < 0.8:
        del parent[key]
    elif isinstance(parent, dict):
        names = [f"{key}x", str(key).replace("0", "1"), "rope_scaling", "index_topk_pattern"]
        parent[chance.choice(names)] = parent[key]
    else:
        parent.append(parent[key])
    return value


def corrupt_bytes(text, chance, limit):
    """A few bytes of the first `limit` changed, or the end cut off."""
    text = bytearray(text)
    if chance.random() < 0.2:
        return bytes(text[:chance.randrange(len(text))])
    for _ in range(chance.choice([1, 1, 2, 8])):
        text[chance.randrange(min(limit, len(text)))] = chance.randrange(256)
    return bytes(text)


@pytest.mark.parametrize("kind", ["plain", "fp8"])
def test_500_random_corruptions(kind, originals, tmp_path):
    """Each is refused by our own error, or is harmless; none takes memory or another exception."""
    directory = spoil(originals, tmp_path / "it", kind=kind)
    config, weights = directory / "config.json", directory / "model.safetensors"
    good_config, good_weights = config.read_text(), weights.read_bytes()
    length = int.from_bytes(good_weights[:8], "little")
    header = json.loads(good_weights[8:8 + length])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for seed in range(250):
        chance = random.Random(seed)
        config.write_text(good_config), weights.write_bytes(good_weights)
        match seed % 4:
            case 0:
                config.write_text(json.dumps(corrupt_json(json.loads(good_config), chance)))
            case 1:
                config.write_bytes(corrupt_bytes(good_config.encode(), chance, 10**9))
            case 2:
                text = json.dumps(corrupt_json(json.loads(json.dumps(header)), chance)).encode()
                weights.write_bytes(len(text).to_bytes(8, "little") + text + good_weights[8 + length:])
            case 3:
                weights.write_bytes(corrupt_bytes(good_weights, chance, 8 + length))
        try:
            glm5.load_hf(directory)
        except CheckpointError as error:
            assert error.faults and len(str(error)) < 20_000
            refused += 1
    assert refused > 150
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000  # kB


def test_a_harmless_corruption_still_loads(originals, tmp_path):
    """The counterpart: what is not wrong is not refused."""
    directory = spoil(originals, tmp_path / "it", unheard_of=[1, {"two": 3}], eos_token_id=[1, 2])
    params = glm5.load_hf(directory)[1]
    assert_same_bits(params, jax.tree.map(np.asarray, random_params(RICH.replace(latent_norm_eps=None))))
