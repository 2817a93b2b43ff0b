"""Losses per token, of arrays alone: nothing is reduced here, so that the caller divides by the count of everything.

A label's weight comes in there too: `masked_sum(nats, weights) / count`.

B batch, T positions, C positions of a block, D model width, V vocabulary.
"""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats, float32 [...], of logits [..., V] and integer targets [...]."""
    return _normalised(logits, targets)[0]


def z_loss(log_z: jax.Array) -> jax.Array:
    """The square of the log-normaliser, which kept small keeps logits from drifting. PaLM report, section 5."""
    return jnp.square(log_z)


def projected_cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array, *, tied: bool = False,
                            chunk: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy in nats and log-normaliser of the logits, both float32 [..., T], straight from hidden states.

    `hidden` [..., T, D] is taken after the final norm; integer `targets` [..., T]; `head` [D, V], or an embedding
    [V, D] where it is `tied`. Products are in the dtype of `hidden`, sums in float32. Predictions that share the head,
    as those of multi-token prediction, go in together, stacked in front, so that its gradient is summed once.

    With `chunk`, logits exist for at most `chunk` positions of every row at a time and are made anew in the backward
    pass: one product of three more in the head, and the same values and gradients up to rounding. Each block takes
    every so many-th position, so that a time axis split over devices stays split. GLM-5 report, section 2.4. Raises
    ValueError for a chunk below 1.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected at least 1 position, found {chunk}")
    length = targets.shape[-1]
    if chunk is None or chunk >= length:
        return _normalised(_logits(hidden, head, tied), targets)
    blocks = -(-length // chunk)
    cut = functools.partial(_cut, axis=targets.ndim - 1, blocks=blocks)
    results = _in_blocks(tied, cut(hidden), head, cut(targets))
    nats, log_z = (jnp.moveaxis(x, 0, -1).reshape(*targets.shape[:-1], -1)[..., :length] for x in results)
    return nats, log_z


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


def _normalised(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and log-normaliser, float32 [...]."""
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z


def _logits(hidden: jax.Array, head: jax.Array, tied: bool) -> jax.Array:
    letters = "vd" if tied else "dv"
    return jnp.einsum(f"...d,{letters}->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _cut(x: jax.Array, *, axis: int, blocks: int) -> jax.Array:
    """[..., T, ...] as [blocks, ..., C, ...]; block i holds positions i, i + blocks, i + 2 blocks and so on."""
    per_block = -(-x.shape[axis] // blocks)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, per_block * blocks - x.shape[axis])
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], per_block, blocks, *x.shape[axis + 1:]), axis + 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_blocks(tied: bool, hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and log-normaliser [blocks, ..., C] of hidden [blocks, ..., C, D], block after block."""
    head = head.astype(hidden.dtype)
    return lax.map(lambda block: _normalised(_logits(block[0], head, tied), block[1]), (hidden, targets))


def _in_blocks_forward(tied: bool, hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
    nats, log_z = _in_blocks(tied, hidden, head, targets)
    return (nats, log_z), (hidden, head, targets, log_z)


def _in_blocks_backward(tied: bool, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    """d logits = (d nats + d log_z) softmax - d nats at the target; the gradient of the head is summed in float32."""
    hidden, head, targets, log_z = kept
    narrow = head.astype(hidden.dtype)

    def block(d_head: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        h, target, log_z, d_nats, d_log_z = xs
        p = jnp.exp(_logits(h, narrow, tied) - log_z[..., None])
        chosen = jnp.arange(p.shape[-1]) == target[..., None]
        d_logits = (d_nats + d_log_z)[..., None] * p - jnp.where(chosen, d_nats[..., None], 0)
        d_logits = d_logits.astype(h.dtype)
        d_h = jnp.einsum(f"...v,{'vd' if tied else 'dv'}->...d", d_logits, narrow, preferred_element_type=jnp.float32)
        rows = tuple(range(h.ndim - 1))
        factors = (d_logits, h) if tied else (h, d_logits)
        d_head += jnp.tensordot(*factors, axes=(rows, rows), preferred_element_type=jnp.float32)
        return d_head, d_h.astype(h.dtype)

    d_head, d_hidden = lax.scan(block, jnp.zeros(head.shape, jnp.float32), (hidden, targets, log_z, *cotangents))
    return d_hidden, d_head.astype(head.dtype), None


_in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)
