"""Where blocking work runs: threads of this process, or processes of their own that are killed at the time limit.

One protocol for both and for a Ray cluster (`rl.ray_executor`). An executor runs a bounded number of calls at once; the
others wait for their turn in the order in which they came, and a call's time limit begins with its turn.
"""

import abc
import asyncio
import contextlib
import contextvars
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from glm5_jax.rl import call_worker

START_S = 120.0  # for a new process to start and to import what it is to call
GONE_S = 5.0  # for a killed process to be gone
LONGEST = 2**28  # bytes of one answer
W = TypeVar("W")


class WorkerLost(RuntimeError):
    """The process or host that ran a call has ended under it; another one may do it again."""


class CallFailed(RuntimeError):
    """The function raised in another process; the text is its traceback."""


class Executor(Protocol):
    """Runs functions that block."""

    async def run(self, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> Any:
        """What `function(*args)` returns, or raises: TimeoutError after `timeout` seconds, WorkerLost where its worker
        died. A call that is cancelled frees its place at once."""

    async def close(self) -> None:
        """Ends all workers; calls that run raise WorkerLost."""


class Threads:
    """Up to `workers` calls at once, each in a thread of its own.

    Python cannot end a thread: at its time limit a call is given up and its place is free, but the thread goes on until
    the function returns. What may hang for good belongs into `Processes`.
    """

    def __init__(self, workers: int = 64):
        self._slots = asyncio.Semaphore(_at_least_one(workers))

    async def run(self, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> Any:
        async with self._slots, asyncio.timeout(timeout):
            loop = asyncio.get_running_loop()
            future = loop.create_future()
            call = contextvars.copy_context().run

            def settle(value: Any, error: BaseException | None) -> None:
                if not future.done():
                    future.set_exception(error) if error else future.set_result(value)

            def work() -> None:
                value: Any = None
                error: BaseException | None = None
                try:
                    value = call(function, *args)
                except BaseException as raised:
                    error = raised
                    if isinstance(raised, StopIteration) or not isinstance(raised, Exception):
                        # A future does not take the one, and the others would end the loop.
                        error = RuntimeError(f"{function} raised {type(raised).__name__}")
                        error.__cause__ = raised
                with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
                    loop.call_soon_threadsafe(settle, value, error)

            threading.Thread(target=work, name="call", daemon=True).start()
            return await future

    async def close(self) -> None:
        """Does nothing: threads end with their functions, or with the process."""


class Workers(abc.ABC, Generic[W]):
    """Calls in workers that can be killed: started when needed, used again, replaced when lost."""

    def __init__(self, workers: int):
        self._slots = asyncio.Semaphore(_at_least_one(workers))
        self._idle: list[W] = []
        self._busy: list[W] = []
        self._closings = 0

    async def run(self, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> Any:
        closings = self._closings
        async with self._slots:
            self._unless_closed(closings)
            worker = self._idle.pop() if self._idle else await self._start()
            self._busy.append(worker)
            whole = False
            try:
                self._unless_closed(closings)
                answer = await self._call(worker, function, args, timeout)
                whole = True
                return answer
            except CallFailed:
                whole = True
                raise
            finally:
                if whole and worker in self._busy:  # else it was closed meanwhile, or is in the middle of a call
                    self._busy.remove(worker)
                    self._idle.append(worker)
                else:
                    self._busy = [one for one in self._busy if one is not worker]
                    self._kill(worker)
                    await self._gone(worker)

    async def close(self) -> None:
        """Kills all workers; calls that run or wait raise WorkerLost. The next `run` would start others."""
        self._closings += 1
        idle, busy, self._idle, self._busy = self._idle, self._busy, [], []
        for worker in idle + busy:
            self._kill(worker)
        await asyncio.gather(*map(self._gone, idle))

    def _unless_closed(self, closings: int) -> None:
        if self._closings != closings:
            raise WorkerLost("this executor was closed under the call")

    @abc.abstractmethod
    async def _start(self) -> W:
        """A new worker."""

    @abc.abstractmethod
    async def _call(self, worker: W, function: Callable[..., Any], args: tuple, timeout: float | None) -> Any:
        """One call; CallFailed says that the worker can go on, anything else that it cannot."""

    @abc.abstractmethod
    def _kill(self, worker: W) -> None:
        """Ends a worker at once; one that has ended is no error."""

    async def _gone(self, worker: W) -> None:
        """Returns when a killed worker is no more."""


class Processes(Workers[asyncio.subprocess.Process]):
    """Up to `workers` calls at once, each in a process started afresh, which is killed with all its children at the
    time limit.

    A function must be importable by name, so no lambda, no inner function, nothing of `__main__`; what it takes and
    returns is JSON or one of `records`: nothing is pickled, so that a worker can say nothing but values. It protects
    from accidents, not from malice: what a model wrote belongs into the sandbox, and a function may call that.
    """

    def __init__(self, workers: int = 2):
        super().__init__(workers)

    async def _start(self) -> asyncio.subprocess.Process:
        path = os.pathsep.join(folder for folder in sys.path if folder)
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", call_worker.__name__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path}, start_new_session=True, limit=LONGEST)

    async def _call(self, worker: asyncio.subprocess.Process, function: Callable[..., Any], args: tuple,
                    timeout: float | None) -> Any:
        assert worker.stdin
        request = {"function": import_path(function), "args": [call_worker.encode(one) for one in args]}
        line = json.dumps(request, allow_nan=False).encode() + b"\n"
        with contextlib.suppress(ConnectionError):  # it has ended, which its answer will say
            worker.stdin.write(line)
            await worker.stdin.drain()
        await self._answer(worker, START_S)  # it has imported the function, which is not the function's time
        return call_worker.decode(await self._answer(worker, timeout))

    async def _answer(self, worker: asyncio.subprocess.Process, timeout: float | None) -> Any:
        assert worker.stdout
        async with asyncio.timeout(timeout):
            try:
                line = await worker.stdout.readline()
            except ValueError as error:
                raise WorkerLost(f"answer: expected at most {LONGEST} bytes, found more") from error
        if not line.endswith(b"\n"):
            await self._gone(worker)  # the pipe may be closed a moment before
            raise WorkerLost(f"process {worker.pid} has ended, with return code {worker.returncode}")
        answer = json.loads(line)
        if "error" in answer:
            raise CallFailed(answer["error"])
        return answer["value"]

    def _kill(self, worker: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)

    async def _gone(self, worker: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(TimeoutError):  # a child that left the group may hold the pipes open
            async with asyncio.timeout(GONE_S):
                await worker.communicate()


def import_path(function: Callable[..., Any]) -> str:
    """`module:name`, by which another process finds the function; raises ValueError for one it could not find."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    found: Any = sys.modules.get(module or "")
    for part in (name or "").split("."):
        found = getattr(found, part, None)
    if found is not function or module == "__main__":
        raise ValueError(f"function: expected one at the top of an importable module, found {function!r}")
    return f"{module}:{name}"


def _at_least_one(workers: int) -> int:
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, found {workers}")
    return workers
