"""Losses per token, of arrays alone: nothing is reduced here, so that the caller divides by the count of everything."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats, float32 [...], of logits [..., V] and integer targets [...]."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def future_targets(targets_BT: jax.Array, segment_ids_BT: jax.Array, weights_BT: jax.Array, step: int
                   ) -> tuple[jax.Array, jax.Array]:
    """Targets and weights [B, T] of multi-token-prediction step k: row t predicts what row t+k predicts, token t+k+1.

    The weight is 0 where row t+k is beyond the end, of another segment, or padding. GLM-5 report, section 2.1.
    """
    if not 0 <= step:
        raise ValueError(f"step: expected 0 or more, found {step}")
    length = targets_BT.shape[1]
    ahead = lambda x_BT: jnp.pad(x_BT, ((0, 0), (0, step)))[:, step:step + length]
    same = (ahead(segment_ids_BT) == segment_ids_BT) & (segment_ids_BT != 0)
    return ahead(targets_BT), jnp.where(same, ahead(weights_BT), 0)
