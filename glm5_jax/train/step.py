"""One training step and one evaluation step: the only place where model, losses and optimiser meet.

B batch, T positions, E experts, L layers with experts.
"""

import dataclasses
from typing import Any, Callable, Collection, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glm5_jax.core import masked
from glm5_jax.core.batch import Batch
from glm5_jax.core.metrics import Mean
from glm5_jax.losses import auxiliary, token
from glm5_jax.model import moe, stacks, transformer
from glm5_jax.model.config import ModelConfig
from glm5_jax.optim import partition, schedules
from glm5_jax.optim.schedules import Schedule
from glm5_jax.train import guard
from glm5_jax.train.state import TrainState, add_tokens, as_float

Metrics = dict[str, Mean]


@dataclasses.dataclass(frozen=True)
class Options:
    """What a step optimises: L = LM + mtp_weight * mean over steps of MTP + balance_weight * balance
    + indexer_weight * mean over indexers of their KL, where LM and MTP are the cross-entropy + z_weight * log_z^2.

    `attention` and `indexer_loss` are those of `transformer.forward`. Parameters with a tag of `frozen`, or without any
    of `trainable` (None: all train), have no gradient, so that none of it is computed or counts in the norm; build the
    optimiser with the same. `mtp_weight` and `router_bias_rate` may be schedules over the tokens of a stage.
    `loss_chunk` bounds the positions of a row whose logits exist at a time; 0: all. `micro_batches` divides the rows of
    a batch into so many passes, with the same result. A step is skipped where its gradient norm is above `norm_ratio`
    times the running median, or where `guard` finds no finite number. Raises ValueError naming the field.
    """

    mtp_steps: int = 0
    mtp_weight: float | Schedule = 0.3
    z_weight: float = 0.0
    balance_weight: float = 1e-4
    attention: Literal["dense", "sparse"] = "sparse"
    indexer_loss: Literal["dense", "sparse"] | None = "sparse"
    indexer_weight: float = 1.0
    router_bias_rate: float | Schedule = 1e-3
    max_grad_norm: float = 1.0
    loss_chunk: int = 0
    micro_batches: int = 1
    norm_ratio: float = 10.0
    frozen: Collection[str] = ()
    trainable: Collection[str] | None = None

    def __post_init__(self) -> None:
        if self.indexer_loss not in (None, "dense", "sparse"):
            raise ValueError(f"Options.indexer_loss: expected None, 'dense' or 'sparse', found {self.indexer_loss!r}")
        if self.attention not in ("dense", "sparse"):
            raise ValueError(f"Options.attention: expected 'dense' or 'sparse', found {self.attention!r}")
        if self.attention == "dense" and self.indexer_loss == "sparse":
            raise ValueError("Options.indexer_loss: expected None or 'dense' with dense attention, found 'sparse'")
        for field in ("mtp_steps", "mtp_weight", "z_weight", "balance_weight", "indexer_weight", "router_bias_rate",
                      "loss_chunk"):
            value = getattr(self, field)
            scheduled = callable(value) and field in ("mtp_weight", "router_bias_rate")
            if not scheduled and not value >= 0:
                raise ValueError(f"Options.{field}: expected 0 or more, found {value!r}")
        for field in ("max_grad_norm", "norm_ratio"):
            if not getattr(self, field) > 0:
                raise ValueError(f"Options.{field}: expected more than 0, found {getattr(self, field)!r}")
        if self.micro_batches < 1:
            raise ValueError(f"Options.micro_batches: expected at least 1, found {self.micro_batches!r}")


