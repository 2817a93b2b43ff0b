"""One seeded event loop on a virtual clock, and a world to run the asynchronous loop in: engines, trainer, crashes.

`VirtualLoop` owns every await: of all callbacks that are ready it runs one at a time, picked by a seeded generator, and
where none is ready its clock jumps to the next timer. No real second passes and no thread runs, so that a seed always
gives the same schedule. asyncio itself promises to run callbacks in their order; code that is right in any order is
right in that one.

It overrides `BaseEventLoop._run_once`, and relies on `_ready` (a deque of handles) and `_scheduled` (a heap of timer
handles), as CPython 3.11 to 3.13 have them.
"""

import asyncio
import contextlib
import dataclasses
import heapq
import json
import os
import pathlib
import random
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from glm5_jax.records import Completion, EndReason, Failure, Group, PolicyVersion, StopReason, Trajectory, Turn
from glm5_jax.rl.ledger import Ledger
from glm5_jax.rl.loop import EndOfData, Loop, Problem
from glm5_jax.rl.schedule import Scheduler

ENDLESS = 200_000  # turns of a schedule after which something goes round in circles


class Crash(BaseException):
    """The process is killed."""


class Deadlock(AssertionError):
    """Nothing is ready, no timer runs, and the program has not ended."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs one ready callback at a time, by the seed; raises Crash in the place of turn number `crash_at`."""

    def __init__(self, seed: int | str, crash_at: int | None = None):
        super().__init__()
        self.random, self.crash_at, self.turn, self._now = random.Random(seed), crash_at, 0, 0.0
        self.errors: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _, context: self.errors.append(context))

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        while not self._ready:
            if not self._scheduled:
                raise Deadlock(f"turn {self.turn}, second {self._now}: nothing can happen any more")
            self._now = max(self._now, self._scheduled[0]._when)
            while self._scheduled and self._scheduled[0]._when <= self._now:
                timer = heapq.heappop(self._scheduled)
                timer._scheduled = False
                if not timer._cancelled:
                    self._ready.append(timer)
        self.turn += 1
        if self.turn == self.crash_at:
            raise Crash
        assert self.turn < ENDLESS, "the schedule goes round in circles"
        index = self.random.randrange(len(self._ready))
        self._ready.rotate(-index)
        handle = self._ready.popleft()
        self._ready.rotate(index)
        if not handle._cancelled:
            handle._run()

    def _write_to_self(self) -> None:
        """There is no selector to wake."""

    def bury(self) -> None:
        """Ends the loop. What is left of a crash is cancelled: it has no ledger any more to write into."""
        self.crash_at = None
        if left := asyncio.all_tasks(self):
            for task in left:
                task.cancel()
            self.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self.close()


def run(main: Callable[[], Coroutine[Any, Any, Any]], seed: int | str = 0) -> Any:
    """What `main()` returns on a loop of its own; fails where a task is left running, or a callback has raised."""
    loop = VirtualLoop(seed)
    try:
        result = loop.run_until_complete(main())
        assert not asyncio.all_tasks(loop), f"left running: {asyncio.all_tasks(loop)}"
        assert not loop.errors, loop.errors
        return result
    finally:
        loop.bury()


