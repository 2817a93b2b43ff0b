"""From recorded rollouts to what a training step sees: which of a group count, and the token rows they are made of."""

import collections
import dataclasses
from collections.abc import Sequence

from glm5_jax.records import Group, StopReason, Trajectory


@dataclasses.dataclass(frozen=True)
class Refused:
    """A group that makes no batch: the commonest reason of its failures, and all of them for people."""

    reason: str
    detail: str


def settle(group: str, size: int, trajectories: Sequence[Trajectory]) -> Group | Refused:
    """What becomes of a group whose rollouts have all ended.

    Failed rollouts are left out, with their reasons on record. Where more than half of `size` are complete, they are
    repeated in turn until the group is full; else the group is refused. GLM-5 report, section 4.1. Take advantages over
    the complete trajectories, not over `members`, and hand a repeat its own: then no failure moves anybody's. Raises
    ValueError for rollouts that have not all ended, or are not `size` many.
    """
    unfinished = [one.id for one in trajectories if not one.end.complete and one.failure is None]
    if len(trajectories) != size or unfinished:
        raise ValueError(f"group {group!r}: expected {size} rollouts that have ended, found {len(trajectories)}, of "
                         f"which these are partial: {unfinished}")
    complete = [i for i, one in enumerate(trajectories) if one.end.complete]
    if 2 * len(complete) <= size:
        reasons = collections.Counter(one.failure.reason.value for one in trajectories if one.failure)
        return Refused(reasons.most_common(1)[0][0], f"{len(complete)} of {size} complete; failed: " + ", ".join(
            f"{reason} {count}" for reason, count in reasons.most_common()))
    missing = size - len(complete)
    return Group(group, size, tuple(trajectories), tuple(complete[i % len(complete)] for i in range(missing)))


@dataclasses.dataclass(frozen=True)
class Row:
    """One context of a rollout as it was sent and sampled, token by token.

    `trained` says which tokens carry loss: those that the policy sampled, each in one row of the rollout only. Where it
    is False, log-probs are 0 and versions -1.
    """

    rollout: str
    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]


def rows(trajectory: Trajectory) -> tuple[Row, ...]:
    """The contexts of a rollout: one for each turn that no later turn extends, in their order.

    Where contexts share turns, as after a fork, the first one trains on them. Nobody trains on a turn that was called
    back and not resumed, as by a client that hung up: the episode went on without it. Raises ValueError for a rollout
    without tokens.
    """
    if any(turn.completion is None for turn in trajectory.turns):
        raise ValueError(f"rollout {trajectory.id!r}: expected the tokens of every turn, found a turn without")
    extended, seen, found = {turn.extends for turn in trajectory.turns}, set[int](), []
    for leaf in range(len(trajectory.turns)):
        if leaf in extended:
            continue
        path: list[int] = []
        turn: int | None = leaf
        while turn is not None:
            path.append(turn)
            turn = trajectory.turns[turn].extends
        found.append(_row(trajectory, path[::-1], seen))
        seen |= set(path)
    return tuple(found)


def _row(trajectory: Trajectory, path: Sequence[int], seen: set[int]) -> Row:
    ids: list[int] = []
    trained: list[bool] = []
    logprobs: list[float] = []
    versions: list[int] = []
    for index in path:
        turn = trajectory.turns[index]
        assert turn.completion is not None  # `rows` looked
        sampled = turn.completion
        ids += turn.prompt + sampled.ids
        given, count = len(turn.prompt), len(sampled.ids)
        fresh = index not in seen and sampled.stop is not StopReason.ABORT
        trained += [False] * given + [fresh] * count
        logprobs += [0.0] * given + (list(sampled.logprobs) if fresh else [0.0] * count)
        versions += [-1] * given + (list(sampled.versions) if fresh else [-1] * count)
    return Row(trajectory.id, tuple(ids), tuple(trained), tuple(logprobs), tuple(versions))
