"""Invariants 7, 19 and 20 of the orchestrator: ratios, caps, retries, time limits; nothing raises or is lost."""

import asyncio
import collections
import dataclasses
import random
import re

import pytest

from glm5_jax.records import Completion, EndReason, Failure, FailureReason, PolicyVersion, Trajectory, Turn
from glm5_jax.rl.executors import WorkerLost
from glm5_jax.rl.ledger import Balance, Ledger, Order
from glm5_jax.rl.loop import EndOfData, Loop
from glm5_jax.rl.orchestrator import Count, Orchestrator, Service
from glm5_jax.rl.schedule import Async, Sync
from tests.rl.harness import run

REPLY = {"role": "assistant", "content": "2"}
EMPTY = Trajectory("sums-0", "sums", 7, (), EndReason.ABORTED)


def turn(*ids: int, stop="stop", reward=0.0, version=3) -> Turn:
    return Turn([{"role": "user", "content": "1 + 1?"}], REPLY, prompt=(5,), reward=reward,
                completion=Completion(ids, (-0.5,) * len(ids), (version,) * len(ids), stop))


def rollout(order: Order, id: str, *turns: Turn, end="done", **fields) -> Trajectory:
    return Trajectory(id, order.task, order.seed, turns or (turn(7, version=order.version),), end, **fields)


async def at_once(order, id, so_far, called_back):
    return rollout(order, id)


def service(name="sums", ratio=1.0, most=8, size=1, play=at_once, **fields) -> Service:
    return Service(name, ratio, most, size, lambda count: 100 + count, play, **fields)


ORDER = Order("g-0", "sums", 7, 1, 0)


def play(one: Service, so_far: Trajectory | None = None, **options) -> Trajectory:
    return run(lambda: Orchestrator([one], **options).play(ORDER, "sums-0", so_far))


def of(error: Exception):
    """A play or a reward that raises."""
    async def raises(*_):
        raise error
    return raises


async def never(*_):
    await asyncio.sleep(1e9)


def test_a_rollout_is_played_rewarded_and_logged():
    async def reward(trajectory):
        return len(trajectory.turns[-1].completion.ids) / 2

    log = []
    found = play(service(reward=reward, play=lambda order, id, *_: done(order, id)), log=log.append)
    assert found == rollout(ORDER, "sums-0", turn(8), turn(7, 9, reward=1.25)) and log == [found]


async def done(order, id):
    return rollout(order, id, turn(8), turn(7, 9, reward=0.25))


@pytest.mark.parametrize("one, reason, place, detail", [
    (service(play=of(OSError("disk full"))), "environment", "rollout", "OSError: disk full"),
    (service(play=of(WorkerLost("gone"))), "worker", "rollout", "WorkerLost: gone"),
    (service(play=of(TimeoutError())), "timeout", "rollout", "TimeoutError: "),
    (service(play=never, wall_s=60), "timeout", "rollout", "TimeoutError: expected an end within 60 s"),
    (service(play=of(asyncio.CancelledError())), "environment", "rollout",
     "RuntimeError: expected an answer, found that it cancelled itself"),
    (service(play=lambda *_: asyncio.sleep(0, "text")), "environment", "rollout",
     "TypeError: expected a Trajectory, found 'text'"),
    (service(play=lambda order, id, *_: asyncio.sleep(0, rollout(order, id + "x"))), "environment", "rollout",
     "ValueError: id: expected 'sums-0', found 'sums-0x'"),
    (service(play=lambda order: None), "environment", "rollout", "TypeError: .*takes 1 positional argument"),
    (service(reward=of(ZeroDivisionError("no")), ), "reward", "reward", "ZeroDivisionError: no"),
    (service(reward=of(WorkerLost("gone"))), "reward", "reward", "WorkerLost: gone"),
    (service(reward=never, reward_s=5), "timeout", "reward", "TimeoutError: expected an end within 5 s"),
    (service(reward=lambda _: asyncio.sleep(0, float("nan"))), "reward", "reward", "ValueError: Turn.reward: expected"),
    (service(reward=lambda _: asyncio.sleep(0, "1")), "reward", "reward", "TypeError"),
    (service("other"), "worker", "sums", r"expected one of the tasks that are registered, \['other'\]"),
])
def test_whatever_goes_wrong_is_a_failure_with_its_reason(one, reason, place, detail):
    """Invariant 20 for the rewards: a failure, not reward 0."""
    found = play(one)
    assert (found.end, found.id, found.reward) == (EndReason.FAILED, "sums-0", None)
    assert (found.failure.reason.value, found.failure.place) == (reason, place)
    assert re.match(detail, found.failure.detail), found.failure.detail


