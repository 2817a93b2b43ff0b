"""The golden checkpoints: tiny random `glm_moe_dsa` models of transformers, written in the released layout."""

import copy
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import save_file
import torch
import transformers
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm

TINY: dict[str, Any] = dict(
    vocab_size=64, hidden_size=24, intermediate_size=28, moe_intermediate_size=6, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2,
    q_lora_rank=16, kv_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8, index_topk=5,
    index_head_dim=8, index_n_heads=8, first_k_dense_replace=1, max_position_embeddings=64, rms_norm_eps=1e-5,
    rope_parameters={"rope_theta": 1e4, "rope_type": "default"}, bos_token_id=None, eos_token_id=1, pad_token_id=None)


@dataclasses.dataclass(frozen=True)
class Case:
    """One checkpoint: `config` on top of `TINY`, and how its directory is written."""

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    correction_bias_mean: float = 0.0
    faint: bool = False         # what enters the norms is so faint that a wrong epsilon shows
    bf16_shards: bool = False   # many small bf16 shards and an index; the correction bias stays float32
    gradients: bool = True
    json_edits: dict[str, Any] = dataclasses.field(default_factory=dict)  # on config.json; None removes the field


CASES = {
    "plain": Case(faint=True),
    # The first eight layers of the 5.2 release: full full full shared shared shared full shared.
    "sharing": Case(dict(
        num_hidden_layers=8, first_k_dense_replace=3, moe_intermediate_size=5, n_routed_experts=4, n_shared_experts=2,
        num_attention_heads=3, num_key_value_heads=3, index_topk_freq=4, index_skip_topk_offset=3, index_topk=7,
        rope_parameters={"rope_theta": 8e6, "rope_type": "default"})),
    # Biased choices are often negative here: a router that writes 0 instead of -inf into left-out groups goes wrong.
    "groups": Case(dict(n_group=4, topk_group=2, num_experts_per_tok=3, indexer_types=["full", "full", "shared"]),
                   correction_bias_mean=-0.6, json_edits=dict(indexer_types=None, index_topk_pattern="FFS")),
    "tied_bias": Case(dict(tie_word_embeddings=True, attention_bias=True, norm_topk_prob=False, n_shared_experts=2)),
    "mtp": Case(dict(num_nextn_predict_layers=1, num_hidden_layers=2, index_topk=6), faint=True),
    # As released: bf16 shards, only the released fields, and a `head_dim` that is not the rotary size.
    "wide": Case(dict(
        vocab_size=96, hidden_size=28, num_hidden_layers=6, qk_rope_head_dim=6, index_head_dim=10, v_head_dim=7,
        index_topk_freq=2, index_skip_topk_offset=1, index_topk=4, eos_token_id=[1, 2], pad_token_id=1),
        bf16_shards=True, gradients=False, json_edits=dict(
            head_dim=192, indexer_types=None, layer_types=None, mlp_layer_types=None, qk_head_dim=None,
            scoring_func="sigmoid", topk_method="noaux_tc", indexer_rope_interleave=True, rope_interleave=True,
            ep_size=1, moe_layer_freq=1, pretraining_tp=1, num_nextn_predict_layers=0)),
}


class Mtp(torch.nn.Module):
    """The multi-token-prediction layer around transformers' own decoder layer (which it cannot run by itself)."""

    def __init__(self, config: transformers.GlmMoeDsaConfig):
        super().__init__()
        one = dict(num_hidden_layers=1, indexer_types=["full"], mlp_layer_types=["sparse"], layer_types=None)
        config = transformers.GlmMoeDsaConfig(**{**config.to_dict(), **one})
        config._attn_implementation = config._experts_implementation = "eager"
        width, eps = config.hidden_size, config.rms_norm_eps
        self.layer = glm.GlmMoeDsaDecoderLayer(config, 0)
        self.enorm, self.hnorm = glm.GlmMoeDsaRMSNorm(width, eps), glm.GlmMoeDsaRMSNorm(width, eps)
        self.eh_proj = torch.nn.Linear(2 * width, width, bias=False)
        self.shared_head = torch.nn.ModuleDict({"norm": glm.GlmMoeDsaRMSNorm(width, eps)})

    def forward(self, trunk: torch.nn.Module, tokens: torch.Tensor, previous: torch.Tensor, step: int) -> torch.Tensor:
        """Hidden of `step` [B, T - step, D]: row t sees the embedding of token t + step and row t of the step before.

        Rows without that token are absent, so that they influence nothing.
        """
        ahead = self.enorm(trunk.embed_tokens(tokens[:, step:]))
        rows = ahead.shape[1]
        x = self.eh_proj(torch.cat([ahead, self.hnorm(previous[:, :rows])], dim=-1))
        mask = torch.full((rows, rows), torch.finfo(x.dtype).min).triu(1).expand(x.shape[0], 1, rows, rows)
        rotary = trunk.rotary_emb(x, torch.arange(rows)[None])
        return self.shared_head["norm"](self.layer(x, attention_mask=mask, position_embeddings=rotary)[0])