def make_train_step(config: ModelConfig, optimizer: optax.GradientTransformationExtraArgs, options: Options
                    ) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step; the state that goes in is donated.

    Metrics: `loss`, `lm_loss` and `mtp_loss/<k>` in nats per token, `indexer_kl`, `balance_loss`, `grad_norm` before
    clipping, `expert_load` (of the busiest expert over the mean, mean over layers that have some), `index_nan` and
    `tokens` per step,
    `skipped/<reason>` as a share of the steps, and `skipped_in_row`.
    """
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        mtp_weight = schedules.at(options.mtp_weight, as_float(state.stage_tokens))
        loss, metrics, loads, grads = _gradients(state.params, config, options, batch, mtp_weight)
        tokens = jnp.sum(batch.segment_ids != 0, dtype=jnp.int32)
        state, taken = take(state, config, optimizer, options, grads, loss, metrics["index_nan"].total, loads, tokens)
        return state, metrics | taken

    return jax.jit(train_step, donate_argnums=0)


def take(state: TrainState, config: ModelConfig, optimizer: optax.GradientTransformationExtraArgs, options: Options,
         grads: Any, loss: jax.Array, index_nan: jax.Array, loads: dict[str, jax.Array], tokens: jax.Array
         ) -> tuple[TrainState, Metrics]:
    """The state after a step down a gradient, unless the guard skips it; `grad_norm`, `expert_load`, `tokens` and what
    was skipped, as `make_train_step` gives them."""
    tokens_seen = as_float(state.stage_tokens)
    grads, norm = clip(grads, options.max_grad_norm)
    reasons = guard.judge(state.guard, loss, norm, index_nan, options.norm_ratio)
    taken = ~jnp.any(jnp.stack(list(reasons.values())))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, tokens_seen=tokens_seen)
    params = optax.apply_updates(state.params, updates)
    params = balance(params, config, loads, schedules.at(options.router_bias_rate, tokens_seen))
    params, opt_state = jax.tree.map(lambda new, old: jnp.where(taken, new, old), (params, opt_state),
                                     (state.params, state.opt_state))
    watch = guard.after(state.guard, norm, taken)
    metrics = {"grad_norm": Mean.of(norm), "tokens": Mean.of(tokens), "skipped_in_row": Mean.of(watch.in_row),
               **{f"skipped/{reason}": Mean.of(found) for reason, found in reasons.items()}}
    load_LE = loads["expert_load"].astype(jnp.float32)
    if load_LE.size:
        metrics["expert_load"] = Mean.of(load_LE.max(-1) / jnp.maximum(load_LE.mean(-1), 1e-30))
    return TrainState(state.step + 1, params, opt_state, add_tokens(state.tokens_seen, tokens),
                      add_tokens(state.stage_tokens, tokens), watch), metrics


def _gradients(params: Any, config: ModelConfig, options: Options, batch: Batch, mtp_weight: jax.Array
               ) -> tuple[jax.Array, Metrics, dict[str, jax.Array], Any]:
    """Loss, metrics, expert loads and gradient of a batch: sums over its micro-batches, by the counts of the whole."""
    counts, passes = _counts(batch, options), options.micro_batches

    def one(part: Batch) -> Any:
        (loss, (metrics, loads)), grads = jax.value_and_grad(_objective, has_aux=True)(
            params, config, options, part, counts, mtp_weight)
        return loss, metrics, loads, grads

    if passes == 1:
        return one(batch)
    rows = batch.tokens.shape[0]
    if rows % passes:
        raise ValueError(f"micro_batches: expected a divisor of the {rows} rows of a batch, found {passes}")
    # Every so many-th row, so that rows split over devices stay split.
    parts = jax.tree.map(lambda x: x.reshape(rows // passes, passes, *x.shape[1:]).swapaxes(0, 1), batch)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)
                                               if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype),
                           jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts)))
    return jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, one(part)), None), nothing, parts)[0]


def make_eval_step(config: ModelConfig, loss_chunk: int = 0, attention: Literal["dense", "sparse"] = "sparse"
                   ) -> Callable[[Any, Batch], Mean]:
    """The jitted evaluation of parameters on a batch: nats summed over its predicted tokens, and how many they are."""
    def eval_step(params: Any, batch: Batch) -> Mean:
        output = transformer.forward(params, config, batch.tokens, positions=batch.positions,
                                     segment_ids=batch.segment_ids, attention=attention)
        nats, _ = cross_entropy(params, config, output.hidden, batch.targets, loss_chunk)
        return Mean.of(nats, batch.weights)

    return jax.jit(eval_step)


def clip(grads: Any, max_norm: float) -> tuple[Any, jax.Array]:
    """The gradients, scaled down to a global norm of at most `max_norm`, and the norm they had, float32 []."""
    norm = optax.tree_utils.tree_norm(grads)
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), norm


def balance(params: Any, config: ModelConfig, loads: dict[str, jax.Array], rate: float | jax.Array) -> Any:
    """The parameters with each router's correction bias moved by the load that its own layer had."""
    rank = np.cumsum([kind.mlp == "sparse" for kind in config.layer_kinds]) - 1
    layers = dict(params["layers"])
    for segment in stacks.plan(config.layer_kinds):
        for run in segment:
            if run.kind.mlp == "sparse":
                layers[run.name] = _moved(layers[run.name], loads["expert_load"][rank[run.layers]], rate)
    params = {**params, "layers": layers}
    if "mtp_expert_load" in loads:
        params["mtp"] = {**params["mtp"], "layer": _moved(params["mtp"]["layer"], loads["mtp_expert_load"], rate)}
    return params


