"""From groups of rollouts to the packed rows that a policy is trained on: what was sampled, as it was sampled."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from glm5_jax.data import packing
from glm5_jax.data.packing import Rows
from glm5_jax.losses.aggregate import Aggregation
from glm5_jax.records import Group
from glm5_jax.rl import assemble

# (rewards [N], their groups [N]) -> advantages [N], as `losses.advantage.group_advantage`.
Advantage = Callable[[Any, Any], Any]


def of_groups(groups: Sequence[Group], *, length: int, multiple: int, advantage: Advantage, aggregation: Aggregation,
              teacher: Callable[[str], int] | None = None) -> Rows:
    """Rows of `length` tokens, a multiple of `multiple` many, the last ones padding.

    The weights are 1 for what the policy sampled, each token once for each member of its group, else 0. Streams:
    `logp_behaviour` and `version`, as the engine stamped them, and `advantage`: those of the complete rollouts, from
    their rewards, scaled such that a rollout of several contexts counts as one: with "sequence_mean_of_token_means"
    every token of it alike. A repeated member has the advantage of its first. With `teacher`, which gives the
    number of a task's, `teacher` is a stream too. Raises ValueError for a context longer than a row, and where nothing
    was sampled.
    """
    rewards, numbers = zip(*((one.reward, number) for number, group in enumerate(groups)
                             for one in group.trajectories if one.end.complete))
    advantages = iter(np.asarray(advantage(np.array(rewards), np.array(numbers)), np.float64))
    contexts: list[tuple[assemble.Row, float, int]] = []  # with the advantage and the teacher of each
    rollouts = 0
    for group in groups:
        own = {one.id: float(next(advantages)) for one in group.trajectories if one.end.complete}
        for member in group.members:
            rows = [row for row in assemble.rows(member) if any(row.trained)]
            sampled = sum(sum(row.trained) for row in rows)
            rollouts += bool(rows)
            for row in rows:
                share = sum(row.trained) / sampled if aggregation == "sequence_mean_of_token_means" else 1.0
                contexts.append((row, own[member.id] * share, teacher(member.task) if teacher else 0))
    if not contexts:
        raise ValueError(f"groups: expected sampled tokens, found none in {[group.id for group in groups]}")
    for row, *_ in contexts:
        if len(row.ids) > length:
            raise ValueError(f"rollout {row.rollout!r}: expected at most {length} tokens in a context (the length of a "
                             f"training row), found {len(row.ids)}; make rows as long as the engines' max_len")
    # A loss that is a mean over sequences divides by contexts: by rollouts is meant.
    scale = 1.0 if aggregation == "token_mean" else len(contexts) / rollouts
    streams = {"logp_behaviour": [np.array(row.logprobs) for row, *_ in contexts],
               "version": [np.array(row.versions) for row, *_ in contexts],
               "advantage": [np.full(len(row.ids), scale * value) for row, value, _ in contexts]}
    if teacher:
        streams["teacher"] = [np.full(len(row.ids), number) for row, _, number in contexts]
    packed = packing.pack_best_fit(
        [np.array(row.ids, np.int32) for row, *_ in contexts], length,
        loss_weights=[np.array(row.trained, np.float32) for row, *_ in contexts], streams=streams)
    missing = -len(packed.tokens) % multiple
    return jax.tree.map(lambda x: np.pad(x, ((0, missing), (0, 0))), packed)
