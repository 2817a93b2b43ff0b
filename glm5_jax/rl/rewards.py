"""Rewards that block, isolated: what hangs or crashes is killed, and fails its rollout instead of scoring 0.

A single function needs no help: `functools.partial(processes.run, function, timeout=60)` is a reward.
"""

from collections.abc import Callable, Sequence
from typing import Any

from glm5_jax.envs.rubric import PartFailure, Rubric
from glm5_jax.records import Trajectory
from glm5_jax.rl.executors import CallFailed, Threads
from glm5_jax.rl.orchestrator import Reward


def by_rubric(rubric: Rubric, threads: Threads, arguments: Callable[[Trajectory], Sequence[Any]]) -> Reward:
    """The total of `rubric.score(*arguments(trajectory))`. The rubric runs its functions in a process of its own, under
    its time limit, one trajectory after the other; a part that failed there fails the reward."""

    async def reward(trajectory: Trajectory) -> float:
        score = await threads.run(rubric.score, *arguments(trajectory))
        for name, part in score.parts.items():
            if part.failure is not None:
                kind = TimeoutError if part.failure is PartFailure.TIMEOUT else CallFailed
                raise kind(f"part {name}: {part.failure}: {part.detail}")
        return score.total

    return reward
