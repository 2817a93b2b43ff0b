"""The one call shape of reinforcement learning losses: its arrays, checked and masked.

B batch, T positions.
"""

from typing import Any, NamedTuple, NotRequired, TypedDict

import jax
from jax import lax
import jax.numpy as jnp

from glm5_jax.core import masked
from glm5_jax.losses import aggregate


# exp(20) = 4.9e8: ratios stay finite, also squared in float32.
LOG_RATIO_LIMIT = 20.0


class Arrays(TypedDict):
    """The keyword arguments that every loss takes after `logp`, the trained policy's log-probabilities [B, T].

    `logp_old` are those of the trainer's policy when the batch began, by default stop_gradient(logp); `logp_behaviour`
    those that the inference engine recorded when it sampled, by default `logp_old`, so that an on-policy engine weighs
    1. All are float32, or float64. `advantage` is [B], one for all tokens of a row, or [B, T]. `mask` [B, T] is 0
    where a token was not sampled by the policy; what any array holds there, NaN included, is never used.
    `segment_ids` [B, T] are integers, one per packed sequence of a row and 0 for padding. `denominator` is
    `aggregate.count` of the whole batch where this is a shard or a micro-batch: then the losses of the parts add up.
    """

    logp_old: NotRequired[jax.Array | None]
    logp_behaviour: NotRequired[jax.Array | None]
    advantage: jax.Array
    mask: jax.Array
    segment_ids: NotRequired[jax.Array | None]
    denominator: NotRequired[jax.Array | float | None]


class Tokens(NamedTuple):
    """What a loss is computed from, [B, T] each, 0 wherever the mask is; gradients flow into `logp` alone.

    Of the dtype of `logp`. Log-probabilities of -inf are `masked.LOG_ZERO`, whose differences are finite.
    `sequence` numbers the sequences of each row; None where a row is a sequence.
    """

    logp: jax.Array
    logp_old: jax.Array
    logp_behaviour: jax.Array
    advantage: jax.Array
    mask: jax.Array
    sequence: jax.Array | None


def read(logp: Any, *, logp_old: Any, logp_behaviour: Any, advantage: Any, mask: Any, segment_ids: Any) -> Tokens:
    """The arguments as `Tokens`; raises ValueError naming the one that has the wrong shape or dtype."""
    logp = log_probs("logp", logp)
    if logp.ndim != 2:
        raise ValueError(f"logp: expected shape [B, T], found {logp.shape}")
    others = {"logp_old": logp_old, "logp_behaviour": logp_behaviour}
    given = {name: log_probs(name, x) for name, x in others.items() if x is not None}
    for name, x in given.items():
        if x.shape != logp.shape:
            raise ValueError(f"{name}: expected the shape of logp, {logp.shape}, found {x.shape}")
    advantage_BT = _advantage(advantage, logp.shape, packed=segment_ids is not None)
    mask_BT, sequence_BT = aggregate.read_mask(mask, segment_ids, logp.shape, logp.dtype)
    kept = lambda x_BT: jnp.where(mask_BT != 0, x_BT, 0)
    finite = lambda logp_BT: jnp.maximum(kept(logp_BT), masked.LOG_ZERO).astype(logp.dtype)
    old = lax.stop_gradient(given.get("logp_old", logp))
    behaviour = lax.stop_gradient(given.get("logp_behaviour", old))
    advantage_BT = lax.stop_gradient(kept(advantage_BT)).astype(logp.dtype)
    return Tokens(finite(logp), finite(old), finite(behaviour), advantage_BT, mask_BT, sequence_BT)


def bounded(log_ratio: jax.Array) -> jax.Array:
    """Held within `LOG_RATIO_LIMIT`; inside, value and gradient are untouched, beyond, the gradient is 0."""
    return jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def log_probs(name: str, x: Any) -> jax.Array:
    """As an array; raises ValueError unless it is float32 or float64, since half precision cannot carry a ratio."""
    x = jnp.asarray(x)
    if x.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"{name}: expected float32 log-probabilities, found {x.dtype}; take the logits to float32 "
                         f"before the log-softmax")
    return x


def _advantage(advantage: Any, shape: tuple[int, ...], packed: bool) -> jax.Array:
    advantage = jnp.asarray(advantage)
    if advantage.shape == shape:
        return advantage
    if packed:
        raise ValueError(f"advantage: expected shape {shape}, found {advantage.shape}: with segment_ids a row holds "
                         f"several sequences, so give each token its own")
    if advantage.shape != shape[:1]:
        raise ValueError(f"advantage: expected shape {shape[:1]} or {shape}, found {advantage.shape}")
    return jnp.broadcast_to(advantage[:, None], shape)
