"""Invariant 20: a reward that hangs or crashes costs its worker and its rollout, and nobody else's."""

import asyncio
import functools

import pytest

from glm5_jax.envs.rubric import Rubric
from glm5_jax.records import EndReason, FailureReason, Trajectory
from glm5_jax.rl.executors import Processes, Threads
from glm5_jax.rl.ledger import Order
from glm5_jax.rl.orchestrator import Orchestrator, Service
from glm5_jax.rl.rewards import by_rubric
from tests.rl.judges import CRASHES, GOOD, HANGS, NONSENSE, RAISES, judged, of_trajectory

REASONS = {HANGS: FailureReason.TIMEOUT, CRASHES: FailureReason.REWARD, RAISES: FailureReason.REWARD,
           NONSENSE: FailureReason.REWARD}


async def play(order, id, so_far, called_back):
    return Trajectory(id, order.task, order.seed, [{"messages": [], "reply": {"role": "assistant"}}], "done")


async def rewarded(reward, seeds):
    """What becomes of a rollout of each seed, played at the same time."""
    orchestrator = Orchestrator([Service("sums", 1.0, 8, 1, int, play, reward)], retries=1)
    return await asyncio.gather(*(orchestrator.play(Order(f"g-{i}", "sums", seed, 1, 0), f"r-{i}", None)
                                  for i, seed in enumerate(seeds)))


def assert_each_for_itself(found):
    for one in found:
        if one.seed == GOOD:
            assert (one.end, one.reward) == (EndReason.DONE, 0.75)
        else:
            assert (one.reward, one.failure.reason, one.failure.place) == (None, REASONS[one.seed], "reward")


@pytest.mark.parametrize("bad", REASONS)
def test_in_processes(bad):
    async def main():
        processes = Processes(1)
        short, long = (functools.partial(processes.run, of_trajectory, timeout=limit) for limit in (0.3, 600.0))
        found = await rewarded(short, [HANGS]) if bad == HANGS else await rewarded(long, [GOOD, bad])
        found += await rewarded(long, [GOOD])
        await processes.close()
        assert_each_for_itself(found)

    asyncio.run(main())


def test_by_a_rubric():
    async def main():
        with Rubric([("judged", judged, 2.0)], wall_s=600.0) as rubric:
            reward = by_rubric(rubric, Threads(4), lambda trajectory: (trajectory.seed,))
            found = await rewarded(reward, [GOOD, CRASHES, RAISES, NONSENSE, GOOD])
        with Rubric([("judged", judged, 2.0)], wall_s=0.3) as rubric:
            reward = by_rubric(rubric, Threads(4), lambda trajectory: (trajectory.seed,))
            found += await rewarded(reward, [HANGS])
        assert [one.reward for one in found] == [1.5, None, None, None, 1.5, None]
        assert_each_for_itself([one for one in found if one.seed != GOOD])
        assert "part judged: timeout" in found[-1].failure.detail

    asyncio.run(main())