def build(case: Case, seed: int) -> tuple[torch.nn.Module, Mtp | None]:
    """The model with random weights, norms away from 1 and biases away from 0."""
    config = transformers.GlmMoeDsaConfig(**{**TINY, **case.config})
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.GlmMoeDsaForCausalLM(config).eval()
    mtp = Mtp(config).eval() if getattr(config, "num_nextn_predict_layers", 0) else None
    rng = np.random.default_rng(seed)
    for module in filter(None, (model, mtp)):
        named = dict(module.named_parameters())
        named |= {n: b for n, b in module.named_buffers() if n.endswith("e_score_correction_bias")}
        for name, tensor in sorted(named.items()):
            noise = torch.from_numpy(rng.standard_normal(tuple(tensor.shape), dtype=np.float32))
            with torch.no_grad():
                tensor.copy_(_weight(name, noise, case))
    return model, mtp


def _weight(name: str, noise: torch.Tensor, case: Case) -> torch.Tensor:
    if name.endswith("e_score_correction_bias"):
        return case.correction_bias_mean + 0.2 * noise
    if "norm.weight" in name:
        value = 1 + 0.2 * noise
    elif name.endswith("bias"):
        value = 0.3 * noise
    elif "embed_tokens" in name:
        value = noise
    else:
        value = 1.2 * noise / noise.shape[-1] ** 0.5
    if case.faint and any(part in name for part in ("embed_tokens", "q_a_proj", "kv_a_proj", "indexer.wk.")):
        value = 0.01 * value
    return value.bfloat16().float() if case.bf16_shards else value


def on_disk(tensors: dict[str, Any]) -> dict[str, Any]:
    """Splits transformers' fused expert tensors into the released per-expert ones."""
    result = {}
    for name, tensor in tensors.items():
        stem, is_expert, leaf = name.rpartition(".experts.")
        if not is_expert:
            result[name] = tensor
            continue
        for e, expert in enumerate(tensor):
            parts = {leaf: expert}
            if leaf == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), expert.chunk(2)))
            result |= {f"{stem}.experts.{e}.{part}.weight": value.contiguous() for part, value in parts.items()}
    return result


def mtp_on_disk(layer: int, tensors: dict[str, Any]) -> dict[str, Any]:
    """`on_disk` for tensors of `Mtp`, which is stored as the layer after the last."""
    return {f"model.layers.{layer}." + name.removeprefix("layer."): value for name, value in on_disk(tensors).items()}


def write(directory: pathlib.Path, case: Case, model: torch.nn.Module, mtp: Mtp | None) -> None:
    """Saves through `save_pretrained`, then adds the MTP layer and edits config.json."""
    saved = model
    if case.bf16_shards:
        saved = copy.deepcopy(model).bfloat16()
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                saved.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = bias
    saved.save_pretrained(directory, max_shard_size="24KB" if case.bf16_shards else "1GB")
    (directory / "generation_config.json").unlink(missing_ok=True)
    if mtp is not None:
        tensors = read_tensors(directory) | mtp_on_disk(model.config.num_hidden_layers, mtp.state_dict())
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text()) | case.json_edits
    kept = {name: value for name, value in config.items() if name not in case.json_edits or value is not None}
    (directory / "config.json").write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def read_tensors(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    """Every tensor of every shard."""
    tensors = {}
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def read(directory: pathlib.Path) -> torch.nn.Module:
    """What transformers makes of the directory, in float32."""
    return transformers.GlmMoeDsaForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()