def test_an_episode_without_a_reply_cannot_be_rewarded():
    async def nothing(order, id, so_far, called_back):
        return Trajectory(id, order.task, order.seed, (), "done")

    found = play(service(play=nothing, reward=lambda _: asyncio.sleep(0, 1.0)))
    assert found.failure.reason is FailureReason.REWARD
    assert "expected one that the reward is for" in found.failure.detail


def test_a_failure_of_the_service_itself_passes_and_gets_no_reward():
    failure = Failure("environment", "step", "it broke")

    async def fails(order, id, so_far, called_back):
        return rollout(order, id, end="failed", failure=failure)

    assert play(service(play=fails, reward=of(AssertionError()))).failure == failure


@pytest.mark.parametrize("lost, tries", [(0, 1), (1, 2), (2, 3), (3, 3)])
@pytest.mark.parametrize("raised", [True, False])
def test_work_of_a_lost_worker_is_done_again_so_often_and_no_more(lost, tries, raised):
    calls = []
    begun = rollout(ORDER, "sums-0", turn(7, stop="abort"), end="aborted")

    async def loses(order, id, so_far, called_back):
        calls.append(so_far)
        if len(calls) > lost:
            return rollout(order, id, turn(7, 9))
        if raised:
            raise WorkerLost(f"host {len(calls)}")
        return rollout(order, id, end="failed", failure=Failure("worker", "step", f"host {len(calls)}"))

    one = Orchestrator([service(play=loses)], retries=2)
    found = run(lambda: one.play(ORDER, "sums-0", begun))
    assert calls == [begun] * tries and one.retried() == tries - 1
    if lost < 3:
        assert found == rollout(ORDER, "sums-0", turn(7, 9))
    else:
        assert found.failure.reason is FailureReason.WORKER and "host 3" in found.failure.detail
        assert found.turns  # what it went on from stays on record


def test_a_lost_reward_is_computed_again():
    calls = []

    async def reward(trajectory):
        calls.append(trajectory)
        if len(calls) == 1:
            raise WorkerLost("gone")
        return 1.0

    assert play(service(reward=reward)).reward == 1.0 and len(calls) == 2


def test_tokens_that_were_sampled_may_not_change():
    begun = rollout(ORDER, "sums-0", turn(7, 8, stop="abort"), end="aborted")
    found = play(service(), begun)
    assert found.failure.reason is FailureReason.ENVIRONMENT and found.turns == begun.turns
    assert "expected the 2 sampled tokens it went on from, found 1" in found.failure.detail


def test_a_rollout_that_is_called_back_ends_partial():
    async def until_called(order, id, so_far, called_back):
        playing.append(id)
        await called_back.wait()
        return rollout(order, id, turn(7, stop="abort"), end="aborted")

    playing, log = [], []

    async def main():
        orchestrator = Orchestrator([service(play=until_called, most=4)], limit=4, log=log.append)
        plays = {id: asyncio.create_task(orchestrator.play(ORDER, id, None)) for id in map("sums-{}".format, range(6))}
        await asyncio.sleep(1)
        waiting = plays.keys() - playing
        assert len(waiting) == 2
        orchestrator.call_back([playing[0], *waiting, "never seen"])
        await asyncio.sleep(1)
        assert {id for id, one in plays.items() if one.done()} == {playing[0], *waiting}
        orchestrator.call_back(plays.keys())
        ended = await asyncio.gather(*plays.values())
        assert {one.end for one in ended} == {EndReason.ABORTED} and not log
        assert {one.id for one in ended if one.turns} == set(playing) == plays.keys() - waiting

    run(main)


