"""The asynchronous loop: rollouts, trainer and weights, run as a scheduler says, with every group in the ledger.

One coroutine decides; rollouts, and the training step with the push behind it, are tasks beside it that only tell it
when they have ended. What it does is in the ledger before it happens or is believed, so that a loop that is killed at
any moment goes on from the ledger and the trainer's newest checkpoint: groups in flight are played on, not dispatched
anew; what had ended is not played again; what a lost step had consumed is consumed again.

The ledger is written on the event loop itself: a write takes about a millisecond.
"""

import asyncio
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from glm5_jax.core.metrics import Metric, Writer, collect
from glm5_jax.records import Group, PolicyVersion
from glm5_jax.rl.flights import Flights, Players
from glm5_jax.rl.ledger import Balance, Ledger, Order
from glm5_jax.rl.partial import Flight
from glm5_jax.rl.report import engines, measure, Since, Times
from glm5_jax.serve.generator import Totals
from glm5_jax.rl.schedule import Scheduler, Ticket, View


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a group is of: the task, the seed of its environment, and how many rollouts."""

    task: str
    seed: int
    size: int


class EndOfData(Exception):
    """Raised by `Rollouts.next`: there are no more problems, unless somebody adds some."""


class Rollouts(Players, Protocol):
    """What plays, and knows what."""

    def restore(self, tasks: Mapping[str, Balance]) -> None:
        """The books of each task, when the loop begins; groups in flight are played on without `next`, and those that
        have no rollouts left to play are told by `played`."""

    def next(self, number: int) -> Problem | None:
        """What the group with this number, from 0, is of; it is dispatched at once, or the number asked for again.
        None where there is none for now. Raises EndOfData; as long as anything is under way, it is asked again."""


class Trainer(Protocol):
    """What learns."""

    @property
    def step(self) -> int:
        """Steps of this run that are done; in a new process those that its newest checkpoint holds."""

    async def train(self, step: int, batch: Sequence[Group]) -> Mapping[str, Metric]:
        """Training step number `step`, from 1. A crash takes back the steps after the newest checkpoint."""

    async def push(self, number: int) -> PolicyVersion:
        """Hands the weights of the moment to the engines as policy `number`; all of them serve it when it returns."""


class Stuck(RuntimeError):
    """Nothing that the loop waits for can ever come."""


class Loop:
    """Runs training steps; see `run`. One at a time.

    At most `at_once` rollouts are played at the same time; others wait. Where `patience` groups in a row came to
    nothing because of failures, or for `wait_s` seconds nothing is under way and there is no problem to play, the loop
    gives up. Metrics of each step go to `writer`; `totals` says what the engines have done so far (`Driver.totals`),
    `retried` how often a rollout was played again because its worker was lost (`Orchestrator.retried`).
    """

    def __init__(self, ledger: Ledger, scheduler: Scheduler, rollouts: Rollouts, trainer: Trainer, *,
                 writer: Writer | None = None, totals: Callable[[], Totals] = Totals,
                 retried: Callable[[], float] = lambda: math.nan, at_once: int = 1024, patience: int = 32,
                 wait_s: float = 60.0):
        for name, value, least in (("at_once", at_once, 1), ("patience", patience, 1), ("wait_s", wait_s, 0)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, found {value}")
        self.ledger, self.scheduler, self.rollouts, self.trainer = ledger, scheduler, rollouts, trainer
        self.writer, self.totals, self.retried = writer, totals, retried
        self.at_once, self.patience, self.wait_s = at_once, patience, wait_s

    async def run(self, steps: int) -> None:
        """Goes on until `steps` training steps are done in all, those before a restart included.

        In the end, and also when it is cancelled or something fails, rollouts that are being played are called back
        and their tokens kept. Raises Stuck where nothing can ever come: no more data, or all environments fail;
        ValueError for a ledger of another run; and what the trainer raises.
        """
        if self.trainer.step < steps:
            await _Run(self).until(steps)


class _Update(NamedTuple):
    """What came of a training step: the trainer's metrics, and the seconds that its weights took to the engines."""

    metrics: Mapping[str, Metric]
    pushed: float