@contextlib.contextmanager
def memory() -> Iterator[pathlib.Path]:
    """A folder that costs no disk writes, where the system has one."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield pathlib.Path(folder)


@dataclasses.dataclass(frozen=True)
class Script:
    """What happens in a world, each choice by a generator made of the seed and of whom it is for."""

    seed: int
    size: int = 3
    data: int | None = None  # groups there are
    failing: float = 0.1  # share of rollouts
    raising: float = 0.02  # share whose player raises
    letting_go: float = 0.05  # share of chunks after which an engine loses the rollout, uncalled
    chunk: int = 4
    sigma: float = 0.8  # of log-normal lengths
    median: float = 12.0
    train_s: float = 4.0
    push_s: float = 1.0

    def rng(self, *whom: object) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, *whom))))

    def length(self, id: str) -> int:
        return max(1, min(400, round(self.median * self.rng(id, "length").lognormvariate(0, self.sigma))))

    def fails(self, id: str) -> bool:
        return self.rng(id, "fails").random() < self.failing

    def raises(self, id: str) -> bool:
        return self.rng(id, "raises").random() < self.raising

    def tokens(self, id: str, start: int, stop: int, version: int) -> Completion:
        """Ids and log-probs tell their place, so that a token lost or doubled shows."""
        places = range(start, min(stop, self.length(id)))
        return Completion([7 * place % 1000 for place in places], [-place / 1024 for place in places],
                          [version] * len(places), StopReason.STOP if stop >= self.length(id) else StopReason.ABORT)


class World:
    """What outlives a crash: the disk, and engines that go on serving what they serve."""

    def __init__(self, folder: pathlib.Path, script: Script, engines: int = 2):
        self.folder, self.script = folder, script
        self.serving = [0] * engines
        self.log: list[tuple[Any, ...]] = []
        self.ledger: Ledger | None = None
        self.most_in_flight = 0
        self.playing: set[str] = set()  # rollouts

    def note(self, *what: object) -> None:
        """Invariant 5 is looked at whenever something happens."""
        self.log.append((round(asyncio.get_running_loop().time(), 6), *what))
        books = self.ledger.balance()
        assert books.dispatched == books.consumed + sum(books.dropped.values()) + books.in_flight
        self.most_in_flight = max(self.most_in_flight, books.in_flight)

    @property
    def checkpoints(self) -> list[list[str]]:
        """Of the trainer: the members of every step's batch, so that it shows what it has learnt from."""
        path = self.folder / "trainer.json"
        return json.loads(path.read_text()) if path.exists() else []

    @checkpoints.setter
    def checkpoints(self, steps: list[list[str]]) -> None:
        (self.folder / "trainer.new").write_text(json.dumps(steps))
        os.replace(self.folder / "trainer.new", self.folder / "trainer.json")


class Player:
    """Rollouts of a script."""

    def __init__(self, world: World):
        self.world, self.script = world, world.script
        self.playing = world.playing = set()
        self.recalled: set[str] = set()

    def restore(self, tasks: Any) -> None:
        self.world.note("begin", {task: books.in_flight for task, books in tasks.items()})

    def next(self, number: int) -> Problem | None:
        if self.script.data is not None and number >= self.script.data:
            raise EndOfData
        return Problem(f"task{number % 2}", number, self.script.size)

    async def play(self, order: Any, id: str, so_far: Trajectory | None) -> Trajectory:
        script, world = self.script, self.world
        assert id not in self.playing, f"{id} is played twice at once"
        self.playing.add(id)
        world.note("play", id, len(so_far.turns[0].completion.ids) if so_far else 0)
        engine = script.rng(id, "engine").randrange(len(world.serving))  # one engine per rollout, also after a crash
        drawn = so_far.turns[0].completion if so_far else Completion((), (), (), "abort")
        try:
            while drawn.stop is StopReason.ABORT:
                await asyncio.sleep(script.chunk * script.rng(id, "speed").uniform(0.05, 0.15))
                if id in self.recalled:
                    break
                start = len(drawn.ids)
                drawn += script.tokens(id, start, start + script.chunk, world.serving[engine])
                if script.rng(id, start, "lets go").random() < script.letting_go:
                    break
            if drawn.stop is not StopReason.ABORT and script.raises(id):
                raise OSError("the player broke")
            return self._trajectory(order, id, drawn)
        finally:
            self.playing.discard(id)
            self.recalled.discard(id)

    def _trajectory(self, order: Any, id: str, drawn: Completion) -> Trajectory:
        over = drawn.stop is not StopReason.ABORT
        failure = Failure("environment", "step", "as scripted") if over and self.script.fails(id) else None
        turn = Turn([{"role": "user", "content": id}], {"role": "assistant", "content": ""}, (order.seed,), drawn,
                    reward=float(len(drawn.ids) % 2) if over else 0.0)
        end = EndReason.FAILED if failure else EndReason.DONE if over else EndReason.ABORTED
        return Trajectory(id, order.task, order.seed, [turn] if drawn.ids else [], end, failure)

    def call_back(self, ids: Any) -> None:
        self.recalled |= set(ids) & self.playing

    def played(self, group: str, task: str) -> None:
        self.world.note("played", group, task)

    def ended(self, group: str, task: str, consumed: bool) -> None:
        self.world.note("consumed" if consumed else "dropped", group, task)


