"""`config.json` of the released layout to `ModelConfig` and back."""

from typing import Any, Mapping

from glm5_jax.checkpoint import fp8
from glm5_jax.checkpoint.errors import ConfigError, short
from glm5_jax.model.config import ModelConfig, ModelConfigError, glm5, shared_indexers

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
         "topk_method": "noaux_tc", "rope_interleave": True, "indexer_rope_interleave": True, "moe_layer_freq": 1}
QUANTISATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
MOST_LAYERS = 1000  # a slip of the pen should not fill the memory with layers


def from_json(fields: Mapping[str, Any], *, where: str = "config.json", dtype: str | None = None,
              latent_norm_eps: float | None = None) -> ModelConfig:
    """The config that `fields` describe; what they leave out has its GLM-5 value, and no MTP layer.

    Raises ConfigError naming `where` and every field with a value that this architecture does not have.
    """
    faults = [f"{field}: expected {expected!r}, which this architecture has, found {short(fields[field])}"
              for field, expected in FIXED.items() if fields.get(field, expected) != expected]
    if "model_type" not in fields:
        faults.append("model_type: expected 'glm_moe_dsa', found nothing")
    values: dict[str, Any] = {"num_nextn_predict_layers": 0}
    for field in (*SHARED, "num_nextn_predict_layers", "latent_norm_eps"):
        value = fields.get("num_experts") if field == "n_routed_experts" and field not in fields else fields.get(field)
        if _is_number(value):
            values[field] = value
        elif value is not None:
            faults.append(f"{field}: expected a number below 2**53, true or false, found {short(value)}")
    if latent_norm_eps is not None:
        values["latent_norm_eps"] = latent_norm_eps
    stated = dtype or fields.get("dtype") or fields.get("torch_dtype") or "float32"
    stated = "float32" if stated == "float16" else stated if isinstance(stated, str) else short(stated)
    values["dtype"] = values["param_dtype"] = stated  # float32 holds float16 exactly
    layers = values.get("num_hidden_layers", glm5().num_hidden_layers)
    if type(layers) is int and 0 < layers <= MOST_LAYERS:
        values["indexer_types"] = _indexer_types(fields, layers, faults)
        values["mlp_layer_types"] = _names(fields, "mlp_layer_types", faults)
    else:
        faults.append(f"num_hidden_layers: expected an integer from 1 to {MOST_LAYERS}, found {short(layers)}")
        values["num_hidden_layers"] = 1
    values["rope_theta"] = _rope_theta(fields, faults)
    _derived_faults(fields, values, faults)
    try:
        config = glm5(**values)
    except ModelConfigError as error:
        faults += (fault.removeprefix("ModelConfig.") for fault in error.faults)
    if faults:
        raise ConfigError(*(f"{where}: {fault}" for fault in faults))
    return config


def _derived_faults(fields: Mapping[str, Any], values: Mapping[str, Any], faults: list[str]) -> None:
    """Fields that only repeat others must agree with them."""
    number = lambda field: values.get(field, getattr(glm5(), field))
    for field, parts in (("num_key_value_heads", ("num_attention_heads",)),
                         ("qk_head_dim", ("qk_nope_head_dim", "qk_rope_head_dim"))):
        numbers = [number(part) for part in parts]
        if fields.get(field) is not None and all(type(x) is int for x in numbers) and fields[field] != sum(numbers):
            faults.append(f"{field}: expected {sum(numbers)} as {' + '.join(parts)} says, found {short(fields[field])}")


def _names(fields: Mapping[str, Any], field: str, faults: list[str]) -> tuple[str, ...] | None:
    value = fields.get(field)
    if value is None or isinstance(value, list) and all(isinstance(name, str) for name in value):
        return None if value is None else tuple(value)
    faults.append(f"{field}: expected a list of names, one for each layer, found {short(value)}")
    return None


def _rope_theta(fields: Mapping[str, Any], faults: list[str]) -> Any:
    for field in ("rope_parameters", "rope_scaling"):
        rope = fields.get(field)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            faults.append(f"{field}: expected an object with rope_theta and rope_type, found {short(rope)}")
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            faults.append(f"{field}: expected rope_type 'default' (plain rotary positions), found {short(kind)}")
        if rope.get("rope_theta") is not None:
            return _theta(rope["rope_theta"], f"{field}.rope_theta", faults)
    return _theta(1e6 if fields.get("rope_theta") is None else fields["rope_theta"], "rope_theta", faults)