def test_a_lost_worker_is_not_asked_again_for_what_was_called_back():
    async def loses(order, id, so_far, called_back):
        await called_back.wait()
        raise WorkerLost("gone")

    async def main():
        orchestrator = Orchestrator([service(play=loses)])
        one = asyncio.create_task(orchestrator.play(ORDER, "sums-0", None))
        await asyncio.sleep(1)
        orchestrator.call_back(["sums-0"])
        assert await one == EMPTY

    run(main)


def test_what_does_not_heed_its_cancellation_frees_its_place():
    """Invariant 20."""
    async def deaf(order, id, so_far, called_back):
        for _ in range(3):
            try:
                await asyncio.sleep(1e6)
            except asyncio.CancelledError:
                pass

    async def main():
        orchestrator = Orchestrator([service(play=deaf, wall_s=10, most=1)], limit=1)
        clock = asyncio.get_running_loop().time
        for i in range(2):
            found = await orchestrator.play(ORDER, f"sums-{i}", None)
            assert found.failure.reason is FailureReason.TIMEOUT
        assert clock() == 2 * (10 + 5)
        one = asyncio.create_task(orchestrator.play(ORDER, "sums-2", None))
        await asyncio.sleep(1)
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        await asyncio.sleep(1e7)  # until the last of them has ended

    run(main)


def test_a_thousand_rollouts_at_once_and_no_more():
    inside, most = set(), []

    async def counts(order, id, so_far, called_back):
        inside.add(id)
        most.append(len(inside))
        await asyncio.sleep(random.Random(id).random())
        inside.remove(id)
        return rollout(order, id)

    async def main():
        orchestrator = Orchestrator([service(play=counts)], limit=1000)
        return await asyncio.gather(*(orchestrator.play(ORDER, f"sums-{i}", None) for i in range(2500)))

    ended = run(main)
    assert max(most) == 1000 and len({one.id for one in ended}) == 2500
    assert all(one.end is EndReason.DONE for one in ended)


def test_a_log_that_fails_costs_no_rollout(caplog):
    def full(trajectory):
        raise OSError("no space left on device")

    assert play(service(), log=full) == rollout(ORDER, "sums-0")
    assert "rollout sums-0 is not in the log: OSError('no space left on device')" in caplog.text


class World:
    """A loop of its own: `at_once` groups in flight, consumed as they end."""

    def __init__(self, *services: Service, at_once: int = 24, **options):
        self.orchestrator, self.at_once = Orchestrator(services, **options), at_once
        self.ended: collections.Counter = collections.Counter()
        self.dropped: collections.Counter = collections.Counter()

    async def run(self, groups: int, first: int = 0):
        number, flight = first, list[asyncio.Task]()
        while sum(self.ended.values()) < groups:
            while len(flight) < self.at_once and (problem := self.orchestrator.next(number)):
                order = Order(f"g-{number}", problem.task, problem.seed, problem.size, 0)
                flight.append(asyncio.create_task(self.group(order)))
                number += 1
            await asyncio.wait(flight, return_when=asyncio.FIRST_COMPLETED)
            flight = [one for one in flight if not one.done()]
        for one in flight:
            one.cancel()
        await asyncio.gather(*flight, return_exceptions=True)

    async def group(self, order: Order):
        async with asyncio.TaskGroup() as plays:  # unlike gather, it ends after all of them where it is cancelled
            begun = [plays.create_task(self.orchestrator.play(order, f"{order.id}-{i}", None))
                     for i in range(order.size)]
        consumed = all(one.result().end.complete for one in begun)
        (self.ended if consumed else self.dropped)[order.task] += 1
        self.orchestrator.ended(order.id, order.task, consumed)


def lasts(seconds: float, fails: float = 0.0):
    async def play(order, id, so_far, called_back):
        rng = random.Random(id)
        await asyncio.sleep(rng.expovariate(1 / seconds))
        if rng.random() < fails:
            raise OSError("it broke")
        return rollout(order, id)
    return play


