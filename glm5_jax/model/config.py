"""`ModelConfig`: every size and choice of the architecture, checked when built, under the names of the released config.

`glm5()` and `glm5_2()` are the released models; `small()` and `tiny()` have the same anatomy at laptop size.
"""

import dataclasses
import math
from typing import Any, Iterator, Literal, NamedTuple

from glm5_jax.core.mesh import ShardingRules
from pallas_kernels import IMPLEMENTATIONS

IndexerType = Literal["full", "shared"]
MlpType = Literal["dense", "sparse"]


# Fields that follow from others unless they are given.
DERIVED_FIELDS = ("mlp_layer_types", "indexer_types", "latent_norm_eps")
DTYPE_FIELDS = ("dtype", "param_dtype")


class ModelConfigError(ValueError):
    """Values that make no sense; `faults` has one sentence for each field."""

    def __init__(self, faults: tuple[str, ...]):
        super().__init__("; ".join(faults))
        self.faults = faults


class LayerKind(NamedTuple):
    """What distinguishes one layer from another: whether it owns an indexer, and its feed-forward form."""

    indexer: IndexerType
    mlp: MlpType


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a `glm_moe_dsa` model. Raises ModelConfigError naming every field that makes no sense."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    # Mixture of experts.
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    # Multi-head latent attention.
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    # Lightning indexer.
    index_n_heads: int
    index_head_dim: int
    index_topk: int

    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 3
    # None: the first `first_k_dense_replace` layers are dense.
    mlp_layer_types: tuple[MlpType, ...] = None  # type: ignore[assignment]
    # None: every layer has its own indexer.
    indexer_types: tuple[IndexerType, ...] = None  # type: ignore[assignment]
    num_nextn_predict_layers: int = 1
    rope_theta: float = 1e6
    max_position_embeddings: int = 202752
    rms_norm_eps: float = 1e-5
    # None: rms_norm_eps, the training code's choice; transformers uses 1e-6.
    latent_norm_eps: float = None  # type: ignore[assignment]
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    # How it is computed, not what.
    dtype: str = "bfloat16"  # activations and matrix products
    param_dtype: str = "float32"
    remat: Literal["none", "full", "dots"] = "full"  # what the backward pass recomputes of each layer
    query_chunk: int = 128  # queries per block of selection and attention
    dense_attention_max_len: int = 2048  # up to this many keys attention is masked dense, beyond it is gathered
    mtp_unroll: int = 3  # steps of the shared multi-token-prediction layer that a cache has room for
    # Of `pallas_kernels.IMPLEMENTATIONS`, for selection, sparse attention and experts; None: each chooses for itself.
    kernels: str | None = None
    interpret_kernels: bool = False  # a Pallas implementation on any platform, slowly
    sharding: ShardingRules = ShardingRules()

    def __post_init__(self) -> None:
        self._check(self._numbers())
        for field in DTYPE_FIELDS:
            object.__setattr__(self, field, getattr(getattr(self, field), "__name__", str(getattr(self, field))))
        for field in DERIVED_FIELDS:
            if getattr(self, field) is None:
                object.__setattr__(self, field, self._derived(field))
        for field in ("mlp_layer_types", "indexer_types"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        self._check(self._relations())

    def _derived(self, field: str) -> Any:
        """What a field is where it is not given."""
        match field:
            case "latent_norm_eps":
                return self.rms_norm_eps
            case "indexer_types":
                return ("full",) * self.num_hidden_layers
            case "mlp_layer_types":
                dense = min(self.first_k_dense_replace, self.num_hidden_layers)
                return ("dense",) * dense + ("sparse",) * (self.num_hidden_layers - dense)

    def _check(self, rules: Iterator[tuple[bool, str, str]]) -> None:
        faults = tuple(f"ModelConfig.{field}: expected {expected}, found {getattr(self, field)!r}"
                       for ok, field, expected in rules if not ok)
        if faults:
            raise ModelConfigError(faults)

    # What must hold, field by field, and what is expected; numbers come before what compares them.
    def _numbers(self) -> Iterator[tuple[bool, str, str]]:
        positive = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "moe_intermediate_size",
                    "n_routed_experts", "num_experts_per_tok", "num_attention_heads", "q_lora_rank", "kv_lora_rank",
                    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_n_heads", "index_head_dim",
                    "index_topk", "n_shared_experts", "n_group", "topk_group", "max_position_embeddings",
                    "query_chunk", "mtp_unroll")
        for field in positive:
            value = getattr(self, field)
            yield isinstance(value, int) and not isinstance(value, bool) and value > 0, field, "a positive integer"
        for field in ("rope_theta", "rms_norm_eps", "latent_norm_eps", "routed_scaling_factor", "initializer_range"):
            value = getattr(self, field)
            absent = value is None and field in DERIVED_FIELDS
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            yield absent or number and 0 < value < math.inf, field, "a positive number"
        for field in ("first_k_dense_replace", "dense_attention_max_len"):
            value = getattr(self, field)
            yield (isinstance(value, int) and not isinstance(value, bool) and value >= 0, field,
                   "an integer, 0 or more")
        for field in ("norm_topk_prob", "attention_bias", "tie_word_embeddings", "interpret_kernels"):
            yield isinstance(getattr(self, field), bool), field, "True or False"

    def _relations(self) -> Iterator[tuple[bool, str, str]]:
        yield self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "an even number (rotary pairs)"
        yield (self.index_head_dim >= self.qk_rope_head_dim, "index_head_dim",
               f"at least qk_rope_head_dim = {self.qk_rope_head_dim}")
        yield (self.n_routed_experts % self.n_group == 0, "n_group",
               f"a divisor of n_routed_experts = {self.n_routed_experts}")
        group = self.n_routed_experts // self.n_group
        yield self.n_group == 1 or group >= 2, "n_group", "groups of at least two experts"
        yield self.topk_group <= self.n_group, "topk_group", f"at most n_group = {self.n_group}"
        yield (self.num_experts_per_tok <= self.topk_group * group, "num_experts_per_tok",
               f"at most the {self.topk_group * group} experts of topk_group = {self.topk_group} groups")
        for field, known in (("mlp_layer_types", ("dense", "sparse")), ("indexer_types", ("full", "shared"))):
            value = getattr(self, field)
            yield (len(value) == self.num_hidden_layers and set(value) <= set(known), field,
                   f"one of {known} for each of {self.num_hidden_layers} layers")
        yield self.indexer_types[:1] != ("shared",), "indexer_types", "'full' first: layer 0 has no selection to share"
        yield (self.num_nextn_predict_layers in (0, 1), "num_nextn_predict_layers",
               "0 or 1 (one layer, shared by all steps)")
        yield self.remat in ("none", "full", "dots"), "remat", "'none', 'full' or 'dots'"
        for field in DTYPE_FIELDS:
            yield getattr(self, field) in ("float32", "bfloat16"), field, "'float32' or 'bfloat16'"
        yield self.kernels in (None, *IMPLEMENTATIONS), "kernels", f"None or one of {', '.join(IMPLEMENTATIONS)}"
        pallas = str(self.kernels).startswith("pallas")
        yield pallas or not self.interpret_kernels, "interpret_kernels", "False where `kernels` names no Pallas kernels"

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer, without the MTP layer."""
        return tuple(map(LayerKind, self.indexer_types, self.mlp_layer_types))

    @property
    def kernel_options(self) -> dict[str, Any]:
        """The arguments of an operation of `pallas_kernels` that say which implementation runs."""
        return {"implementation": self.kernels, "interpret": self.interpret_kernels}

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of a cached latent row: the compressed key-value and the shared rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with the given fields changed, checked anew; fields that followed from others follow them again."""
        follow = {field: None for field in DERIVED_FIELDS if getattr(self, field) == self._derived(field)}
        return dataclasses.replace(self, **{**follow, **changes})


