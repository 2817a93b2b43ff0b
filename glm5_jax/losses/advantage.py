"""Advantages from the rewards of a group: what a rollout got, compared with others of the same prompt.

N rollouts.
"""

from typing import Any

import jax
import jax.numpy as jnp

from glm5_jax.losses import aggregate

STD_FLOOR = 1e-6


def group_advantage(reward_N: Any, group_N: Any, *, std: bool = True, valid_N: Any = None) -> jax.Array:
    """Reward minus the mean of its group, with `std` over (the group's population deviation + 1e-6); float32 [N].

    `group_N` are any integers, equal for rollouts of one prompt; groups may differ in size. A rollout that is not
    `valid_N` (bool) has advantage 0 and moves no other, whatever its reward is, NaN included. Where all rewards of a
    group are equal, all its advantages are exactly 0. A rollout that was forked into several traces counts once here:
    hand its advantage to each trace by indexing. GLM-5 report, section 3.2 (with `std`) and 3.3 (without). Raises
    ValueError naming the argument.
    """
    reward_N, member_N, valid_N = _groups(reward_N, group_N, valid_N)
    centred_N = _centred(reward_N, member_N, valid_N)
    if not std:
        return centred_N
    variance_N = _sum(centred_N ** 2, member_N) / _size(member_N, valid_N)
    return centred_N / (jnp.sqrt(variance_N) + STD_FLOOR)


def rloo_advantage(reward_N: Any, group_N: Any, *, valid_N: Any = None) -> jax.Array:
    """Reward minus the mean of the others in its group, float32 [N]; 0 for a rollout without others. arXiv 2402.14740.

    Arguments as those of `group_advantage`.
    """
    reward_N, member_N, valid_N = _groups(reward_N, group_N, valid_N)
    size_N = _size(member_N, valid_N)
    return _centred(reward_N, member_N, valid_N) * size_N / jnp.maximum(size_N - 1, 1)


def overlong_penalty(length_N: Any, *, limit: int, buffer: int) -> jax.Array:
    """What to add to the reward of a response of so many tokens, float32: 0 up to limit - buffer, -1 from limit on.

    Linear between them. DAPO, arXiv 2503.14476, equation 13. Raises ValueError unless 0 < buffer <= limit.
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"buffer: expected 1 to {limit} tokens, the limit, found {buffer}")
    over_N = jnp.asarray(length_N) - (limit - buffer)
    return -jnp.clip(over_N / buffer, 0, 1)


def _groups(reward_N: Any, group_N: Any, valid_N: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rewards (0 where not valid), the number of each rollout's group, and which are valid."""
    reward_N = jnp.asarray(reward_N)
    if reward_N.ndim != 1:
        raise ValueError(f"reward_N: expected shape [N], found {reward_N.shape}")
    group_N = aggregate.read_ids("group_N", group_N, reward_N.shape)
    valid_N = jnp.ones(reward_N.shape, bool) if valid_N is None else jnp.asarray(valid_N)
    if valid_N.shape != reward_N.shape or valid_N.dtype != jnp.bool_:
        raise ValueError(f"valid_N: expected bool of shape {reward_N.shape}, "
                         f"found {valid_N.dtype} of shape {valid_N.shape}")
    reward_N = reward_N.astype(jnp.promote_types(reward_N.dtype, jnp.float32))
    return jnp.where(valid_N, reward_N, 0), aggregate.renumber(group_N), valid_N


def _centred(reward_N: jax.Array, member_N: jax.Array, valid_N: jax.Array) -> jax.Array:
    """Rewards minus their group's mean; first shifted by its largest, because a mean of equal ones may be rounded."""
    largest_N = jax.ops.segment_max(jnp.where(valid_N, reward_N, -jnp.inf), member_N, len(reward_N))[member_N]
    shifted_N = jnp.where(valid_N, reward_N - largest_N, 0)
    return jnp.where(valid_N, shifted_N - _sum(shifted_N, member_N) / _size(member_N, valid_N), 0)


def _size(member_N: jax.Array, valid_N: jax.Array) -> jax.Array:
    return jnp.maximum(_sum(valid_N.astype(jnp.float32), member_N), 1)


def _sum(x_N: jax.Array, member_N: jax.Array) -> jax.Array:
    """The sum over the group of each."""
    return jax.ops.segment_sum(x_N, member_N, len(x_N))[member_N]
