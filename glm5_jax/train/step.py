"""One training step and one evaluation step: the only place where model, losses and optimiser meet.

B batch, T positions, E experts, L layers with experts.
"""

import dataclasses
from typing import Any, Callable, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glm5_jax.core import masked
from glm5_jax.core.batch import Batch
from glm5_jax.core.metrics import Mean
from glm5_jax.losses import token
from glm5_jax.model import moe, stacks, transformer
from glm5_jax.model.config import ModelConfig
from glm5_jax.train.state import TrainState, add_tokens, as_float

Metrics = dict[str, Mean]


@dataclasses.dataclass(frozen=True)
class Options:
    """What a step optimises: L = LM + mtp_weight * mean over steps of MTP + balance_weight * balance
    + indexer_weight * mean over layers of the indexer's KL. Raises ValueError naming the field."""

    mtp_steps: int = 0
    mtp_weight: float = 0.3
    balance_weight: float = 1e-4
    indexer_loss: Literal["dense", "sparse"] | None = "sparse"
    indexer_weight: float = 1.0
    router_bias_rate: float = 1e-3
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.indexer_loss not in (None, "dense", "sparse"):
            raise ValueError(f"Options.indexer_loss: expected None, 'dense' or 'sparse', found {self.indexer_loss!r}")
        for field in ("mtp_steps", "mtp_weight", "balance_weight", "indexer_weight", "router_bias_rate"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"Options.{field}: expected 0 or more, found {getattr(self, field)!r}")
        if not self.max_grad_norm > 0:
            raise ValueError(f"Options.max_grad_norm: expected more than 0, found {self.max_grad_norm!r}")


def make_train_step(config: ModelConfig, optimizer: optax.GradientTransformationExtraArgs, options: Options
                    ) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step; the state that goes in is donated.

    Metrics: `loss`, `lm_loss` and `mtp_loss/<k>` in nats per token, `indexer_kl`, `balance_loss`, `grad_norm` before
    clipping, `expert_load` (of the busiest expert over the mean, mean over layers), `index_nan` and `tokens` per step.
    """
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        gradient = jax.value_and_grad(_objective, has_aux=True)
        (_, (metrics, aux)), grads = gradient(state.params, config, options, batch, _counts(batch, options))
        grads, norm = clip(grads, options.max_grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params,
                                              tokens_seen=as_float(state.tokens_seen))
        params = optax.apply_updates(state.params, updates)
        params = balance(params, config, aux, options.router_bias_rate)
        tokens = jnp.sum(batch.segment_ids != 0, dtype=jnp.int32)
        metrics |= {"grad_norm": Mean.of(norm), "tokens": Mean.of(tokens)}
        return TrainState(state.step + 1, params, opt_state, add_tokens(state.tokens_seen, tokens)), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(config: ModelConfig) -> Callable[[Any, Batch], Mean]:
    """The jitted evaluation of parameters on a batch: nats summed over its predicted tokens, and how many they are."""
    def eval_step(params: Any, batch: Batch) -> Mean:
        output = transformer.forward(params, config, batch.tokens, positions=batch.positions,
                                     segment_ids=batch.segment_ids)
        return Mean.of(token.cross_entropy(output.logits, batch.targets), batch.weights)

    return jax.jit(eval_step)


def clip(grads: Any, max_norm: float) -> tuple[Any, jax.Array]:
    """The gradients, scaled down to a global norm of at most `max_norm`, and the norm they had, float32 []."""
    norm = optax.tree_utils.tree_norm(grads)
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), norm


def balance(params: Any, config: ModelConfig, aux: dict[str, jax.Array], rate: float) -> Any:
    """The parameters with each router's correction bias moved by the load that its own layer had."""
    rank = np.cumsum([kind.mlp == "sparse" for kind in config.layer_kinds]) - 1
    layers = dict(params["layers"])
    for segment in stacks.plan(config.layer_kinds):
        for run in segment:
            if run.kind.mlp == "sparse":
                layers[run.name] = _moved(layers[run.name], aux["expert_load"][rank[run.layers]], rate)
    params = {**params, "layers": layers}
    if "mtp_expert_load" in aux:
        params["mtp"] = {**params["mtp"], "layer": _moved(params["mtp"]["layer"], aux["mtp_expert_load"], rate)}
    return params


def _moved(layer: Any, load_E: jax.Array, rate: float) -> Any:
    bias = moe.updated_bias(layer["moe"]["router_bias"], load_E, rate)
    return {**layer, "moe": {**layer["moe"], "router_bias": bias}}


def _predictions(batch: Batch, options: Options) -> list[tuple[jax.Array, jax.Array]]:
    """Targets and weights of the trunk and of each MTP step."""
    return [token.future_targets(batch.targets, batch.segment_ids, batch.weights, k)
            for k in range(options.mtp_steps + 1)]


def _counts(batch: Batch, options: Options) -> list[jax.Array]:
    """What the sums of the trunk and of each MTP step are divided by: the weight of the whole global batch."""
    return [jnp.maximum(jnp.sum(weights), 1e-30) for _, weights in _predictions(batch, options)]


def _objective(params: Any, config: ModelConfig, options: Options, batch: Batch, counts: list[jax.Array]
               ) -> tuple[jax.Array, tuple[Metrics, dict[str, jax.Array]]]:
    output = transformer.forward(params, config, batch.tokens, positions=batch.positions,
                                 segment_ids=batch.segment_ids, mtp_steps=options.mtp_steps,
                                 indexer_loss=options.indexer_loss)
    every_logits = [output.logits, *(() if output.mtp_logits is None else output.mtp_logits)]
    names = ["lm_loss", *(f"mtp_loss/{k}" for k in range(1, options.mtp_steps + 1))]
    factors = [1.0] + [options.mtp_weight / max(options.mtp_steps, 1)] * options.mtp_steps
    loss, metrics = jnp.zeros(()), {}
    for name, factor, logits, (targets, weights), count in zip(
            names, factors, every_logits, _predictions(batch, options), counts):
        nats = masked.masked_sum(token.cross_entropy(logits, targets), weights)
        loss += factor * nats / count
        metrics[name] = Mean(nats, jnp.sum(weights))

    balance_loss = output.aux["balance_loss"] + output.aux.get("mtp_balance_loss", 0.0)
    loss += options.balance_weight * balance_loss
    divergences = [value for name, value in output.collected.items() if name.startswith("indexer_kl/")]
    if divergences:
        indexer_kl = jnp.mean(jnp.stack(divergences))
        loss += options.indexer_weight * indexer_kl
        metrics["indexer_kl"] = Mean.of(indexer_kl)

    load_LE = output.aux["expert_load"].astype(jnp.float32)
    metrics |= {"loss": Mean.of(loss), "balance_loss": Mean.of(balance_loss),
                "expert_load": Mean.of(load_LE.max(-1) / jnp.maximum(load_LE.mean(-1), 1e-30)),
                "index_nan": Mean.of(output.aux["index_nan"])}
    return loss, (metrics, output.aux)
