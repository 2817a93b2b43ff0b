"""A model through stages on rows of `recall`: what the experiments on needles share."""

import contextlib
import pathlib
import tempfile
from typing import Any, NamedTuple, Sequence

import jax

from glm5_jax.checkpoint.store import Store
from glm5_jax.core.metrics import JsonlWriter
from glm5_jax.data import packing
from glm5_jax.model import transformer
from glm5_jax.model.config import ModelConfig
from glm5_jax.optim import partition, schedules
from glm5_jax.train import loop, stages as train_stages
from glm5_jax.train.step import Options

import recall

REST = 0.05  # the weight of a token that answers nothing


class Leg(NamedTuple):
    """A stage: `steps` batches of `rows` rows of `length` tokens, and a learning rate that rises within a tenth of them
    and falls along a cosine."""

    name: str
    kind: str
    steps: int
    rows: int
    length: int
    facts: int
    questions: int
    rate: float
    final: float
    rope_theta: float


def model(count: int, **changes: Any) -> ModelConfig:
    """Two layers without experts, 117,000 parameters with 32 words of each kind: the least that finds a needle."""
    return ModelConfig(**{**dict(
        vocab_size=2 + 3 * count, hidden_size=64, num_hidden_layers=2, intermediate_size=128, moe_intermediate_size=32,
        n_routed_experts=2, num_experts_per_tok=1, first_k_dense_replace=2, num_attention_heads=2, q_lora_rank=48,
        kv_lora_rank=48, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32, index_n_heads=4, index_head_dim=32,
        index_topk=32, num_nextn_predict_layers=0, rope_theta=1e4, max_position_embeddings=8192, dtype="float32",
        remat="none", query_chunk=512, initializer_range=0.05), **changes})


def through(legs: Sequence[Leg], config: ModelConfig, words: recall.Words, seed: int) -> dict[str, Any]:
    """The parameters after each leg by its name, on the host."""
    options = {leg: train_stages.KINDS[leg.kind](Options(router_bias_rate=0.0)) for leg in legs}
    found: dict[str, Any] = {}

    def stage(leg: Leg) -> train_stages.Stage:
        tokens = leg.rows * leg.length
        rate = schedules.warmup_cosine(leg.rate, warmup=leg.steps // 10 * tokens, total=leg.steps * tokens,
                                       final=leg.final)
        optimizer = partition.build(transformer.param_specs(config), learning_rate=rate, weight_decay=0.0,
                                    frozen=options[leg].frozen, trainable=options[leg].trainable)
        return train_stages.Stage(leg.name, leg.steps, config.replace(rope_theta=leg.rope_theta), options[leg],
                                  optimizer)

    def batches(stage: train_stages.Stage) -> Any:
        number = [leg.name for leg in legs].index(stage.name)
        leg = legs[number]
        return iter(packing.batches(
            recall.rows(words, 1000 * seed + number, leg.steps * leg.rows, leg.length, facts=leg.facts,
                        questions=leg.questions, rest=REST), batch_size=leg.rows, seed=seed))

    def keep(stage: train_stages.Stage, params: Any) -> dict[str, float]:
        found[stage.name] = jax.device_get(params)  # shown before and after the stage: the last stays
        return {}

    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        with contextlib.closing(JsonlWriter(folder / "metrics.jsonl")) as writer:
            train_stages.run(
                [stage(leg) for leg in legs], params=lambda: transformer.init(config, jax.random.key(seed)),
                batches=batches, store=lambda stage: Store(folder / "checkpoints"), writer=writer, evaluate=keep,
                cadence=loop.Cadence(log_every=20, save_every=10**9))
    return found