def glm5(**changes: Any) -> ModelConfig:
    """GLM-5: 743.9B parameters (40B active) without its MTP layer."""
    return ModelConfig(**{**dict(
        vocab_size=154880, hidden_size=6144, num_hidden_layers=78, intermediate_size=12288,
        moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=8,
        num_attention_heads=64, q_lora_rank=2048, kv_lora_rank=512,
        qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256,
        index_n_heads=32, index_head_dim=128, index_topk=2048), **changes})


def glm5_2(**changes: Any) -> ModelConfig:
    """GLM-5.2: as GLM-5, with one indexer for each group of four layers and a context of 1M tokens."""
    return glm5(**{**dict(
        indexer_types=shared_indexers(changes.get("num_hidden_layers", 78), freq=4, offset=3),
        rope_theta=8e6, max_position_embeddings=1048576), **changes})


def shared_indexers(layers: int, *, freq: int, offset: int) -> tuple[IndexerType, ...]:
    """Index sharing (IndexCache, arXiv 2603.12201): which layers own an indexer, one in `freq` from the offset on."""
    return tuple("full" if max(layer - offset + 1, 0) % freq == 0 else "shared" for layer in range(layers))


def small(**changes: Any) -> ModelConfig:
    """About 100M parameters, for one accelerator or a patient laptop."""
    return ModelConfig(**{**dict(
        vocab_size=16384, hidden_size=512, num_hidden_layers=12, intermediate_size=1536,
        moe_intermediate_size=256, n_routed_experts=16, num_experts_per_tok=4, first_k_dense_replace=1,
        num_attention_heads=8, q_lora_rank=256, kv_lora_rank=128,
        qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=64,
        index_n_heads=8, index_head_dim=32, index_topk=256,
        max_position_embeddings=32768, dtype="float32"), **changes})


def tiny(**changes: Any) -> ModelConfig:
    """About 1M parameters, most of them the two tables of a 4,096-entry vocabulary: trains on two cores in minutes."""
    return ModelConfig(**{**dict(
        vocab_size=4096, hidden_size=64, num_hidden_layers=4, intermediate_size=192,
        moe_intermediate_size=48, n_routed_experts=8, num_experts_per_tok=2, first_k_dense_replace=1,
        num_attention_heads=4, q_lora_rank=48, kv_lora_rank=32,
        qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=32,
        index_n_heads=4, index_head_dim=16, index_topk=32,
        rope_theta=1e4, max_position_embeddings=4096, dtype="float32", query_chunk=512), **changes})