def _moved(layer: Any, load_E: jax.Array, rate: float | jax.Array) -> Any:
    bias = moe.updated_bias(layer["moe"]["router_bias"], load_E, rate)
    return {**layer, "moe": {**layer["moe"], "router_bias": bias}}


def cross_entropy(params: Any, config: ModelConfig, hidden: jax.Array, targets: jax.Array, chunk: int
                  ) -> tuple[jax.Array, jax.Array]:
    """Nats and log-normalisers by the model's output head."""
    tied = config.tie_word_embeddings
    with jax.named_scope("unembed"):
        return token.projected_cross_entropy(hidden, params["embedding" if tied else "head"], targets, tied=tied,
                                             chunk=chunk or None)


def _predictions(batch: Batch, options: Options) -> tuple[jax.Array, jax.Array]:
    """Targets and weights [1 + steps, B, T] of the trunk and of each MTP step."""
    each = [token.future_targets(batch.targets, batch.segment_ids, batch.weights, k)
            for k in range(options.mtp_steps + 1)]
    targets, weights = (jnp.stack(x) for x in zip(*each))
    return targets, weights


def detached(params: Any, config: ModelConfig, options: Options) -> Any:
    """The parameters, those without gradient detached: what would only be made for them is then not computed."""
    groups = partition.groups(transformer.param_specs(config), optimizer="adamw", frozen=options.frozen,
                              trainable=options.trainable)
    return jax.tree.map(lambda x, group: jax.lax.stop_gradient(x) if group == "frozen" else x, params, groups)


class Counts(NamedTuple):
    """What sums are divided by, all of the whole global batch, of trunk and MTP steps, float32 [1 + steps] each."""

    weight: jax.Array
    tokens: jax.Array
    rows: jax.Array


def _counts(batch: Batch, options: Options) -> Counts:
    _, weights = _predictions(batch, options)
    return Counts(jnp.maximum(weights.sum((1, 2)), 1e-30), *auxiliary.counts(batch.segment_ids, options.mtp_steps))


def _objective(params: Any, config: ModelConfig, options: Options, batch: Batch, counts: Counts,
               mtp_weight: jax.Array) -> tuple[jax.Array, tuple[Metrics, dict[str, jax.Array]]]:
    """The part of the loss that a micro-batch adds, by the `counts` of the whole; all that is returned adds up."""
    steps, params = options.mtp_steps, detached(params, config, options)
    part = lambda x: Mean(jnp.asarray(x, jnp.float32), jnp.float32(1 / options.micro_batches))
    output = transformer.forward(params, config, batch.tokens, positions=batch.positions,
                                 segment_ids=batch.segment_ids, mtp_steps=steps, attention=options.attention,
                                 indexer_loss=options.indexer_loss)
    aux = output.aux
    hidden = output.hidden[None] if output.mtp_hidden is None else jnp.concatenate([output.hidden[None],
                                                                                    output.mtp_hidden])
    targets, weights = _predictions(batch, options)
    nats, log_z = cross_entropy(params, config, hidden, targets, options.loss_chunk)
    sums = masked.masked_sum(nats, weights, axis=(1, 2))
    penalised = sums + options.z_weight * masked.masked_sum(token.z_loss(log_z), weights, axis=(1, 2))
    loss = penalised[0] / counts.weight[0]
    loss += mtp_weight * jnp.sum(penalised[1:] / counts.weight[1:]) / max(steps, 1)
    names = ["lm_loss", *(f"mtp_loss/{k}" for k in range(1, steps + 1))]
    metrics = {name: Mean(sums[k], weights[k].sum()) for k, name in enumerate(names)}

    balance_loss = auxiliary.balance_loss(aux["balance"].total, counts.rows[0])
    if steps:
        balance_loss += auxiliary.balance_loss(aux["mtp_balance"].total, counts.rows[1:])
    loss += options.balance_weight * balance_loss
    if options.indexer_loss:
        divergence, tokens = aux["indexer_kl"].total, jnp.repeat(counts.tokens[0], config.num_hidden_layers)
        if steps:
            divergence = jnp.concatenate([divergence, aux["mtp_indexer_kl"].total])
            tokens = jnp.concatenate([tokens, counts.tokens[1:]])
        groups = auxiliary.index_groups([kind == "full" for kind in config.indexer_types], steps)
        indexer_kl = auxiliary.indexer_loss(divergence, tokens, groups)
        loss += options.indexer_weight * indexer_kl
        metrics["indexer_kl"] = part(indexer_kl)
    metrics |= {"loss": part(loss), "balance_loss": part(balance_loss), "index_nan": part(aux["index_nan"])}
    return loss, (metrics, {name: aux[name] for name in ("expert_load", "mtp_expert_load") if name in aux})
