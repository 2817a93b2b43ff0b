"""Executors: what is returned, raised, killed and counted; processes import the functions from this very module."""

import asyncio
import ctypes
import os
import signal
import sys
import threading
import time

import pytest

from glm5_jax.records import Trajectory
from glm5_jax.rl.executors import CallFailed, Processes, Threads, Workers, WorkerLost, import_path

FOREVER = 1000.0
ONE = Trajectory(id="sums-0", task="sums", seed=3, turns=[{"messages": [], "reply": {"role": "assistant"}}], end="done")


def add(one, two):
    return one + two


def pid():
    return os.getpid()


def marked(trajectory, word):
    return Trajectory(trajectory.id + word, trajectory.task, trajectory.seed, trajectory.turns, trajectory.end)


def raises(value):
    raise LookupError(f"nothing about {value}")


def prints(value):
    print("loud")
    os.system("echo loud")
    return value


def hangs(folder):
    """With a child of its own, as programs have them."""
    child = os.fork()
    if child:
        with open(f"{folder}/pids.new", "w") as file:
            file.write(f"{os.getpid()} {child}")
        os.rename(f"{folder}/pids.new", f"{folder}/pids")
    time.sleep(FOREVER)


def crashes():
    ctypes.string_at(0)


def nonsense():
    return {1, 2}


def alive(process):
    """Whether a process runs: neither gone nor a zombie that nobody has waited for."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def played(scenario, executor):
    async def main():
        try:
            return await scenario(executor)
        finally:
            await executor.close()
    return asyncio.run(main())


@pytest.mark.parametrize("make", [Threads, Processes])
def test_a_call_returns_and_raises_as_the_function_does(make):
    async def scenario(executor):
        assert await executor.run(add, 1, 2) == 3
        assert await executor.run(marked, ONE, "-again", timeout=FOREVER) == marked(ONE, "-again")
        with pytest.raises((LookupError, CallFailed), match="nothing about 7"):
            await executor.run(raises, 7)
        assert await executor.run(prints, [None, 0.5]) == [None, 0.5]
        assert await asyncio.gather(*(executor.run(add, i, i) for i in range(20))) == [2 * i for i in range(20)]

    played(scenario, make(2))


def test_threads_run_so_many_at_once_and_no_more():
    inside, most, go = set(), [], threading.Event()

    def work(i):
        inside.add(i)
        most.append(len(inside))
        if len(most) == 3:
            go.set()
        go.wait()
        inside.remove(i)

    async def scenario(executor):
        await asyncio.gather(*(executor.run(work, i) for i in range(12)))

    played(scenario, Threads(3))
    assert max(most) == 3 and len(most) == 12


def test_a_thread_that_hangs_gives_its_place_back():
    never = threading.Event()

    async def scenario(executor):
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await executor.run(never.wait, timeout=0.01)
        assert await executor.run(add, 1, 1) == 2
        with pytest.raises(RuntimeError, match="raised StopIteration"):
            await executor.run(next, iter(()))
        with pytest.raises(RuntimeError, match="raised SystemExit"):
            await executor.run(sys.exit, 3)

    played(scenario, Threads(1))
    never.set()


def test_a_process_serves_many_calls():
    async def scenario(executor):
        first = await executor.run(pid)
        with pytest.raises(CallFailed):
            await executor.run(raises, 1)
        assert await executor.run(pid) == first != os.getpid()
        await executor.close()
        assert not alive(first) and await executor.run(pid) != first

    played(scenario, Processes(1))


def test_a_process_that_hangs_is_killed_with_its_children(tmp_path):
    """Invariant 20: the worker is killed and its place is free."""
    async def scenario(executor):
        with pytest.raises(TimeoutError):
            await executor.run(time.sleep, FOREVER, timeout=0.05)
        assert await executor.run(add, 1, 1, timeout=FOREVER) == 2
        call = asyncio.create_task(executor.run(hangs, str(tmp_path)))
        await until((tmp_path / "pids").exists)
        pids = (tmp_path / "pids").read_text().split()
        assert all(map(alive, pids))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: not any(map(alive, pids)))
        assert await executor.run(add, 1, 1) == 2

    played(scenario, Processes(1))


def test_a_process_that_crashes_is_replaced():
    async def scenario(executor):
        first = await executor.run(pid)
        for _ in range(2):
            with pytest.raises(WorkerLost, match=f"return code -{signal.SIGSEGV.value}"):
                await executor.run(crashes)
        assert await executor.run(pid) != first
        os.kill(await executor.run(pid), signal.SIGKILL)  # between two calls
        with pytest.raises(WorkerLost):
            await executor.run(pid)
        assert await executor.run(add, 1, 1) == 2

    played(scenario, Processes(1))


def test_closing_ends_the_calls_that_run(tmp_path):
    async def scenario(executor):
        call = asyncio.create_task(executor.run(hangs, str(tmp_path)))
        await until((tmp_path / "pids").exists)
        await executor.close()
        with pytest.raises(WorkerLost):
            await call

    played(scenario, Processes(1))


class Scripted(Workers):
    """Workers are numbers, and begin and answer when a test says so."""

    def __init__(self, workers):
        super().__init__(workers)
        self.begin, self.answer, self.started, self.killed = asyncio.Event(), asyncio.Event(), 0, []

    async def _start(self):
        self.started += 1
        own = self.started
        await self.begin.wait()
        return own

    async def _call(self, worker, function, args, timeout):
        await self.answer.wait()
        if worker in self.killed:
            raise WorkerLost(f"{worker} was killed")
        return function(*args)

    def _kill(self, worker):
        self.killed.append(worker)


@pytest.mark.parametrize("begun", [False, True])
def test_no_call_outlives_the_end_in_a_worker_of_its_own(begun):
    """Neither one that waits for its turn, nor one whose worker just begins."""
    async def main():
        executor = Scripted(1)
        if begun:
            executor.begin.set()
        calls = [asyncio.create_task(executor.run(add, i, i)) for i in range(3)]
        await until(lambda: len(executor._busy) == begun and executor.started)
        await executor.close()
        executor.begin.set()
        executor.answer.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(one) for one in found] == [WorkerLost] * 3
        assert executor.started == 1 and set(executor.killed) == {1} and not executor._idle + executor._busy
        assert await executor.run(add, 1, 1) == 2 and executor.started == 2

    asyncio.run(main())


def test_only_values_cross_and_only_by_name():
    async def scenario(executor):
        with pytest.raises(CallFailed, match="set is not JSON serializable"):
            await executor.run(nonsense)
        with pytest.raises(TypeError, match="object is not JSON serializable"):
            await executor.run(add, object(), 1)
        with pytest.raises(ValueError, match="expected one at the top of an importable module, found <.*lambda"):
            await executor.run(lambda: 1)
        assert await executor.run(add, 1, 1) == 2

    played(scenario, Processes(1))
    assert import_path(os.path.join) == "posixpath:join"
    with pytest.raises(ValueError, match="expected one at the top"):
        import_path(threading.Event().wait)
    for make in (Threads, Processes):
        with pytest.raises(ValueError, match="workers: expected at least 1, found 0"):
            make(0)
