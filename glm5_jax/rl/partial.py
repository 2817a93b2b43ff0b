"""Groups in flight, rollout by rollout: what has ended, what is partial, what is missing, and what is played next.

Partial rollouts are played on before new ones are begun, so that no token is drawn for nothing and none gets older than
it has to (APRIL, arXiv 2509.18521): `schedule.April` starts more groups than a batch and calls back what is left of
them; what was called back waits here, with its tokens.
"""

import dataclasses
import heapq
from collections.abc import Iterable, Iterator

from glm5_jax.records import EndReason, Trajectory
from glm5_jax.rl.ledger import Order
from glm5_jax.rl.report import Played
from glm5_jax.rl.schedule import Ticket


@dataclasses.dataclass
class Flight:
    """A group in flight: the newest state of each of its rollouts, as the ledger has them, and how it was played."""

    order: Order
    ticket: Ticket
    recorded: dict[str, Trajectory]
    played: dict[str, Played] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, order: Order, ticket: Ticket, trajectories: Iterable[Trajectory] = ()) -> "Flight":
        """Raises ValueError for a rollout that is none of the group's."""
        flight = cls(order, ticket, {one.id: one for one in trajectories})
        if strange := flight.recorded.keys() - set(flight.ids):
            raise ValueError(f"group {order.id!r}: expected the rollouts {list(flight.ids)}, found {sorted(strange)}")
        return flight

    @property
    def ids(self) -> tuple[str, ...]:
        """Of its rollouts."""
        return tuple(f"{self.order.id}-{i}" for i in range(self.order.size))

    @property
    def ended(self) -> tuple[Trajectory, ...]:
        """In the order of the ledger, by id."""
        return tuple(self.recorded[id] for id in sorted(self.recorded)
                     if self.recorded[id].end is not EndReason.ABORTED)

    @property
    def partial(self) -> tuple[str, ...]:
        return tuple(id for id in self.ids
                     if id in self.recorded and self.recorded[id].end is EndReason.ABORTED)

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(id for id in self.ids if id not in self.recorded)

    @property
    def over(self) -> bool:
        """Whether all of its rollouts have ended."""
        return len(self.ended) == self.order.size


class Queue:
    """Rollouts that wait to be played: partial ones first, of both kinds the oldest group's first; each once."""

    def __init__(self) -> None:
        self._heap: list[tuple[bool, int, int, str]] = []
        self._groups: dict[str, str] = {}  # rollout -> group

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def add(self, flight: Flight, *, but: Iterable[str] = ()) -> None:
        """What is left of a group, `but` for some of its rollouts."""
        partial = set(flight.partial)
        for index, id in enumerate(flight.ids):
            if (id in partial or id not in flight.recorded) and id not in self._groups and id not in but:
                self._groups[id] = flight.order.id
                heapq.heappush(self._heap, (id not in partial, flight.ticket.number, index, id))

    def remove(self, group: str) -> None:
        """The rollouts of a group that is not played for now."""
        self._heap = [entry for entry in self._heap if self._groups[entry[-1]] != group]
        heapq.heapify(self._heap)
        self._groups = {id: own for id, own in self._groups.items() if own != group}

    def next(self) -> tuple[str, str]:
        """Takes out what is to be played now: the group and the rollout. Raises IndexError where nothing waits."""
        id = heapq.heappop(self._heap)[-1]
        return self._groups.pop(id), id
