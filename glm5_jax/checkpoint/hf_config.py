"""`config.json` of the released layout to `ModelConfig` and back."""

from typing import Any, Mapping

from glm5_jax.checkpoint.safetensors_io import CheckpointError
from glm5_jax.model.config import ModelConfig, glm5, shared_indexers

# Fields that both sides spell and mean alike.
SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "moe_intermediate_size", "n_routed_experts",
    "num_experts_per_tok", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "v_head_dim", "index_n_heads", "index_head_dim", "index_topk", "n_shared_experts", "n_group", "topk_group",
    "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace", "max_position_embeddings", "rms_norm_eps",
    "attention_bias", "tie_word_embeddings", "initializer_range",
)
# Values that the architecture fixes: anything else is another model.
FIXED = {"model_type": "glm_moe_dsa", "hidden_act": "silu", "mlp_bias": False, "scoring_func": "sigmoid",
         "topk_method": "noaux_tc", "rope_interleave": True, "indexer_rope_interleave": True}


def from_json(fields: Mapping[str, Any], *, dtype: str | None = None, latent_norm_eps: float | None = None
              ) -> ModelConfig:
    """The config that `fields` describe; what they leave out has its GLM-5 value, and no MTP layer.

    Raises CheckpointError naming the field for a value that this architecture does not have.
    """
    if "model_type" not in fields:
        raise CheckpointError("config.json: field 'model_type' is missing; expected 'glm_moe_dsa'")
    for field, expected in FIXED.items():
        if fields.get(field, expected) != expected:
            raise CheckpointError(f"config.json: {field} is {fields[field]!r}; this architecture has {expected!r}")
    values = {field: fields[field] for field in SHARED if fields.get(field) is not None}
    if fields.get("num_experts") is not None and "n_routed_experts" not in fields:
        values["n_routed_experts"] = fields["num_experts"]
    values["rope_theta"] = _rope_theta(fields)
    values["num_nextn_predict_layers"] = fields.get("num_nextn_predict_layers") or 0
    values["mlp_layer_types"] = fields.get("mlp_layer_types")
    dtype = dtype or fields.get("dtype") or fields.get("torch_dtype") or "float32"
    try:
        values["indexer_types"] = _indexer_types(fields, values.get("num_hidden_layers", glm5().num_hidden_layers))
        latent_norm_eps = fields.get("latent_norm_eps") if latent_norm_eps is None else latent_norm_eps
        return glm5(**values, latent_norm_eps=latent_norm_eps, dtype=dtype, param_dtype=dtype)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"config.json: {error}") from error


def _rope_theta(fields: Mapping[str, Any]) -> float:
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"config.json: rope_type is {kind!r}; expected 'default' (plain rotary positions)")
    return rope.get("rope_theta") or fields.get("rope_theta") or 1e6


def _indexer_types(fields: Mapping[str, Any], layers: Any) -> tuple[str, ...] | None:
    """The list itself, or the pattern, or every `index_topk_freq`-th layer from the offset."""
    if not isinstance(layers, int):
        return None  # ModelConfig says what is wrong with it
    if fields.get("indexer_types") is not None:
        return tuple(fields["indexer_types"][:layers])
    pattern = fields.get("index_topk_pattern")
    if pattern is not None:
        return tuple({"F": "full", "S": "shared"}.get(kind, kind) for kind in pattern)[:layers]
    freq, offset = max(fields.get("index_topk_freq") or 1, 1), fields.get("index_skip_topk_offset")
    offset = 2 if offset is None else offset
    return shared_indexers(layers, freq=freq, offset=offset)


def to_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The fields of `config.json` that say the same as `config`."""
    return {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        **{field: getattr(config, field) for field in SHARED},
        "latent_norm_eps": config.latent_norm_eps,  # ours: released configs leave the choice open
        "num_key_value_heads": config.num_attention_heads,
        "mlp_layer_types": list(config.mlp_layer_types),
        "indexer_types": list(config.indexer_types),
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "dtype": dtype,
    }
