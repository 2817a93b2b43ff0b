"""One very small model, whose pattern of layers repeats, and rows of two packed documents and padding."""

import numpy as np
import pytest

from glm5_jax.core.batch import Batch
from glm5_jax.data import packing
from glm5_jax.model import transformer
from glm5_jax.model.config import ModelConfig
from glm5_jax.optim import partition


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=128, hidden_size=16, num_hidden_layers=4, intermediate_size=32, moe_intermediate_size=8,
        n_routed_experts=4, num_experts_per_tok=2, mlp_layer_types=("dense", "sparse") * 2, num_attention_heads=2,
        q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8, index_n_heads=2,
        index_head_dim=8, index_topk=4, max_position_embeddings=64, dtype="float32", remat="none", query_chunk=16)


@pytest.fixture(scope="session")
def optimizer(config):
    return partition.build(transformer.param_specs(config), learning_rate=1e-2, optimizer="adamw")


@pytest.fixture(scope="session")
def rows() -> Batch:
    rng = np.random.default_rng(0)
    return packing.pack([rng.integers(1, 128, size).astype(np.int32) for size in (10, 30, 7, 16, 25)], 16)


@pytest.fixture
def batches(rows):
    return lambda seed=0: iter(packing.batches(rows, batch_size=2, seed=seed))