def test_ratios_hold_under_slow_failing_and_stuck_tasks():
    """Invariant 19."""
    world = World(service("math", 5, 24, 4, lasts(1.0)), service("code", 3, 24, 4, lasts(6.0)),
                  service("search", 2, 24, 4, lasts(1.0, fails=0.1)), service("stuck", 2, 4, 4, never, wall_s=1e8))
    run(lambda: world.run(600))
    total = sum(world.ended.values())
    assert world.dropped["search"] > 30 and world.ended["stuck"] == 0
    for task, ratio in {"math": 5, "code": 3, "search": 2}.items():
        assert abs(world.ended[task] / total - ratio / 10) < 24 / 600
    assert world.orchestrator.counts()["math"].consumed == world.ended["math"]


def test_a_service_without_workers_gets_no_new_groups():
    up = {"code"}
    orchestrator = Orchestrator([service(name, alive=lambda name=name: name in up) for name in ("math", "code")])
    assert {orchestrator.next(i).task for i in range(6)} == {"code"}
    up.clear()
    assert orchestrator.next(6) is None
    up.add("math")
    assert orchestrator.next(6).task == "math"


def test_the_cap_is_of_groups_that_play_and_not_of_those_that_wait_to_be_consumed():
    async def main():
        orchestrator = Orchestrator([service(most=2, size=2)])
        orders = [Order(f"g-{i}", *dataclasses.astuple(orchestrator.next(i)), 0) for i in range(2)]
        assert [order.seed for order in orders] == [100, 101] and orchestrator.next(2) is None
        orchestrator.played("g-0", "sums")
        assert orchestrator.next(2).seed == 102 and orchestrator.next(3) is None
        orchestrator.ended("g-0", "sums", True)
        assert orchestrator.next(3) is None
        orchestrator.ended("g-1", "sums", False)  # dropped before its rollouts ended
        assert orchestrator.next(3).seed == 103 and orchestrator.next(4) is None
        assert orchestrator.counts() == {"sums": Count(dispatched=4, consumed=1, in_flight=2)}

    run(main)


def test_a_restart_goes_on_from_the_counts():
    services = [service("math", 3), service("code", 1)]
    before = Orchestrator(services)
    tasks = [before.next(i).task for i in range(8)]
    for i, task in enumerate(tasks[:6]):
        before.ended(f"g-{i}", task, True)
    after = Orchestrator(services)
    after.restore({task: Balance(one.dispatched, one.consumed, {}, one.in_flight)
                   for task, one in before.counts().items()})
    assert after.counts() == before.counts()
    seeds = collections.defaultdict(list)
    for number in range(8, 16):
        problem = after.next(number)
        seeds[problem.task].append(problem.seed)
    assert len(seeds["math"]) == 6 and seeds["math"] == list(range(106, 112)) and seeds["code"] == [102, 103]


def test_tasks_run_out_of_problems_one_by_one():
    def first(count, most):
        if count >= most:
            raise EndOfData
        return count

    tasks = [dataclasses.replace(service(name, most=20), seeds=lambda count, most=most: first(count, most))
             for name, most in (("math", 2), ("code", 7))]
    orchestrator = Orchestrator(tasks)
    assert collections.Counter(orchestrator.next(i).task for i in range(9)) == {"math": 2, "code": 7}
    with pytest.raises(EndOfData, match="no task has another problem"):
        orchestrator.next(9)


class Trainer:
    """Takes half a second for a step, and its checkpoint is its number of steps."""

    def __init__(self, step=0):
        self.step, self.dies_at = step, None

    async def train(self, step, batch):
        await asyncio.sleep(0.5)
        if step == self.dies_at:
            raise OSError("the host is gone")
        self.step = step
        return {}

    async def push(self, number):
        return PolicyVersion(number, self.step)


