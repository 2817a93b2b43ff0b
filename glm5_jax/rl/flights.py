"""All groups in flight, and the rollouts of them that are being played: what comes of each goes into the ledger.

A group runs, is held (called back, or not to be played yet), or is done, which is when all of its rollouts have ended;
then it is consumed or dropped, and gone from here. `partial` says what of a group is left to play.
"""

import asyncio
import collections
from collections.abc import Collection, Iterable
from typing import Protocol

from glm5_jax.records import EndReason, Failure, FailureReason, Group, Trajectory
from glm5_jax.rl.assemble import Refused, settle
from glm5_jax.rl.ledger import Ledger, LedgerError, Order
from glm5_jax.rl.partial import Flight, Queue
from glm5_jax.rl.report import Played, Since, tokens
from glm5_jax.rl.schedule import Ticket


class Players(Protocol):
    """What plays rollouts."""

    async def play(self, order: Order, id: str, so_far: Trajectory | None) -> Trajectory:
        """One rollout, or a partial one played on. A failure is a trajectory that says so."""

    def call_back(self, ids: Collection[str]) -> None:
        """These rollouts end soon, as partial ones (end ABORTED), unless they end by themselves."""

    def played(self, group: str, task: str) -> None:
        """All rollouts of a group have ended; it waits to be consumed."""

    def ended(self, group: str, task: str, consumed: bool) -> None:
        """A group was consumed, or dropped, then perhaps with rollouts that are still being played."""


