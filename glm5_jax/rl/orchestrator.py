"""The orchestrator of many tasks: each is a service with its own rollout and its own reward, here or elsewhere.

It decides of which task a group is (see `rl.ratios`), plays rollouts many at a time, has the work of lost workers done
again, holds everything to time limits, and logs what has ended. Whatever goes wrong becomes a `Failure` of the one
rollout. It knows nothing that the ledger does not: after a restart it is told the numbers.
"""

import asyncio
import collections
import dataclasses
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import TypeVar

from glm5_jax.records import EndReason, Failure, FailureReason, Trajectory
from glm5_jax.rl.executors import WorkerLost
from glm5_jax.rl.ledger import Balance, Order
from glm5_jax.rl.loop import EndOfData, Problem
from glm5_jax.rl.ratios import Claim, RoundRobin

GRACE_S = 5.0  # for what was cancelled to clean up
_logger = logging.getLogger(__name__)
T = TypeVar("T")

Play = Callable[[Order, str, Trajectory | None, asyncio.Event], Awaitable[Trajectory]]
Reward = Callable[[Trajectory], Awaitable[float]]


@dataclasses.dataclass(frozen=True)
class Service:
    """One task. Raises ValueError for a field that makes no sense.

    `play(order, id, so_far, called_back)` plays one rollout of a group, or goes on from a partial trajectory, and ends
    soon with what it has when the event is set. An exception is a failure of that rollout; WorkerLost has it played
    again. What `reward` says of a complete trajectory is added to its last turn; a function that blocks runs in a
    process: `functools.partial(processes.run, function, timeout=60)`.
    """

    name: str
    ratio: float  # of the consumed groups, relative to those of the other tasks
    most: int  # groups that play at once
    size: int  # rollouts per group
    seeds: Callable[[int], int]  # the problem of the task's n-th group; raises EndOfData where there is none
    play: Play
    reward: Reward | None = None
    alive: Callable[[], bool] = lambda: True  # whether it can play: one that cannot gets no new groups
    wall_s: float = 3600.0  # for one rollout, waiting for its turn not counted
    reward_s: float = 600.0

    def __post_init__(self) -> None:
        for field, least in (("ratio", 0), ("most", 1), ("size", 1), ("wall_s", 0), ("reward_s", 0)):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= least and value > 0):
                raise ValueError(f"Service {self.name!r}: {field}: expected a finite number "
                                 f"{'of at least 1' if least else 'above 0'}, found {value!r}")


@dataclasses.dataclass(frozen=True)
class Count:
    """Numbers of a task's groups."""

    dispatched: int = 0
    consumed: int = 0
    in_flight: int = 0


