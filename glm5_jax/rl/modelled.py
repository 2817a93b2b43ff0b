"""A run with modelled engines and trainer: the same scheduler, on a clock that jumps from event to event.

An engine continues all of its b sequences by one token every t0 + kappa b seconds, holds up to `slots` of them, queues
the rest, and gives a sequence up only for the time of a tool call. Lengths are log-normal, half of the variance the
prompt's. A training step takes time by its tokens; weights take `sync` seconds to reach the engines, which rest
meanwhile. Not modelled: rewards, prefill beside decoding, what staleness does to learning.
"""

import collections
import dataclasses
import functools
import heapq
import itertools
import math
import random
import statistics
from collections.abc import Callable
from typing import Any

from glm5_jax.rl.schedule import Scheduler, Ticket, View


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is generated: groups of `rollouts` responses; tokens, turns, and seconds of the tools between turns."""

    name: str
    groups: int
    median: float
    sigma: float
    turns: float = 1.0  # mean of a geometric law
    tool_median: float = 4.0
    tool_sigma: float = 1.2
    rollouts: int = 8
    cap: int = 28_000
    most_turns: int = 60
    longest_tool: float = 300.0

    def lengths(self, rng: random.Random) -> list[int]:
        """Tokens of each rollout of one prompt."""
        half = self.sigma / math.sqrt(2)
        prompt = rng.gauss(math.log(self.median), half)
        return [max(1, min(self.cap, round(math.exp(prompt + rng.gauss(0, half))))) for _ in range(self.rollouts)]

    def split(self, length: int, rng: random.Random) -> list[int]:
        """The tokens of each turn."""
        turns = 1
        while turns < min(self.most_turns, length) and rng.random() > 1 / self.turns:
            turns += 1
        cuts = sorted(rng.sample(range(1, length), turns - 1)) if turns > 1 else []
        return [stop - start for start, stop in zip([0, *cuts], [*cuts, length])]

    def tool(self, rng: random.Random) -> float:
        """Seconds of one tool call."""
        return min(self.longest_tool, math.exp(rng.gauss(math.log(self.tool_median), self.tool_sigma)))


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices, the speed of engines and trainer, and what moving weights costs; seconds."""

    devices: int = 16
    slots: int = 128
    t0: float = 0.010
    kappa: float = 0.0001
    train_token: float = 0.00096  # of one device
    train_step: float = 5.0
    sync: float = 5.0
    switch: float = 5.0  # of devices from one role to the other


@dataclasses.dataclass
class _Sequence:
    """One response on its way: the tokens left of its turns, and what it has."""

    group: "_Group"
    turns: collections.deque[int]
    length: int
    engine: int = -1  # once it has one it stays there
    in_tool: bool = False
    finish: float = 0.0  # of its turn, in the engine's own count of rounds

    @property
    def generated(self) -> int:
        return self.length - sum(self.turns)


@dataclasses.dataclass
class _Group:
    ticket: Ticket
    sequences: list[_Sequence]
    left: int


class _Engine:
    """Sequences that advance together. Progress is counted in rounds, so that one number moves all of them."""

    def __init__(self, machine: Machine):
        self.machine, self.rounds, self.since, self.resting = machine, 0.0, 0.0, False
        self.active: list[tuple[float, int, _Sequence]] = []
        self.queue: collections.deque[_Sequence] = collections.deque()
        self.load = self.stamp = 0  # sequences that belong here; changes, so that old plans are known to be old
        self.busy = 0.0
        self._order = itertools.count()

    def seconds(self) -> float:
        """Of one round."""
        return self.machine.t0 + self.machine.kappa * len(self.active)

    def advance(self, now: float) -> None:
        if self.active and not self.resting:
            self.rounds += (now - self.since) / self.seconds()
            self.busy += now - self.since
        self.since = now

    def add(self, sequence: _Sequence) -> None:
        self.queue.append(sequence)
        self.fill()

    def fill(self) -> None:
        while self.queue and len(self.active) < self.machine.slots:
            sequence = self.queue.popleft()
            sequence.finish = self.rounds + sequence.turns[0]
            heapq.heappush(self.active, (sequence.finish, next(self._order), sequence))

    def call_back(self, gone: Callable[[_Sequence], bool]) -> None:
        """Takes sequences out; what is left of their turn stays with them."""
        for _, _, sequence in self.active:
            if gone(sequence):
                sequence.turns[0] = max(1, math.ceil(sequence.finish - self.rounds))
        self.active = [entry for entry in self.active if not gone(entry[2])]
        heapq.heapify(self.active)
        self.queue = collections.deque(one for one in self.queue if not gone(one))
        self.fill()


