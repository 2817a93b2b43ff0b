"""Schedulers of rollouts: when groups are dispatched, which of them make a batch, which are given up.

A scheduler is a frozen value that decides from a `View` alone: no clock, no queue, no engine. Whatever runs it asks
after every change, in this order: `expired` (to drop), `batch` (to train on at once), `admit` (how many new groups to
dispatch).

Versions are counted in training steps: a group of version v was begun with the weights after v steps, and consumed by
the step from version w to w + 1 it is w - v steps stale.
"""

import dataclasses
import math
import statistics
from typing import Literal, Protocol


Consumption = Literal["wait", "drop", "fifo"]
CONSUMPTIONS: tuple[Consumption, ...] = ("fifo", "wait", "drop")


@dataclasses.dataclass(frozen=True)
class Ticket:
    """A group that is in flight: its id, its place in the order of dispatch, and the version it was begun with."""

    id: str
    number: int
    version: int


@dataclasses.dataclass(frozen=True)
class View:
    """What a scheduler decides from."""

    version: int  # training steps taken and pushed
    training: bool  # whether a step, or the push after it, is under way
    dispatched: int  # groups ever dispatched and not dropped, partial ones once
    running: tuple[Ticket, ...]  # in order of dispatch
    done: tuple[Ticket, ...]  # in order of completion
    held: int = 0  # groups called back with partial rollouts; whatever runs the scheduler resumes them after the step
    idle: tuple[float, ...] = ()  # of each step so far, the share of its time that the trainer waited for its batch


class Scheduler(Protocol):
    """What the loop asks."""

    @property
    def groups(self) -> int:
        """How many groups make a batch."""

    @property
    def calls_back(self) -> bool:
        """Whether groups still running when a batch is taken are aborted, their partial rollouts kept."""

    @property
    def drains(self) -> bool:
        """Whether new weights wait for running groups to end, and no group is dispatched meanwhile."""

    @property
    def together(self) -> bool:
        """Whether engines and trainer share devices, so that one rests while the other works."""

    def expired(self, view: View) -> tuple[Ticket, ...]:
        """Groups to give up."""

    def batch(self, view: View) -> tuple[Ticket, ...]:
        """What to train on now; empty where there is not enough, or the trainer is not free."""

    def admit(self, view: View) -> int:
        """How many new groups to dispatch now; those called back come first, and do not count."""


@dataclasses.dataclass(frozen=True)
class Base:
    """What most schedulers share: a batch of `groups` groups, none given up."""

    groups: int
    calls_back = False
    drains = False
    together = False

    def __post_init__(self) -> None:
        _require(self.groups >= 1, "groups", "at least 1", self.groups)

    def expired(self, view: View) -> tuple[Ticket, ...]:
        return ()

    def batch(self, view: View) -> tuple[Ticket, ...]:
        """The first `groups` that are done, once the trainer is free."""
        return view.done[:self.groups] if not view.training and len(view.done) >= self.groups else ()


@dataclasses.dataclass(frozen=True)
class Sync(Base):
    """A batch is generated, then trained on, then the next: never stale."""

    together = True

    def admit(self, view: View) -> int:
        """A whole batch, or what stands in for groups that were dropped."""
        return 0 if view.training else max(0, (view.version + 1) * self.groups - view.dispatched)


@dataclasses.dataclass(frozen=True)
class OneStepOff(Base):
    """The next batch is generated while this one is trained on; both end before weights move: one step stale."""

    drains = True

    def admit(self, view: View) -> int:
        return max(0, (1 + view.version + view.training) * self.groups - view.dispatched)


@dataclasses.dataclass(frozen=True)
class April(Base):
    """Active partial rollouts (APRIL, arXiv 2509.18521): `over` times the groups start, the first to end are the batch.

    The rest is called back with its tokens and resumed first in the next round.
    """

    over: float = 2.0
    calls_back = True
    together = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.over >= 1, "over", "at least 1", self.over)

    def admit(self, view: View) -> int:
        under_way = len(view.running) + len(view.done) + view.held
        return 0 if view.training else max(0, math.ceil(self.over * self.groups) - under_way)