def test_the_loop_goes_on_with_the_ratios_after_a_crash(tmp_path):
    """Invariants 5 and 19 with the real loop and ledger: slow and failing tasks, and a trainer that dies on the way."""
    def tasks():
        return Orchestrator([service("math", 5, 16, 2, lasts(0.2)), service("code", 3, 16, 2, lasts(1.5)),
                             service("search", 2, 16, 2, lasts(0.2, fails=0.2))])

    async def until(trainer, steps, ledger):
        orchestrator = tasks()
        try:
            await Loop(ledger, Async(8, bound=1), orchestrator, trainer).run(steps)
        finally:
            told, books = orchestrator.counts(), ledger.tasks()
            assert {task: (one.dispatched, one.consumed, one.in_flight) for task, one in books.items()} == {
                task: dataclasses.astuple(one) for task, one in told.items()}

    trainer = Trainer()
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        trainer.dies_at = 7
        with pytest.raises(OSError, match="the host is gone"):
            run(lambda: until(trainer, 25, ledger))
        trainer.dies_at = None
        run(lambda: until(trainer, 25, ledger))
        books = ledger.tasks()
        assert sum(one.consumed for one in books.values()) == 25 * 8 and books["search"].dropped
        for task, ratio in {"math": 5, "code": 3, "search": 2}.items():
            assert abs(books[task].consumed / 200 - ratio / 10) < 0.05
        seeds = {task: sorted(group.trajectories[0].seed for step in range(1, 26) for group in ledger.batch(step)
                              if group.trajectories[0].task == task) for task in books}
        assert all(len(set(own)) == len(own) for own in seeds.values())  # no problem twice


@pytest.mark.parametrize("recorded", [0, 1, 2])
def test_a_restart_knows_which_groups_are_still_to_be_played(tmp_path, recorded):
    """Killed with as many groups in flight as may play, of two rollouts each, that were all, half or not begun."""
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.push(PolicyVersion(1, 0))
        for number in range(4):
            order = Order(f"sums-{number}", "sums", 100 + number, 2, 1)
            ledger.dispatch(order)
            for i in range(recorded):
                ledger.record(order.id, rollout(order, f"{order.id}-{i}"))
        run(lambda: Loop(ledger, Sync(8), Orchestrator([service(most=4, size=2)]), Trainer()).run(1))
        assert ledger.tasks() == {"sums": Balance(8, 8, {}, 0)}


def test_a_group_has_nothing_left_to_play_however_its_rollouts_ended(tmp_path):
    """One of three is given back uncalled, which is a failure to the loop alone."""
    async def gives_back(order, id, so_far, called_back):
        return rollout(order, id) if id[-1] != "0" else Trajectory(id, order.task, order.seed, (), EndReason.ABORTED)

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        run(lambda: Loop(ledger, Sync(3), Orchestrator([service(most=1, size=3, play=gives_back)]), Trainer()).run(1))
        assert ledger.tasks() == {"sums": Balance(3, 3, {}, 0)}


def test_settings_change_while_it_runs():
    orchestrator = Orchestrator([service("math", 1), service("code", 1)], limit=20)
    orchestrator.register(service("math", 3, most=12))
    assert collections.Counter(orchestrator.next(i).task for i in range(8)) == {"math": 6, "code": 2}
    orchestrator.deregister("math")
    assert orchestrator.next(8).task == "code"
    with pytest.raises(LookupError, match=r"task 'math': expected one of \['code'\]"):
        orchestrator.deregister("math")
    with pytest.raises(ValueError, match="most: expected no more than 20 rollouts in flight over all tasks, found 24"):
        orchestrator.register(service("search", most=4, size=4))


@pytest.mark.parametrize("field, value, expected", [
    ("ratio", 0.0, "above 0"), ("ratio", float("nan"), "above 0"), ("most", 0, "of at least 1"),
    ("size", 0, "of at least 1"), ("wall_s", -1.0, "above 0"), ("reward_s", float("inf"), "above 0")])
def test_a_service_that_makes_no_sense(field, value, expected):
    with pytest.raises(ValueError, match=f"'sums': {field}: expected a finite number {expected}, found {value}"):
        service(**{field: value})
