"""Checkpoints of the released layout in and out: a directory with `config.json` and safetensors files."""

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm5_jax.checkpoint import hf_config, hf_names, safetensors_io
from glm5_jax.checkpoint.safetensors_io import CheckpointError
from glm5_jax.core.rundir import write_json
from glm5_jax.model.config import ModelConfig

ROUTER_BIAS = "e_score_correction_bias"  # stays float32 in every checkpoint


def load_hf(directory: str | os.PathLike[str], *, dtype: str | None = None, latent_norm_eps: float | None = None
            ) -> tuple[ModelConfig, Any]:
    """Reads a `glm_moe_dsa` directory: (config, params).

    `dtype` converts every parameter but the router's correction bias, and is the compute dtype of the config; by
    default each tensor keeps its own. `latent_norm_eps` defaults to what `save_hf` noted, and in checkpoints from
    elsewhere to rms_norm_eps, the choice of the training code; transformers computes with 1e-6. Raises
    CheckpointError naming the file, tensor or field at fault.
    """
    directory = pathlib.Path(directory)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: expected a config.json, found none")
    config = hf_config.from_json(json.loads((directory / "config.json").read_text()), dtype=dtype,
                                 latent_norm_eps=latent_norm_eps)
    with safetensors_io.Reader(directory) as reader:
        _check_names(directory, config, reader.names)

        def read(entry: hf_names.Entry) -> np.ndarray:
            value = reader.read(entry.name)
            if value.shape != entry.shape:
                raise CheckpointError(f"{directory}: tensor {entry.name}: expected shape {list(entry.shape)} as "
                                      f"config.json says, found {list(value.shape)}")
            keep = dtype is None or entry.name.endswith(ROUTER_BIAS)
            return value if keep else value.astype(jnp.dtype(dtype))

        params = hf_names.from_hf(config, read)
    return config, jax.tree.map(jnp.asarray, params)


def _check_names(directory: pathlib.Path, config: ModelConfig, found: frozenset[str]) -> None:
    expected = {entry.name for entry in hf_names.entries(config)}
    missing, extra = sorted(expected - found), sorted(found - expected - hf_names.ignored_names(config))
    if not missing and not extra:
        return
    faults = [f"{len(names)} {what} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
              for what, names in (("missing", missing), ("unexpected", extra)) if names]
    hint = ""
    if missing and all(name.startswith(f"model.layers.{config.num_hidden_layers}.") for name in missing):
        hint = "; for a checkpoint without its MTP layer set num_nextn_predict_layers to 0 in config.json"
    raise CheckpointError(f"{directory}: the tensors do not match config.json: {'; '.join(faults)}{hint}")


def save_hf(directory: str | os.PathLike[str], config: ModelConfig, params: Any, *, dtype: str | None = None) -> None:
    """Writes `params` as a directory of the released layout, which transformers and inference engines load.

    `dtype` converts every parameter but the router's correction bias, which is always float32; by default each keeps
    its own.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, value in hf_names.to_hf(config, params).items():
        target = np.dtype("float32") if name.endswith(ROUTER_BIAS) else jnp.dtype(dtype or value.dtype)
        tensors[name] = value.astype(target, copy=False)
    safetensors_io.write(directory, tensors)
    main = str(tensors["model.embed_tokens.weight"].dtype)
    write_json(directory / "config.json", hf_config.to_json(config, main))