class Orchestrator:
    """Implements `loop.Rollouts`. `limit` rollouts run at once; `retries` times a lost one is played again; `log` is
    told every trajectory that has ended."""

    def __init__(self, services: Iterable[Service] = (), *, limit: int = 1024, retries: int = 2,
                 log: Callable[[Trajectory], None] | None = None):
        self._limit, self._retries, self._log = limit, retries, log
        self._services: dict[str, Service] = {}
        self._counts: dict[str, Count] = {}
        self._running: collections.Counter[str] = collections.Counter()  # groups that still have rollouts to play
        self._at_end: set[str] = set()  # tasks without more problems
        self._played: set[str] = set()  # groups that wait to be consumed
        self._round = RoundRobin()
        self._slots = asyncio.Semaphore(limit)
        self._called_back: dict[str, asyncio.Event] = {}
        self._retried = 0
        for service in services:
            self.register(service)

    def register(self, service: Service) -> None:
        """Adds a task, or gives one of that name other settings: its ratio, say.

        Raises ValueError where not all tasks' rollouts could run at once: then one that is stuck would hold up the
        others.
        """
        services = self._services | {service.name: service}
        needed = sum(one.most * one.size for one in services.values())
        if needed > self._limit:
            raise ValueError(f"Service {service.name!r}: most: expected no more than {self._limit} rollouts in flight "
                             f"over all tasks, found {needed}; lower `most` of some, or raise `limit`")
        self._services = services
        self._at_end.discard(service.name)

    def deregister(self, task: str) -> None:
        """Takes a task out: what runs of it goes on, new groups are of others. Raises LookupError if unknown."""
        if task not in self._services:
            raise LookupError(f"task {task!r}: expected one of {sorted(self._services)}")
        del self._services[task]

    def restore(self, tasks: Mapping[str, Balance]) -> None:
        """Goes on from these numbers, the ledger's, instead of from none; `played` tells which of the groups in flight
        have nothing left to play."""
        self._counts = {task: Count(one.dispatched, one.consumed, one.in_flight) for task, one in tasks.items()}
        self._running = collections.Counter({task: one.in_flight for task, one in tasks.items()})
        self._played, self._at_end = set(), set()

    def counts(self) -> dict[str, Count]:
        """The numbers of every task that has any."""
        return dict(self._counts)

    def retried(self) -> int:
        """How often so far a rollout was played again because its worker was lost."""
        return self._retried

    def next(self, number: int) -> Problem | None:
        """What group `number` is of; None while no task has room. Counts it as dispatched.

        Raises EndOfData once the seeds of every task have.
        """
        while services := {name: one for name, one in self._services.items() if name not in self._at_end}:
            counts = {name: self._counts.get(name, Count()) for name in services}
            task = self._round.next(number, {
                name: Claim(service.ratio, counts[name].consumed + counts[name].in_flight,
                            self._running[name] < service.most and service.alive())
                for name, service in services.items()})
            if task is None:
                return None
            count = counts[task]
            try:
                problem = Problem(task, services[task].seeds(count.dispatched), services[task].size)
            except EndOfData:
                self._at_end.add(task)
                continue
            self._counts[task] = Count(count.dispatched + 1, count.consumed, count.in_flight + 1)
            self._running[task] += 1
            return problem
        raise EndOfData("no task has another problem")

    def played(self, group: str, task: str) -> None:
        """Makes room for another group: all rollouts of this one have ended, and it waits to be consumed."""
        self._running[task] -= 1
        self._played.add(group)

    def ended(self, group: str, task: str, consumed: bool) -> None:
        """Counts a group that is not in flight any more: consumed, or dropped."""
        count = self._counts.get(task, Count())
        self._counts[task] = Count(count.dispatched, count.consumed + consumed, max(0, count.in_flight - 1))
        if group in self._played:
            self._played.remove(group)
        else:
            self._running[task] -= 1

    async def play(self, order: Order, id: str, so_far: Trajectory | None) -> Trajectory:
        """Plays one rollout to its end, its reward included, or until it is called back. Never raises but for its own
        cancellation: what fails is a trajectory that says so, behind the turns of `so_far`."""
        called_back = self._called_back[id] = asyncio.Event()
        try:
            ended = await self._play(order, id, so_far, called_back)
        finally:
            del self._called_back[id]
        if self._log and ended.end is not EndReason.ABORTED:
            try:
                self._log(ended)
            except Exception as error:  # costs a line, and no rollout
                _logger.warning("rollout %s is not in the log: %r", id, error)
        return ended

    def call_back(self, ids: Collection[str]) -> None:
        """Has these rollouts end soon with what they have; one that only waits for its reward still gets it."""
        for id in ids:
            if id in self._called_back:
                self._called_back[id].set()

    async def _play(self, order: Order, id: str, so_far: Trajectory | None, called_back: asyncio.Event) -> Trajectory:
        begun = so_far or Trajectory(id, order.task, order.seed, (), EndReason.ABORTED)
        service = self._services.get(order.task)
        if service is None:
            return _failed(begun, Failure(FailureReason.WORKER, order.task, f"expected one of the tasks that are "
                                                                            f"registered, {sorted(self._services)}"))
        async with self._slots:
            for attempt in range(1 + self._retries):
                if called_back.is_set():
                    return begun
                self._retried += attempt > 0
                ended = await _attempt(service, order, begun, so_far, called_back)
                if ended.failure is None or ended.failure.reason is not FailureReason.WORKER:
                    break
        if service.reward is None or not ended.end.complete:
            return ended
        for _ in range(1 + self._retries):
            try:
                return _rewarded(ended, await _within(service.reward_s, service.reward(ended)))
            except Exception as error:
                reason = FailureReason.TIMEOUT if isinstance(error, TimeoutError) else FailureReason.REWARD
                failed = _failed(ended, Failure.of(reason, "reward", error))
                if not isinstance(error, WorkerLost):
                    break
        return failed


async def _attempt(service: Service, order: Order, begun: Trajectory, so_far: Trajectory | None,
                   called_back: asyncio.Event) -> Trajectory:
    """The rollout by its service, once."""
    try:
        ended = await _within(service.wall_s, service.play(order, begun.id, so_far, called_back))
        _require_goes_on(begun, ended)
        return ended
    except WorkerLost as error:
        return _failed(begun, Failure.of(FailureReason.WORKER, "rollout", error))
    except TimeoutError as error:
        return _failed(begun, Failure.of(FailureReason.TIMEOUT, "rollout", error))
    except Exception as error:
        return _failed(begun, Failure.of(FailureReason.ENVIRONMENT, "rollout", error))


async def _within(seconds: float, work: Awaitable[T]) -> T:
    """What `work` gives, or TimeoutError. Work that is late or not wanted any more is cancelled, and left alone where
    it does not heed that."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise TimeoutError(f"expected an end within {seconds:g} s")
        if task.cancelled():
            raise RuntimeError("expected an answer, found that it cancelled itself")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=GRACE_S)
            task.add_done_callback(lambda late: late.cancelled() or late.exception())  # nobody else asks for it


def _require_goes_on(begun: Trajectory, ended: Trajectory) -> None:
    """Raises TypeError or ValueError unless `ended` is the same rollout, with all the tokens that it had."""
    if not isinstance(ended, Trajectory):
        raise TypeError(f"expected a Trajectory, found {ended!r}")
    for field in ("id", "task", "seed"):
        if getattr(ended, field) != getattr(begun, field):
            raise ValueError(f"{field}: expected {getattr(begun, field)!r}, found {getattr(ended, field)!r}")
    had, has = begun.sampled, ended.sampled
    if has[:len(had)] != had and ended.failure is None:
        raise ValueError(f"turns: expected the {len(had)} sampled tokens it went on from, found {len(has)} that do not "
                         f"begin with them")


def _rewarded(ended: Trajectory, reward: float) -> Trajectory:
    if not ended.turns:
        raise ValueError("turns: expected one that the reward is for, found none")
    last = dataclasses.replace(ended.turns[-1], reward=ended.turns[-1].reward + reward)
    return dataclasses.replace(ended, turns=(*ended.turns[:-1], last))


def _failed(trajectory: Trajectory, failure: Failure) -> Trajectory:
    return dataclasses.replace(trajectory, end=EndReason.FAILED, failure=failure)