class Trainer:
    """Learns who its teachers were, and keeps it on the disk. With this scheduler, if one is given."""

    def __init__(self, world: World, scheduler: Scheduler | None = None):
        self.world, self.scheduler = world, scheduler

    @property
    def step(self) -> int:
        return len(self.world.checkpoints)

    async def train(self, step: int, batch: list[Group]) -> dict[str, Any]:
        world, rng = self.world, self.world.script.rng("train", step)
        world.note("train", step, [group.id for group in batch])
        assert step == self.step + 1
        assert not (self.scheduler and self.scheduler.together and world.playing), "engines have the devices"
        await asyncio.sleep(rng.uniform(0.2, 1) * world.script.train_s)
        world.checkpoints = world.checkpoints + [[one.id for group in batch for one in group.members]]
        await asyncio.sleep(rng.uniform(0, 1))
        world.note("trained", step)
        return {}

    async def push(self, number: int) -> PolicyVersion:
        """One engine after the other."""
        world = self.world
        assert not (self.scheduler and self.scheduler.drains and world.playing), "not drained"
        world.note("pushing", number)
        for engine, serving in enumerate(world.serving):
            await asyncio.sleep(world.script.rng("push", number, engine).uniform(0, 1) * world.script.push_s)
            assert number > serving, f"engine {engine} served {serving}, and is to serve {number}"
            world.serving[engine] = number
        world.note("push", number)
        return PolicyVersion(number, self.step)


@dataclasses.dataclass
class Outcome:
    """What a schedule, with all its crashes, has led to."""

    world: World
    batches: list[list[Group]]
    step_of: dict[int, int]
    lives: int
    turns: int  # of the last life

    @property
    def stale(self) -> list[int]:
        """Of every consumed rollout, by its first version."""
        return [step - self.step_of[one.first_version] for step, batch in enumerate(self.batches) for group in batch
                for one in group.trajectories if one.end.complete]


def explore(folder: pathlib.Path, scheduler: Scheduler, script: Script, *, steps: int, seed: int = 0,
            crashes: tuple[int, ...] = (), forgetful: bool = False, **options: Any) -> Outcome:
    """Runs the loop for `steps` steps on schedule `seed`, killed at these turns of its first lives; checks what has to
    hold after any schedule. `forgetful`: each crash costs the newest checkpoint, where there is one."""
    world, lives = World(folder, script), 0
    for crash_at in (*crashes, None):
        lives += 1
        events = VirtualLoop(f"{seed}/{lives}", crash_at)
        world.ledger = Ledger(folder / "ledger.sqlite")
        player, trainer = Player(world), Trainer(world, scheduler)
        try:
            events.run_until_complete(Loop(world.ledger, scheduler, player, trainer, **options).run(steps))
            assert not asyncio.all_tasks(events) and not player.playing, "left running"
            assert not events.errors, events.errors
        except Crash:
            if forgetful:
                world.checkpoints = world.checkpoints[:-1]
            continue
        finally:
            world.ledger.close()
            events.bury()
        with Ledger(folder / "ledger.sqlite") as ledger:
            outcome = Outcome(world, [ledger.batch(step) for step in range(1, steps + 1)],
                              {one.number: one.step for one in ledger.policies()}, lives, events.turn)
            check(outcome, ledger, scheduler)
        return outcome
    raise AssertionError("the last life is not killed")


def check(outcome: Outcome, ledger: Ledger, scheduler: Scheduler) -> None:
    """Invariants 1, 5, 6 and 8 of a run that has ended."""
    script, batches = outcome.world.script, outcome.batches
    books = ledger.balance()
    assert books.dispatched == books.consumed + sum(books.dropped.values()) + books.in_flight
    assert books.consumed == sum(map(len, batches)) == scheduler.groups * len(batches)
    assert outcome.world.checkpoints == [[one.id for group in batch for one in group.members] for batch in batches]
    rollouts = [one for batch in batches for group in batch for one in group.trajectories]
    assert len({one.id for one in rollouts}) == len(rollouts)
    for group in (group for batch in batches for group in batch):
        valid = sum(one.end.complete for one in group.trajectories)
        assert len(group.members) == group.size and len(group.trajectories) == group.size
        assert len(group.repeats) == group.size - valid and 2 * valid > group.size
    for one in rollouts:
        assert one.end.complete == (not script.fails(one.id) and not script.raises(one.id))
        if one.end.complete:
            sampled, whole = one.turns[0].completion, script.tokens(one.id, 0, script.length(one.id), 0)
            assert (sampled.ids, sampled.logprobs) == (whole.ids, whole.logprobs)
            assert list(sampled.versions) == sorted(sampled.versions)
    for order in ledger.in_flight():
        assert len(ledger.trajectories(order.id)) <= order.size