def _theta(value: Any, field: str, faults: list[str]) -> Any:
    if _is_number(value):
        return float(value)
    faults.append(f"{field}: expected a number, found {short(value)}")
    return 1e6


def _is_number(value: Any) -> bool:
    """Not one of thousands of digits, which Python refuses to print and no float holds."""
    return isinstance(value, float) or isinstance(value, int) and abs(value) < 2**53


def _indexer_types(fields: Mapping[str, Any], layers: int, faults: list[str]) -> tuple[str, ...] | None:
    """The list itself, or the pattern, or every `index_topk_freq`-th layer from the offset."""
    if fields.get("indexer_types") is not None:
        names = _names(fields, "indexer_types", faults)
        return None if names is None else names[:layers]
    pattern = fields.get("index_topk_pattern")
    if pattern is not None:
        if not isinstance(pattern, (str, list)) or not set(map(str, pattern)) <= {"F", "S"}:
            faults.append(f"index_topk_pattern: expected F (full) or S (shared) for each layer, found {short(pattern)}")
            return None
        return tuple({"F": "full", "S": "shared"}[kind] for kind in pattern)[:layers]
    freq, offset = fields.get("index_topk_freq"), fields.get("index_skip_topk_offset")
    freq, offset = 1 if freq is None else freq, 2 if offset is None else offset
    for field, value, least in (("index_topk_freq", freq, 1), ("index_skip_topk_offset", offset, 0)):
        if type(value) is not int or value < least:
            faults.append(f"{field}: expected an integer, {least} or more, found {short(value)}")
            return None
    return shared_indexers(layers, freq=freq, offset=offset)


def weight_block(fields: Mapping[str, Any], *, where: str = "config.json") -> tuple[int, int]:
    """The block of elements that share a scale, where tensors are FP8; raises ConfigError for another quantisation."""
    stated = fields.get("quantization_config")
    if stated is None:
        return fp8.BLOCK
    if not isinstance(stated, dict):
        raise ConfigError(f"{where}: quantization_config: expected an object, found {short(stated)}")
    faults = [f"{where}: quantization_config.{field}: expected {expected!r}, the form of the FP8 release, found "
              f"{short(stated[field])}"
              for field, expected in QUANTISATION.items() if stated.get(field, expected) != expected]
    block = stated.get("weight_block_size", list(fp8.BLOCK))
    if not isinstance(block, list) or len(block) != 2 or not all(type(x) is int and x > 0 for x in block):
        faults.append(f"{where}: quantization_config.weight_block_size: expected two positive integers, rows and "
                      f"columns, found {short(block)}")
    if faults:
        raise ConfigError(*faults)
    return block[0], block[1]


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


def merged(fields: Mapping[str, Any], config: ModelConfig, dtype: str) -> dict[str, Any]:
    """`to_json` with those of `fields`, of another config.json, that this library has no other word for."""
    superseded = {"quantization_config", "torch_dtype", "num_experts", "rope_theta", "rope_scaling"}
    rest = {name: value for name, value in fields.items() if name != "indexer_types"}
    if _indexer_types(rest, config.num_hidden_layers, []) != config.indexer_types:
        superseded |= {"index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"}
    return {**{name: value for name, value in fields.items() if name not in superseded}, **to_json(config, dtype)}


def about(config: ModelConfig, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a store of checkpoints says of its model, so that it can be read without the run that made it."""
    return {"config": merged(fields or {}, config, config.param_dtype)}


def quantisation_json(kept: list[str]) -> dict[str, Any]:
    """The `quantization_config` of the FP8 release, for the modules `kept` in higher precision.

    The release lists the head weights of the indexer as `indexers_proj`, a name that no tensor has; engines know them
    by either, so both are listed.
    """
    alias = [name.replace("indexer.weights_proj", "indexers_proj") for name in kept if "indexer.weights_proj" in name]
    return {**QUANTISATION, "weight_block_size": list(fp8.BLOCK), "modules_to_not_convert": kept + alias}