class _Run:
    """What the loop knows between its start and its end."""

    def __init__(self, loop: Loop):
        self.loop, self.ledger, self.scheduler = loop, loop.ledger, loop.scheduler
        self.rollouts, self.trainer = loop.rollouts, loop.trainer
        self.now, self.changed = asyncio.get_running_loop().time, asyncio.Event()
        self.version = self.trainer.step  # steps trained and pushed
        self.update: asyncio.Task[_Update] | None = None  # a training step and the push after it
        self.report: Callable[..., dict[str, Metric]] = dict  # of the step under way
        self.totals, self.retried = loop.totals(), loop.retried()
        self.step_of: dict[int, int] = {}  # policy number -> step
        self.flights = Flights(loop.ledger, loop.rollouts, loop.at_once, self.step_of, self.changed)
        self.policy = self.dispatched = 0  # the newest policy, groups ever
        self.draining = self.at_end = self.in_vain = False  # in_vain: there was no problem when one was asked for
        self.nothing_since: float | None = None  # for want of problems
        self.idle: tuple[float, ...] = ()
        self.free = self.begun = self.now()  # when the trainer last became free, and last began

    async def until(self, steps: int) -> None:
        try:
            self._take_up()
            await self._push(self.version)
            self.free = self.now()
            while self.version < steps:
                self._decide()
                self._require_hope(steps)
                await self.changed.wait()
                self.changed.clear()
                self.flights.collect()
                self._end_step()
        finally:
            if self.update is not None:
                self.update.cancel()
                await asyncio.gather(self.update, return_exceptions=True)
            await self.flights.stop()

    def _take_up(self) -> None:
        """Everything from the ledger, as of the trainer's checkpoint."""
        policies = self.ledger.policies()
        if policies and self.version not in {one.step for one in policies} and not self.ledger.batch(self.version):
            raise ValueError(f"{self.ledger.path}: expected the ledger of this run, whose trainer is at step "
                             f"{self.version}; found one that knows of no such step")
        self.ledger.rewind(self.version)
        self.step_of |= {one.number: one.step for one in policies}
        self.dispatched = self.ledger.balance().dispatched
        self.rollouts.restore(self.ledger.tasks())
        for number, order in enumerate(self.ledger.in_flight()):
            ticket = Ticket(order.id, number, self.step_of[order.version])
            # A group of weights that were lost waits for their version: older ones would make it too stale.
            self.flights.enter(Flight.of(order, ticket, self.ledger.trajectories(order.id)),
                               hold=ticket.version > self.version)

    def _view(self) -> View:
        # As if all steps had taken batches of today's size: those before a restart may have been others.
        consumed = (self.version + (self.update is not None)) * self.scheduler.groups
        return View(self.version, self.update is not None, consumed + len(self.flights), self.flights.running,
                    self.flights.done, self.flights.held, self.idle)

    def _decide(self) -> None:
        for ticket in self.scheduler.expired(self._view()):
            self.flights.give_up(ticket, "stale", f"of version {ticket.version}, at version {self.version}")
        if batch := self.scheduler.batch(self._view()):
            self._take(batch)
        if not self.draining:
            if self.update is None or not self.scheduler.calls_back:
                self.flights.resume(self.version)
            admitted = self.scheduler.admit(self._view())
            while admitted > 0 and self._dispatch():
                admitted -= 1
            self.in_vain = admitted > 0
        self.flights.start()

    def _take(self, batch: Sequence[Ticket]) -> None:
        """Begins a training step."""
        groups = self.flights.take(self.version + 1, batch)
        since, self.flights.since = self.flights.since, Since()
        before, self.retried = self.retried, self.loop.retried()
        since.retried = self.retried - before
        self.report = functools.partial(measure, groups, self.version, self.step_of, since,
                                        in_flight=len(self.flights), queued=self.flights.queued)
        self.begun = self.now()
        if self.scheduler.calls_back:
            self.flights.hold()
        self.update = asyncio.create_task(self._train(self.version + 1, groups))
        self.update.add_done_callback(lambda _: self.changed.set())

    async def _train(self, step: int, batch: Sequence[Group]) -> _Update:
        if self.scheduler.together:  # engines and trainer share devices
            await self.flights.stillness()
        metrics = await self.trainer.train(step, batch)
        if self.scheduler.drains:
            self.draining = True
            await self.flights.stillness()
        began = self.now()
        await self._push(step)
        self.draining = False
        return _Update(metrics, self.now() - began)

    def _end_step(self) -> None:
        if self.update is None or not self.update.done():
            return
        update, self.update = self.update.result(), None
        times = Times(self.begun - self.free, update.pushed, self.now() - self.free)
        self.version, self.free = self.version + 1, self.now()
        self.idle = (*self.idle, times.idle)
        if self.loop.writer is not None:
            before, self.totals = self.totals, self.loop.totals()
            self.loop.writer.write(self.version, collect({**update.metrics, **self.report(times=times),
                                                          **engines(before, self.totals)}))

    async def _push(self, step: int) -> None:
        """The ledger knows the number before an engine could serve it: it is never used for other weights. What their
        checksum is comes out later, and stands beside them (see `rl.weights`)."""
        number = max(self.step_of, default=0) + 1  # 0 is what engines begin with
        self.ledger.push(PolicyVersion(number, step))
        self.step_of[number] = step
        pushed = await self.trainer.push(number)
        if pushed.number != number:
            raise RuntimeError(f"trainer.push: expected policy {number}, found {pushed.number}")
        self.policy = number

    def _dispatch(self) -> bool:
        """Begins a group, if there is a problem for it."""
        try:
            problem, self.at_end = self.rollouts.next(self.dispatched), False
        except EndOfData:
            problem, self.at_end = None, True
        if problem is None:
            return False
        order = Order(f"{problem.task}-{self.dispatched}", problem.task, problem.seed, problem.size, self.policy)
        self.ledger.dispatch(order)
        self.flights.enter(Flight.of(order, Ticket(order.id, self.dispatched, self.step_of[self.policy])))
        self.dispatched += 1
        return True

    def _require_hope(self, steps: int) -> None:
        """Raises Stuck where nothing can ever come."""
        where, refused = f"after {self.version} of {steps} steps", self.flights.refused
        if len(refused) >= self.loop.patience:
            raise Stuck(f"{where}: {len(refused)} groups in a row came to nothing, the last one with {refused[-1]}")
        if self.flights.playing or self.update is not None:
            self.nothing_since = None
            return
        why = "there are no more problems" if self.at_end else f"{self.scheduler} admits no group"
        if self.in_vain and not self.at_end:
            self.nothing_since = self.now() if self.nothing_since is None else self.nothing_since
            waited = self.now() - self.nothing_since
            if waited < self.loop.wait_s:
                asyncio.get_running_loop().call_later(min(1.0, self.loop.wait_s - waited), self.changed.set)
                return
            why = f"there has been no problem for {waited:g} seconds"
        raise Stuck(f"{where}: {why}, and nothing is under way; a batch takes {self.scheduler.groups} groups, "
                    f"{len(self.flights.done)} are done")
