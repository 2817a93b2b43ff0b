"""Calls on a Ray cluster of this host's own: the protocol of executors, and nothing lost when a worker is killed."""

import asyncio
import os
import signal
import sys
import time

import pytest
import ray

from glm5_jax.records import EndReason, Trajectory
from glm5_jax.rl.executors import CallFailed, WorkerLost
from glm5_jax.rl.ledger import Order
from glm5_jax.rl.orchestrator import Orchestrator, Service
from glm5_jax.rl.ray_executor import RayWorkers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """The smallest there is: two processors, the least memory, nothing that listens beyond this host."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, _node_ip_address="127.0.0.1",
             configure_logging=False, log_to_driver=False)
    yield
    ray.shutdown()
    monkeypatch.undo()


def calls(scenario, workers=2):
    async def main():
        executor = RayWorkers(workers)
        try:
            await scenario(executor)
        finally:
            await executor.close()
    asyncio.run(main())


def begins_and_hangs(folder, name):
    """Tells who plays what, then waits until there is a file `go`; runs in a worker, by value."""
    with open(os.path.join(folder, f"{name}-{os.getpid()}"), "w"):
        pass
    while not os.path.exists(os.path.join(folder, "go")):
        time.sleep(0.01)
    return os.getpid()


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


def test_calls_return_raise_and_are_killed_at_their_time_limit():
    def divide(one, two):
        return one / two

    async def scenario(executor):
        assert await executor.run(divide, 1, 4) == 0.25
        pids = set(await asyncio.gather(*(executor.run(os.getpid) for _ in range(8))))
        assert 1 <= len(pids) <= 2 and os.getpid() not in pids
        with pytest.raises(CallFailed, match="ZeroDivisionError: division by zero"):
            await executor.run(divide, 1, 0)
        assert {await executor.run(os.getpid) for _ in range(4)} <= pids
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await executor.run(time.sleep, 1000, timeout=0.1)
        with pytest.raises(WorkerLost):
            await executor.run(os._exit, 3)
        assert await executor.run(divide, 6, 3) == 2

    calls(scenario)


def test_work_of_a_killed_worker_ends_elsewhere(tmp_path):
    """Invariant 7: two worker processes, one of them killed in the middle of a rollout; none is lost or double."""
    def work(id, folder, play=begins_and_hangs):
        return [id, play(folder, id)]

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    log = []

    async def scenario(executor):
        async def play(order, id, so_far, called_back):
            found, pid = await executor.run(work, id, str(tmp_path))
            turn = {"messages": [], "reply": {"role": "assistant", "content": f"{pid}"}}
            return Trajectory(found, order.task, order.seed, [turn], "done")

        orchestrator = Orchestrator([Service("sums", 1.0, 8, 6, int, play)], log=log.append)
        order = Order("g-0", "sums", 7, 6, 0)
        plays = [asyncio.create_task(orchestrator.play(order, f"sums-{i}", None)) for i in range(6)]
        begun = lambda: [file.rpartition("-") for file in os.listdir(tmp_path)]
        await until(lambda: len(begun()) == 2)
        (lost, _, killed), _ = begun()
        os.kill(int(killed), signal.SIGKILL)
        await until(lambda: len(begun()) == 3)
        (tmp_path / "go").touch()
        ended = await asyncio.gather(*plays)
        assert [(one.id, one.end) for one in ended] == [(f"sums-{i}", EndReason.DONE) for i in range(6)]
        assert killed not in {one.turns[0].reply["content"] for one in ended}
        assert sum(name == lost for name, _, _ in begun()) == 2 and len(log) == 6

    calls(scenario)


def test_a_cluster_is_needed(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match="expected a Ray cluster, found none; call ray.init"):
        RayWorkers(1)