class Flights:
    """Plays up to `at_once` rollouts at the same time; `changed` is set when one has ended. For one event loop.

    `policies` are the numbers of those that were pushed.
    """

    def __init__(self, ledger: Ledger, players: Players, at_once: int, policies: Collection[int],
                 changed: asyncio.Event):
        self._ledger, self._players, self._at_once = ledger, players, at_once
        self._policies, self._changed = policies, changed
        self._running: dict[str, Flight] = {}
        self._held: dict[str, Flight] = {}
        self._done: dict[str, tuple[Flight, Group]] = {}  # in order of completion
        self._queue = Queue()
        self._playing: dict[str, asyncio.Task[Trajectory]] = {}
        self._recalled: set[str] = set()  # of those that are played
        self._arrived = collections.deque[tuple[str, str, float]]()  # (group, rollout, seconds): those that have ended
        self._now = asyncio.get_running_loop().time
        self._still = asyncio.Event()
        self.since = Since()
        self.refused: list[str] = []  # groups in a row that came to nothing, and why

    def __len__(self) -> int:
        return len(self._running) + len(self._held) + len(self._done)

    @property
    def running(self) -> tuple[Ticket, ...]:
        """In order of dispatch."""
        return tuple(sorted((one.ticket for one in self._running.values()), key=lambda one: one.number))

    @property
    def done(self) -> tuple[Ticket, ...]:
        """In order of completion."""
        return tuple(flight.ticket for flight, _ in self._done.values())

    @property
    def held(self) -> int:
        return len(self._held)

    @property
    def playing(self) -> int:
        """Rollouts."""
        return len(self._playing)

    @property
    def queued(self) -> int:
        """Rollouts."""
        return len(self._queue)

    def enter(self, flight: Flight, *, hold: bool = False) -> None:
        """A group, new or from before a restart; it is played once `start` finds it a place."""
        if flight.over:
            self._settle(flight)
        elif hold:
            self._held[flight.order.id] = flight
        else:
            self._running[flight.order.id] = flight
            self._queue.add(flight, but=self._playing)

    def resume(self, version: int) -> None:
        """Has the held groups played on, but for those of later versions."""
        for flight in list(self._held.values()):
            if flight.ticket.version <= version:
                self.enter(self._held.pop(flight.order.id))

    def start(self) -> None:
        """Begins to play what waits, as far as there is room."""
        while self._queue and len(self._playing) < self._at_once:
            self._start(*self._queue.next())
        if not self._running and not self._playing:
            self._still.set()

    def collect(self) -> None:
        """Enters the rollouts that have ended meanwhile."""
        while self._arrived:
            self._arrive(*self._arrived.popleft())

    def take(self, step: int, batch: Iterable[Ticket]) -> list[Group]:
        """Consumes groups that are done, in order of dispatch however they ended."""
        groups = [self._done[one.id][1] for one in sorted(batch, key=lambda one: one.number)]
        self._ledger.consume(step, groups)
        for group in groups:
            flight, _ = self._done.pop(group.id)
            self.since.played |= flight.played
            self._players.ended(group.id, flight.order.task, True)
        return groups

    def give_up(self, ticket: Ticket, reason: str, detail: str) -> None:
        """Drops a group that runs or is done."""
        flight = self._running.pop(ticket.id, None) or self._done.pop(ticket.id)[0]
        self._call_back([flight])
        # Those that are being played count when they have ended.
        self.since.discarded += sum(tokens(one) for id, one in flight.recorded.items() if id not in self._playing)
        self._drop(flight, reason, detail)

    def hold(self) -> None:
        """Calls back all that run; they keep what they have."""
        self._call_back(self._running.values())
        self._held |= self._running
        self._running = {}

    async def stillness(self) -> None:
        """Until nothing runs."""
        while self._running or self._playing:
            self._still.clear()
            await self._still.wait()

    async def stop(self) -> None:
        """Calls back all that is played, and keeps it as far as it has come."""
        try:
            self.hold()
            self.collect()  # nobody tells again of those that ended before
            while self._playing:
                await self._changed.wait()
                self._changed.clear()
                self.collect()
        finally:
            for task in self._playing.values():
                task.cancel()
            await asyncio.gather(*self._playing.values(), return_exceptions=True)

    def _start(self, group: str, id: str) -> None:
        flight = self._running[group]
        so_far = flight.recorded.get(id)
        self.since.resumed += so_far is not None
        began = self._now()
        self._playing[id] = task = asyncio.create_task(self._play(flight.order, id, so_far))

        def ended(_: object) -> None:
            self._arrived.append((group, id, self._now() - began))
            self._changed.set()

        task.add_done_callback(ended)

    async def _play(self, order: Order, id: str, so_far: Trajectory | None) -> Trajectory:
        if id in self._recalled:  # before it began
            return so_far or Trajectory(id, order.task, order.seed, (), EndReason.ABORTED)
        try:
            found = await self._players.play(order, id, so_far)
            if (found.id, found.task, found.seed) != (id, order.task, order.seed):
                raise ValueError(f"expected rollout {id!r} of {order.task!r} and seed {order.seed}, found {found.id!r} "
                                 f"of {found.task!r} and {found.seed}")
            sampled_by = {version for turn in found.turns if turn.completion for version in turn.completion.versions}
            if strange := sampled_by - set(self._policies):
                raise ValueError(f"expected tokens of policies that were pushed, found some of {sorted(strange)}")
            return found
        except Exception as error:  # its own work is lost, and nobody else's
            return _failed(order, id, so_far, error)

    def _arrive(self, group: str, id: str, seconds: float) -> None:
        task, recalled = self._playing.pop(id), id in self._recalled
        self._recalled.discard(id)
        flight = self._running.get(group) or self._held.get(group)
        if flight is None:  # given up meanwhile
            self.since.discarded += 0 if task.cancelled() else tokens(task.result())
            return
        so_far = flight.recorded.get(id)
        found = (_failed(flight.order, id, so_far, asyncio.CancelledError("by whoever plays"))
                 if task.cancelled() else task.result())
        before = flight.played.get(id, Played())
        gained = tokens(found) - (tokens(so_far) if so_far else 0)
        flight.played[id] = Played(before.tokens + gained, before.seconds + seconds)
        if found.end is not EndReason.ABORTED or found.turns != (so_far.turns if so_far else ()):
            self._record(flight, found, so_far)
        elif not recalled:
            lost = RuntimeError("given back uncalled, with nothing new")
            self._record(flight, _failed(flight.order, id, so_far, lost), so_far)
        elif group in self._running:  # and resumed meanwhile
            self._queue.add(flight, but=self._playing)

    def _record(self, flight: Flight, found: Trajectory, so_far: Trajectory | None) -> None:
        group = flight.order.id
        try:
            self._ledger.record(group, found)
        except LedgerError as error:
            found = _failed(flight.order, found.id, so_far, error)
            self._ledger.record(group, found)
        flight.recorded[found.id] = found
        if found.end is not EndReason.ABORTED:
            self.since.sampled.append(tokens(found))
        if found.failure:
            self.since.failed[found.failure.reason] += 1
        if flight.over:
            self._running.pop(group, None) or self._held.pop(group)
            self._settle(flight)
        elif group in self._running:
            self._queue.add(flight, but=self._playing)

    def _settle(self, flight: Flight) -> None:
        """What becomes of a group whose rollouts have all ended."""
        settled = settle(flight.order.id, flight.order.size, flight.ended)
        if isinstance(settled, Refused):
            self.refused.append(settled.detail)
            self._drop(flight, settled.reason, settled.detail)
        else:
            self.refused.clear()
            self._done[flight.order.id] = flight, settled
            self._players.played(flight.order.id, flight.order.task)

    def _drop(self, flight: Flight, reason: str, detail: str) -> None:
        self._ledger.drop(flight.order.id, reason, detail)
        self.since.dropped[reason] += 1
        self._players.ended(flight.order.id, flight.order.task, False)

    def _call_back(self, flights: Iterable[Flight]) -> None:
        """What is played ends soon, and what waits is not begun."""
        ids = []
        for flight in flights:
            self._queue.remove(flight.order.id)
            ids += [id for id in flight.ids if id in self._playing]
        self._recalled |= set(ids)
        if ids:
            self._players.call_back(ids)


def _failed(order: Order, id: str, so_far: Trajectory | None, error: BaseException) -> Trajectory:
    return Trajectory(id, order.task, order.seed, so_far.turns if so_far else (), EndReason.FAILED,
                      Failure.of(FailureReason.WORKER, "play", error))