@dataclasses.dataclass
class Report:
    """What a simulated run did between its warm-up and its end."""

    tokens_per_second: float
    staleness_mean: float
    staleness_max: int
    wasted: float  # share of generated tokens that was given up
    again: float  # share of tokens fed anew after they were called back
    length_mean: float
    length_p99: float
    engine_busy: float
    trainer_busy: float


class Simulation:
    """One run. Everything that happens is an event of one queue, and every choice one of one seeded generator."""

    def __init__(self, workload: Workload, machine: Machine, scheduler: Scheduler, share: float, seed: int):
        self.workload, self.machine, self.scheduler = workload, machine, scheduler
        own = min(max(round(share * machine.devices), 1), machine.devices - 1)
        self.generators = machine.devices if scheduler.together else own
        self.trainers = machine.devices if scheduler.together else machine.devices - self.generators
        self.rng = random.Random(seed)
        self.now, self.version, self.training, self.dispatched = 0.0, 0, False, 0
        self.engines = [_Engine(machine) for _ in range(self.generators)]
        self.running: dict[str, _Group] = {}
        self.done: list[_Group] = []
        self.held: list[_Group] = []
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.steps: list[dict[str, Any]] = []
        self.again = self.wasted = self.trainer_busy = 0.0
        self.draining = self.changed = False
        self.free = self.begun = 0.0  # when the trainer last became free, and last began
        self.idle: list[float] = []
        self._order, self._numbers = itertools.count(), itertools.count()

    def run(self, steps: int, warm_up: int) -> Report:
        """Runs `steps` training steps and reports those after the first `warm_up`."""
        marks: dict[str, float] = {}
        self._decide()
        while len(self.steps) < steps:
            if not self.events:
                raise RuntimeError(f"{self.scheduler}: nothing happens any more after {len(self.steps)} steps")
            self.now, _, event = heapq.heappop(self.events)
            event()
            if self.changed:
                self._decide()
            if len(self.steps) == warm_up and not marks:
                marks = self._sums()
        past = {name: value - marks[name] for name, value in self._sums().items()}
        rows = self.steps[warm_up:]
        tokens = sum(sum(row["lengths"]) for row in rows)
        stale, lengths = ([x for row in rows for x in row[name]] for name in ("stale", "lengths"))
        return Report(
            tokens / past["now"], statistics.mean(stale), max(stale), past["wasted"] / (tokens + past["wasted"]),
            past["again"] / tokens, statistics.mean(lengths), sorted(lengths)[int(0.99 * len(lengths))],
            past["busy"] / past["now"] / self.generators, past["trainer"] / past["now"])

    def _sums(self) -> dict[str, float]:
        for engine in self.engines:
            engine.advance(self.now)
        return {"now": self.now, "wasted": self.wasted, "again": self.again, "trainer": self.trainer_busy,
                "busy": sum(engine.busy for engine in self.engines)}

    def _at(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (time, next(self._order), event))

    def _view(self) -> View:
        return View(self.version, self.training, self.dispatched,
                    tuple(group.ticket for group in self.running.values()),
                    tuple(group.ticket for group in self.done), len(self.held), tuple(self.idle))

    def _decide(self) -> None:
        self.changed = False
        for ticket in self.scheduler.expired(self._view()):
            self._drop(ticket)
        if batch := self.scheduler.batch(self._view()):
            chosen = {ticket.id for ticket in batch}
            taken = [group for group in self.done if group.ticket.id in chosen]
            self.done = [group for group in self.done if group.ticket.id not in chosen]
            self._train(taken)
        if not self.draining:
            self._dispatch(self.scheduler.admit(self._view()))

    def _dispatch(self, count: int) -> None:
        resumed, self.held = (self.held, []) if not self.training else ([], self.held)
        for group in resumed + [self._new_group() for _ in range(count)]:
            self.running[group.ticket.id] = group
            for sequence in group.sequences:
                if sequence.turns and not sequence.in_tool:
                    self._place(sequence)

    def _new_group(self) -> _Group:
        number = next(self._numbers)
        self.dispatched += 1
        group = _Group(Ticket(f"g{number}", number, self.version), [], self.workload.rollouts)
        for length in self.workload.lengths(self.rng):
            turns = collections.deque(self.workload.split(length, self.rng))
            group.sequences.append(_Sequence(group, turns, length))
        return group

    def _place(self, sequence: _Sequence) -> None:
        if sequence.engine < 0:
            sequence.engine = min(range(len(self.engines)), key=lambda i: self.engines[i].load)
            self.engines[sequence.engine].load += 1
        self._change(self.engines[sequence.engine], lambda engine: engine.add(sequence))

    def _change(self, engine: _Engine, change: Callable[[_Engine], None]) -> None:
        """Changes an engine, and plans anew when its next turn ends."""
        engine.advance(self.now)
        change(engine)
        engine.stamp += 1
        if engine.active and not engine.resting:
            stamp = engine.stamp
            end = self.now + max(0.0, engine.active[0][0] - engine.rounds) * engine.seconds()
            self._at(end, functools.partial(self._turn_ends, engine, stamp))

    def _turn_ends(self, engine: _Engine, stamp: int) -> None:
        if engine.stamp != stamp:  # planned before the engine changed
            return
        ended: list[_Sequence] = []

        def pop(engine: _Engine) -> None:
            while engine.active and engine.active[0][0] <= engine.rounds + 1e-6:
                ended.append(heapq.heappop(engine.active)[2])
            engine.fill()

        self._change(engine, pop)
        for sequence in ended:
            sequence.turns.popleft()
            if sequence.turns:
                sequence.in_tool = True
                self._at(self.now + self.workload.tool(self.rng), functools.partial(self._tool_ends, sequence))
            else:
                self._sequence_ends(sequence)

    def _tool_ends(self, sequence: _Sequence) -> None:
        sequence.in_tool = False
        if sequence.group.ticket.id in self.running:  # not called back or dropped meanwhile
            self._place(sequence)

    def _sequence_ends(self, sequence: _Sequence) -> None:
        group = sequence.group
        self.engines[sequence.engine].load -= 1
        group.left -= 1
        if not group.left and group.ticket.id in self.running:
            self.done.append(self.running.pop(group.ticket.id))
            self.changed = True
            if self.draining and not self.running:
                self._push()

    def _drop(self, ticket: Ticket) -> None:
        group = self.running.pop(ticket.id, None)
        if group is None:
            group = next(one for one in self.done if one.ticket.id == ticket.id)
            self.done.remove(group)
        self._call_back({ticket.id})
        self.wasted += sum(sequence.generated for sequence in group.sequences)
        for sequence in group.sequences:
            if sequence.turns:
                self.engines[sequence.engine].load -= 1
        self.dispatched -= 1

    def _call_back(self, ids: set[str]) -> None:
        for engine in self.engines:
            self._change(engine, lambda engine: engine.call_back(lambda one: one.group.ticket.id in ids))

    def _train(self, batch: list[_Group]) -> None:
        self.training, self.begun = True, self.now
        lengths = [sequence.length for group in batch for sequence in group.sequences]
        self.steps.append({"lengths": lengths, "stale": [self.version - group.ticket.version for group in batch]})
        if self.scheduler.calls_back:
            self._call_back(set(self.running))
            self.again += sum(one.generated for group in self.running.values() for one in group.sequences if one.turns)
            self.held += self.running.values()
            self.running = {}
        seconds = self.machine.train_token * sum(lengths) / self.trainers + self.machine.train_step
        self.trainer_busy += seconds
        start = self.machine.switch if self.scheduler.together else 0.0
        self._at(self.now + start + seconds, self._step_ends)

    def _step_ends(self) -> None:
        if self.scheduler.drains and self.running:
            self.draining = True
        else:
            self._push()

    def _push(self) -> None:
        self.draining = False
        for engine in self.engines:
            self._change(engine, lambda engine: setattr(engine, "resting", True))
        back = self.machine.switch if self.scheduler.together else 0.0
        self._at(self.now + self.machine.sync + back, self._pushed)

    def _pushed(self) -> None:
        for engine in self.engines:
            self._change(engine, lambda engine: setattr(engine, "resting", False))
        self.version += 1
        self.idle.append((self.begun - self.free) / max(self.now - self.free, 1e-9))
        self.training, self.changed, self.free = False, True, self.now
