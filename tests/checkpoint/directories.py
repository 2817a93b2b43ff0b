"""Small checkpoints in the released layout, and ways to spoil them."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

import glm5_jax as glm5
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
