"""Whether a directory holds the tensors that its config promises: every fault, before anything is read."""

import difflib
import re
from typing import Iterable, Mapping

from glm5_jax.checkpoint import fp8, hf_names
from glm5_jax.checkpoint.errors import short
from glm5_jax.checkpoint.safetensors_io import DTYPES, Tensor
from glm5_jax.model.config import ModelConfig

# Read as they are; float16 as float32, which holds it exactly.
PLAIN = tuple(DTYPES[name] for name in ("F32", "BF16", "F16"))
_NAMED = 4  # of many missing tensors, how many are named


def faults(where: str, config: ModelConfig, found: Mapping[str, Tensor], block: tuple[int, int]) -> list[str]:
    """What is wrong with the tensors `found` at `where`, one sentence each: missing, extra, misspelt, of another shape
    or type, an FP8 weight without its scale."""
    promised = hf_names.count(config)
    if promised > 4 * len(found) + 10_000:  # a wrong number of layers or experts, not as many single faults
        return [f"{where}: expected the {promised} tensors that config.json describes ({config.num_hidden_layers} "
                f"layers, {config.n_routed_experts} experts), found {len(found)}; fetch the other shards, or mend "
                f"config.json"]
    expected = {entry.name: entry for entry in hf_names.entries(config)}
    scales = {name + fp8.SCALE for name, tensor in found.items() if name in expected and tensor.dtype == fp8.E4M3}
    missing = [name for name in expected if name not in found]
    extra = sorted(found.keys() - expected.keys() - scales - hf_names.ignored_names(config))
    every = _extra(where, config, extra, missing, expected) + _missing(where, config, missing)
    for name, entry in expected.items():
        if name in found:
            every += (f"{where}: tensor {name}: {fault}" for fault in _tensor(entry, found, block))
    return every


def _tensor(entry: hf_names.Entry, found: Mapping[str, Tensor], block: tuple[int, int]) -> Iterable[str]:
    tensor = found[entry.name]
    if tensor.shape != entry.shape:
        yield f"expected shape {list(entry.shape)} as config.json says, found {list(tensor.shape)}"
    elif tensor.dtype == fp8.E4M3:
        scale, shape = found.get(entry.name + fp8.SCALE), fp8.scale_shape(entry.shape, block)
        if len(entry.shape) != 2:
            yield f"expected F32, BF16 or F16 for what is no matrix, found {tensor}"
        elif scale is None:
            yield (f"expected its scales, {entry.name}{fp8.SCALE}, float32 {list(shape)}, found none; without them FP8 "
                   f"weights mean nothing: fetch the shard that holds them")
        elif scale.shape != shape or scale.dtype != DTYPES["F32"]:
            yield f"expected scales of float32 {list(shape)}, one for each block of {list(block)}, found {scale}"
    elif tensor.dtype not in PLAIN:
        yield f"expected F32, BF16, F16, or F8_E4M3 with scales, found {tensor.dtype}; convert it first"


def _missing(where: str, config: ModelConfig, missing: list[str]) -> list[str]:
    if not missing:
        return []
    named = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
    advice = "fetch the shards that hold them, or mend config.json"
    if all(name.startswith(f"model.layers.{config.num_hidden_layers}.") for name in missing):
        advice = "for a checkpoint without its MTP layer set num_nextn_predict_layers to 0 in config.json"
    return [f"{where}: expected all tensors that config.json describes, found {len(missing)} missing ({named}); "
            f"{advice}"]


def _extra(where: str, config: ModelConfig, extra: list[str], missing: list[str],
           expected: Mapping[str, hf_names.Entry]) -> list[str]:
    """The tensors that have no place, with a guess at the reason; what is only misspelt is not missing too."""
    faults = []
    for name in extra[:_NAMED]:
        layer = re.match(r"model\.layers\.(\d{1,4})\.self_attn\.indexer\.", name)
        near = difflib.get_close_matches(name, missing[:1000], n=1, cutoff=0.9)
        what = f"{where}: unexpected tensor {short(name)}: "
        if layer and int(layer[1]) < config.num_hidden_layers and config.indexer_types[int(layer[1])] == "shared":
            what += (f"expected no indexer in layer {layer[1]}, which shares that of an earlier layer, found one; mend "
                     f"indexer_types in config.json")
        elif name.endswith(fp8.SCALE) and name.removesuffix(fp8.SCALE) in expected:
            what += "expected scales beside FP8 weights alone, found them beside a weight of another type; remove them"
        elif near:
            what += f"expected {near[0]}, which is missing; rename it"
            missing.remove(near[0])
        else:
            what += "expected the tensors that config.json describes alone; remove it, or mend config.json"
        faults.append(what)
    if len(extra) > _NAMED:
        faults.append(f"{where}: {len(extra) - _NAMED} more unexpected tensors, such as {short(extra[_NAMED])}")
    return faults
