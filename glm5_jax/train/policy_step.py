"""One step of reinforcement learning: the other place where model, losses and optimiser meet.

A batch of rollouts has as many rows as it happens to fill. They are taken `rows` at a time, so that two programs serve
every batch: one adds the gradient of a few rows, one takes the step. The loss is divided by the count of the whole
batch: how it is cut does not matter.

B batch, T positions.
"""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any, Literal, Protocol

from flax import struct
import jax
import jax.numpy as jnp
import optax

from glm5_jax.core.batch import Batch
from glm5_jax.core.metrics import Mean, merge
from glm5_jax.losses import aggregate
from glm5_jax.losses.aggregate import Aggregation
from glm5_jax.losses.compose import Result
from glm5_jax.model import transformer
from glm5_jax.model.config import ModelConfig
from glm5_jax.train import state as train_state, step
from glm5_jax.train.state import TrainState


class Loss(Protocol):
    """A loss of `losses.policy` or `losses.distill`, its own options bound."""

    def __call__(self, logp: jax.Array, *, logp_old: jax.Array | None, logp_behaviour: jax.Array | None,
                 advantage: jax.Array, mask: jax.Array, segment_ids: jax.Array, denominator: jax.Array,
                 aggregation: Aggregation) -> Result: ...


@dataclasses.dataclass(frozen=True)
class Options:
    """How a policy is trained on its rollouts. Raises ValueError naming the field.

    `rows` of a batch are in memory at a time. By default indexers are frozen and routers keep their bias: what was
    selected and routed while sampling is selected and routed in training (GLM-5 report, section 3.2). The others are
    those of `step.Options`.
    """

    aggregation: Aggregation = "sequence_mean_of_token_means"
    rows: int = 8
    attention: Literal["dense", "sparse"] = "sparse"
    router_bias_rate: float = 0.0
    max_grad_norm: float = 1.0
    loss_chunk: int = 0
    norm_ratio: float = 10.0
    frozen: Collection[str] = ("indexer",)
    trainable: Collection[str] | None = None

    def __post_init__(self) -> None:
        aggregate.check_aggregation(self.aggregation)
        if self.rows < 1:
            raise ValueError(f"Options.rows: expected at least 1, found {self.rows!r}")
        self.forward  # checks what it shares with other steps

    @property
    def forward(self) -> step.Options:
        """What `step` knows of it."""
        return step.Options(attention=self.attention, indexer_loss=None, balance_weight=0, loss_chunk=self.loss_chunk,
                            router_bias_rate=self.router_bias_rate, max_grad_norm=self.max_grad_norm,
                            norm_ratio=self.norm_ratio, frozen=self.frozen, trainable=self.trainable)


class _Sums(struct.PyTreeNode):
    """What the passes over a batch add up to."""

    grads: Any  # float32
    loss: jax.Array
    index_nan: jax.Array
    loads: dict[str, jax.Array]
    tokens: jax.Array


class PolicyStep:
    """The step of one loss: call it with a state, which is donated, and a `Batch` of `rl.batches`.

    The batch has the streams `advantage` and `logp_behaviour`, and `logp_old` (of `log_probs`) where the loss is to
    compare with the policy of an earlier moment instead of the present one. Metrics are those of the loss, `loss`, and
    those of `step.take`. Raises ValueError for a number of rows that `Options.rows` does not divide.
    """

    def __init__(self, config: ModelConfig, optimizer: optax.GradientTransformationExtraArgs, loss: Loss,
                 options: Options = Options()):
        self.options = options
        gradient = functools.partial(_gradient, config, options, loss)

        def add(params: Any, sums: _Sums, part: Batch, denominator: jax.Array) -> tuple[_Sums, dict[str, Any]]:
            new, metrics = gradient(params, part, denominator)
            return jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, new), metrics

        def nothing(params: Any, part: Batch) -> _Sums:
            sums, _ = jax.eval_shape(gradient, params, part, jnp.ones(()))
            zero = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)
                                       if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)
            return jax.tree.map(zero, sums)

        def take(state: TrainState, sums: _Sums) -> tuple[TrainState, step.Metrics]:
            state, metrics = step.take(state, config, optimizer, options.forward, sums.grads, sums.loss,
                                       sums.index_nan, sums.loads, sums.tokens)
            return state, metrics | {"loss": Mean.of(sums.loss)}

        self._nothing, self._add = jax.jit(nothing), jax.jit(add, donate_argnums=1)
        self._take, self._merge = jax.jit(take, donate_argnums=0), jax.jit(merge)
        self._count = jax.jit(functools.partial(aggregate.count, aggregation=options.aggregation))
        self._log_probs = jax.jit(lambda params, part: _log_probs(params, config, options, part)[0])

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        parts = self._parts(batch)
        denominator = sum((self._count(part.weights, part.segment_ids) for part in parts), jnp.zeros(()))
        # Where all is committed to its device from the beginning, no program is compiled twice.
        state = train_state.settled(state)
        sums, metrics = train_state.beside(state, self._nothing(state.params, parts[0])), dict[str, Any]()
        for part in parts:
            sums, new = self._add(state.params, sums, part, denominator)
            metrics = self._merge(metrics, new) if metrics else new
        state, taken = self._take(state, sums)
        return state, metrics | taken

    def log_probs(self, params: Any, batch: Batch) -> jax.Array:
        """Log-probabilities of the batch's targets, float32 [B, T]; they mean nothing where there is none."""
        return jnp.concatenate([self._log_probs(params, part) for part in self._parts(batch)])

    def _parts(self, batch: Batch) -> list[Batch]:
        rows, size = len(batch.tokens), self.options.rows
        if not rows or rows % size:
            raise ValueError(f"batch: expected a multiple of {size} rows (Options.rows), found {rows}")
        return [jax.tree.map(lambda x: x[start:start + size], batch) for start in range(0, rows, size)]


def _log_probs(params: Any, config: ModelConfig, options: Options, part: Batch) -> tuple[jax.Array, dict[str, Any]]:
    output = transformer.forward(params, config, part.tokens, positions=part.positions, segment_ids=part.segment_ids,
                                 attention=options.attention)
    nats, _ = step.cross_entropy(params, config, output.hidden, part.targets, options.loss_chunk)
    return -nats, output.aux


def _gradient(config: ModelConfig, options: Options, loss: Loss, params: Any, part: Batch, denominator: jax.Array
              ) -> tuple[_Sums, dict[str, Any]]:
    """What a part of a batch adds to the sums, and its metrics."""
    def objective(params: Any) -> Any:
        logp, aux = _log_probs(step.detached(params, config, options.forward), config, options, part)
        value, metrics = loss(
            logp, logp_old=part.streams.get("logp_old"), logp_behaviour=part.streams["logp_behaviour"],
            advantage=part.streams["advantage"], mask=part.weights, segment_ids=part.segment_ids,
            denominator=denominator, aggregation=options.aggregation)
        return value, (metrics, aux)

    (value, (metrics, aux)), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return _Sums(grads, value, aux["index_nan"], {"expert_load": aux["expert_load"]},
                 jnp.sum(part.segment_ids != 0, dtype=jnp.int32)), metrics
