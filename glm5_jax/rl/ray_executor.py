"""Calls on the hosts of a Ray cluster, behind the protocol of `executors`. Needs the extra `ray`.

`ray.init` is the caller's: with an address it joins a cluster, without one it starts one on this host. Functions,
arguments and results travel pickled, as Ray does it: whoever can reach the cluster can run code on it.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import ray

from glm5_jax.rl.executors import CallFailed, Workers, WorkerLost


class RayWorkers(Workers[Any]):
    """Up to `workers` calls at once, each in a process of the cluster that takes `cpus` of its processors.

    One that is lost, with its host or alone, is replaced wherever the cluster has room. Raises RuntimeError where
    `ray.init` was not called.
    """

    def __init__(self, workers: int, *, cpus: float = 1.0):
        super().__init__(workers)
        if not ray.is_initialized():
            raise RuntimeError("RayWorkers: expected a Ray cluster, found none; call ray.init() first")
        self._actor = ray.remote(num_cpus=cpus, max_restarts=0, max_task_retries=0)(_Actor)

    async def _start(self) -> Any:
        return self._actor.remote()

    async def _call(self, worker: Any, function: Callable[..., Any], args: tuple, timeout: float | None) -> Any:
        try:
            await worker.ready.remote()  # that a process is found and started is not the function's time
            async with asyncio.timeout(timeout):
                return await worker.call.remote(function, *args)
        except ray.exceptions.RayTaskError as error:
            raise CallFailed(str(error)) from error
        except ray.exceptions.RayError as error:
            raise WorkerLost(f"{type(error).__name__}: {error}") from error

    def _kill(self, worker: Any) -> None:
        ray.kill(worker)


class _Actor:
    """What runs on the cluster."""

    def ready(self) -> None:
        """Returns once the process is there."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)
