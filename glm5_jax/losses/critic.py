"""Advantages from a critic's values over time, and the critic's own loss.

Time runs over the tokens that count: what lies between them, as a tool's answer, is passed over in no time.

B batch, T positions.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from glm5_jax.core.metrics import Mean
from glm5_jax.losses import aggregate
from glm5_jax.losses.aggregate import Aggregation
from glm5_jax.losses.compose import Result
from glm5_jax.losses.diagnostics import ExplainedVariance, Metrics


def gae(reward: Any, value: Any, mask: Any, *, gamma: float = 1.0, lam: Any = 1.0, segment_ids: Any = None
        ) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimates, and the returns advantage + value a critic learns from; float32 [B, T] both.

    delta_t = r_t + gamma V_t+1 - V_t and A_t = delta_t + gamma lam A_t+1, where t + 1 is the next token of the sequence
    that counts; behind its last one both are 0, so that a truncated sequence wants gamma V(next) added to its last
    reward. `reward` and `value` [B, T] are read only where `mask` [B, T] is not 0; elsewhere the results are 0.
    `lam` is a number or [B, T], such as `length_adaptive_lambda`. Constants: no gradient flows through them.
    arXiv 1506.02438, equation 16. Raises ValueError naming the argument.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma: expected 0 to 1, found {gamma}")
    value_BT = lax.stop_gradient(_float("value", value, None))
    mask_BT, sequence_BT = aggregate.read_mask(mask, segment_ids, value_BT.shape, value_BT.dtype)
    counted_BT = mask_BT != 0
    reward_BT = lax.stop_gradient(_float("reward", reward, value_BT.shape))
    lam = lax.stop_gradient(jnp.asarray(lam, value_BT.dtype))
    if lam.shape not in ((), value_BT.shape):
        raise ValueError(f"lam: expected a number or shape {value_BT.shape}, found {lam.shape}")
    reward_BT, value_BT = jnp.where(counted_BT, reward_BT, 0), jnp.where(counted_BT, value_BT, 0)
    if sequence_BT is None:
        sequence_BT = jnp.zeros(value_BT.shape, jnp.int32)

    def back(after: tuple[jax.Array, ...], now: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], jax.Array]:
        next_advantage_B, next_value_B, next_sequence_B = after
        reward_B, value_B, counted_B, sequence_B, lam_B = now
        goes_on_B = sequence_B == next_sequence_B
        advantage_B = reward_B - value_B + gamma * jnp.where(goes_on_B, next_value_B + lam_B * next_advantage_B, 0)
        passed = tuple(jnp.where(counted_B, x, y) for x, y in zip((advantage_B, value_B, sequence_B), after))
        return passed, jnp.where(counted_B, advantage_B, 0)

    over_time = [x.T for x in (reward_BT, value_BT, counted_BT, sequence_BT, jnp.broadcast_to(lam, value_BT.shape))]
    behind = tuple(jnp.zeros(len(x), x.dtype) for x in (value_BT, value_BT, sequence_BT))
    _, advantage_TB = lax.scan(back, behind, tuple(over_time), reverse=True)
    return advantage_TB.T, advantage_TB.T + value_BT


def length_adaptive_lambda(mask: Any, segment_ids: Any = None, *, scale: float = 0.05) -> jax.Array:
    """1 - 1 / (scale L) for each token of a sequence in which L count, at least 0; float32 [B, T].

    So the horizon of `gae` grows with the length of what was written. VAPO, arXiv 2504.05118, section 4.2. Raises
    ValueError naming the argument.
    """
    if not scale > 0:
        raise ValueError(f"scale: expected more than 0, found {scale}")
    mask_BT, sequence_BT = aggregate.read_mask(mask, segment_ids)
    counted_BT = (mask_BT != 0).astype(mask_BT.dtype)
    return jnp.maximum(1 - 1 / (scale * aggregate.sequence_length(counted_BT, sequence_BT)), 0)


def value_loss(value: Any, *, returns: Any, mask: Any, value_old: Any = None, clip: float | None = None,
               segment_ids: Any = None, denominator: Any = None, aggregation: Aggregation = "token_mean") -> Result:
    """Half the squared error of a critic, a scalar to minimise, and its metrics; arrays are [B, T] float32.

    With `clip` the larger of it and that of `value` held within `clip` of `value_old`, the critic's values when the
    batch began. `mask`, `segment_ids` and `denominator` as in `arguments.Arrays`. Metrics: `value/mean`,
    `returns/mean`, `value/error` (absolute), `value/explained_variance` and, with `clip`, `value/clip`, the share of
    values that are held back. Raises ValueError naming the argument.
    """
    aggregate.check_aggregation(aggregation)
    if (clip is None) != (value_old is None) or clip is not None and not clip > 0:
        raise ValueError(f"clip: expected a number above 0 together with value_old, or neither, found {clip}")
    value_BT = _float("value", value, None)
    mask_BT, sequence_BT = aggregate.read_mask(mask, segment_ids, value_BT.shape, value_BT.dtype)
    kept = lambda name, x: jnp.where(mask_BT != 0, _float(name, x, value_BT.shape), 0)
    value_BT, returns_BT = kept("value", value_BT), lax.stop_gradient(kept("returns", returns))
    error_BT = (value_BT - returns_BT) ** 2
    metrics: Metrics = {
        "value/mean": Mean.of(value_BT, mask_BT),
        "value/error": Mean.of(jnp.abs(value_BT - returns_BT), mask_BT),
        "value/explained_variance": ExplainedVariance.of(value_BT, returns_BT, mask_BT),
        "returns/mean": Mean.of(returns_BT, mask_BT),
    }
    if clip is not None:
        old_BT = lax.stop_gradient(kept("value_old", value_old))
        held_BT = old_BT + jnp.clip(value_BT - old_BT, -clip, clip)
        metrics["value/clip"] = Mean.of(jnp.abs(value_BT - old_BT) > clip, mask_BT)
        error_BT = jnp.maximum(error_BT, (held_BT - returns_BT) ** 2)
    loss = aggregate.aggregate(error_BT / 2, mask_BT, sequence_BT, aggregation=aggregation, denominator=denominator)
    return loss, lax.stop_gradient(metrics)


def _float(name: str, x: Any, shape: tuple[int, ...] | None) -> jax.Array:
    """As an array of float32 or wider; raises ValueError for another shape than `shape` (None: any [B, T])."""
    x = jnp.asarray(x)
    if x.ndim != 2 or shape not in (None, x.shape):
        raise ValueError(f"{name}: expected shape {shape or '[B, T]'}, found {x.shape}")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