@dataclasses.dataclass(frozen=True)
class Async(Base):
    """Generation never stops; `bound` steps of staleness are allowed for.

    Groups are admitted until (bound + version + 1) * groups have been dispatched (AReaL, arXiv 2505.24298). That bounds
    the mean staleness alone; the rest is up to `order`:

    - "wait": the oldest first, and the trainer waits for what could later not be consumed in time. No group is ever
      staler than the bound, and lengths stay as they were sampled
    - "drop": the first done, and groups beyond the bound are given up: long ones more often than short ones
    - "fifo": the first done, however old they are
    """

    bound: int = 1
    order: Consumption = "wait"
    drains: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.bound >= 0, "bound", "0 or more", self.bound)
        _require(self.order in CONSUMPTIONS, "order", f"one of {', '.join(CONSUMPTIONS)}", self.order)

    def expired(self, view: View) -> tuple[Ticket, ...]:
        if self.order != "drop":
            return ()
        return tuple(one for one in view.running + view.done if view.version - one.version > self.bound)

    def batch(self, view: View) -> tuple[Ticket, ...]:
        if self.order != "wait" or view.training:
            return super().batch(view)
        oldest = tuple(sorted(view.done, key=lambda one: one.number))[:self.groups]
        left = [one for one in view.running + view.done if one not in oldest]
        # What is left has to fit into the steps that it may still wait for, `groups` into each.
        fits = all(sum(one.version + self.bound <= view.version + steps for one in left) <= steps * self.groups
                   for steps in range(self.bound + 1))
        # Where nothing runs, waiting changes nothing: groups of a time when the bound was higher, say.
        return oldest if len(oldest) == self.groups and (fits or not view.running) else ()

    def admit(self, view: View) -> int:
        return max(0, (self.bound + view.version + 1) * self.groups - view.dispatched)


@dataclasses.dataclass(frozen=True)
class Adaptive(Base):
    """Generation never stops, and is as stale as throughput asks for: the trainer's idle share moves the bound.

    The bound that groups are admitted by begins at `low`. Measured over the second half of every `every` steps, it goes
    up by one where the trainer waits for more than `idle` of its time, unless that is known to save less than `gain`;
    it goes down where one less costs less than `gain`. What is known of the neighbours is forgotten after `memory`
    times without a move, so that they are tried again.

    Staleness is about the moving bound in the mean, and never above `high`: within it groups are consumed as by `Async`
    with the order "wait".
    """

    low: int = 1
    high: int = 8
    idle: float = 0.05
    gain: float = 0.03
    every: int = 6
    memory: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.low >= 0, "low", "0 or more", self.low)
        _require(self.high >= self.low, "high", f"at least low, {self.low}", self.high)
        for name in ("idle", "gain"):
            _require(0 <= getattr(self, name) < 1, name, "0 or more and below 1", getattr(self, name))
        _require(self.every >= 1, "every", "at least 1", self.every)
        _require(self.memory >= 1, "memory", "at least 1", self.memory)

    def bound(self, view: View) -> int:
        """The bound of the moment."""
        bound, still = self.low, 0
        known: dict[int, float] = {}  # bound -> idle share
        for end in range(self.every, len(view.idle) + 1, self.every):
            share = known[bound] = statistics.fmean(view.idle[end - (self.every + 1) // 2:end])
            below, above = known.get(bound - 1), known.get(bound + 1)
            higher = bound < self.high and share > self.idle and (above is None or share - above >= self.gain)
            lower = bound > self.low and (below is None or below <= self.idle or below - share < self.gain)
            if lower and not (higher and above is not None):
                bound, still = bound - 1, 0
            elif higher:
                bound, still = bound + 1, 0
            elif (still := still + 1) >= self.memory:
                known, still = {}, 0
        return bound

    def batch(self, view: View) -> tuple[Ticket, ...]:
        return Async(self.groups, self.high).batch(view)

    def admit(self, view: View) -> int:
        return Async(self.groups, self.bound(view)).admit(view)


def _require(holds: bool, field: str, expected: str, found: object) -> None:
    if not holds:
        raise ValueError(f"{field}: expected {expected}, found {found!r}")
