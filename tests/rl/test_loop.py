"""The asynchronous loop on seeded schedules, killed and restarted; invariants by their numbers in the plan of tests."""

import asyncio
import collections
import dataclasses
import math
import random

import numpy as np
import pytest

from glm5_jax.records import EndReason, PolicyVersion, to_json
from glm5_jax.rl.ledger import Ledger
from glm5_jax.rl.loop import EndOfData, Loop, Problem, Stuck
from glm5_jax.rl.schedule import Adaptive, April, Async, OneStepOff, Sync, View
from tests.rl import harness
from tests.rl.harness import Player, Script, Trainer, World, explore, memory

SCHEDULERS = (Sync(2), OneStepOff(2), April(2, 2.0), Async(2, 0), Async(2, 1), Async(2, 2), Async(2, 2, "fifo"),
              Async(2, 1, "drop"), Async(2, 1, "fifo", drains=True), Adaptive(2, every=2))
STALEST = {0: 0, 1: 1, 3: 0, 4: 1, 5: 2, 7: 1, 9: 8}  # for those that promise it, by their place
MOST = (2, 4, 4, 2, 4, 6, 6, 4, 4, 18)  # groups in flight


def seeded(seed: int) -> None:
    """One seed: a scheduler, up to three crashes, of which some cost the newest checkpoint; then the invariants."""
    rng, which = random.Random(seed), seed % len(SCHEDULERS)
    crashes = tuple(rng.randrange(1, 500) for _ in range(rng.randrange(4)))
    forgetful = rng.random() < 0.3
    with memory() as folder:
        run = explore(folder, SCHEDULERS[which], Script(seed), steps=5, seed=seed, crashes=crashes,
                      forgetful=forgetful, at_once=rng.choice([3, 1024]))
    assert max(run.stale) <= STALEST.get(which, math.inf)
    # Queues are bounded; what a lost checkpoint had learnt from is in flight again.
    assert run.world.most_in_flight <= MOST[which] + 2 * forgetful * len(crashes)


@pytest.mark.parametrize("part", range(10))
def test_schedules(part):
    """Invariants 1, 5, 6, 7, 8 on 300 seeds; a failing one fails again when it is run alone."""
    for seed in range(30 * part, 30 * part + 30):
        try:
            seeded(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}: replay it with tests.rl.test_loop.seeded({seed})")
            raise


@pytest.mark.slow
@pytest.mark.parametrize("part", range(30))
def test_many_schedules(part):
    """Invariants 1, 5, 6, 7, 8 on 3,000 more."""
    for seed in range(1000 + 100 * part, 1000 + 100 * part + 100):
        try:
            seeded(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}: replay it with tests.rl.test_loop.seeded({seed})")
            raise


def test_a_seed_replays_exactly():
    """Every event at its time, crash included; another seed of the schedule gives another order."""
    logs = []
    for seed in (3, 3, 4):
        with memory() as folder:
            logs.append(explore(folder, April(2, 2.0), Script(7), steps=4, seed=seed, crashes=(150,)).world.log)
    assert logs[0] == logs[1] != logs[2]


@pytest.mark.parametrize("scheduler", [Async(1, 1), April(1, 2.0)], ids=["async", "april"])
def test_a_crash_at_every_turn(scheduler):
    """Invariant 5: killed at each turn of a schedule, and once more soon after the restart."""
    script = Script(1, size=2, median=6)
    with memory() as folder:
        turns = explore(folder, scheduler, script, steps=2).turns
    assert turns > 60
    for crash_at in range(1, turns):
        with memory() as folder:
            run = explore(folder, scheduler, script, steps=2, crashes=(crash_at, 20))
        assert run.lives >= 2


@pytest.mark.parametrize("seed", range(5))
def test_async_with_bound_0_is_sync_bit_for_bit(seed):
    """Invariant 8: the same batches in the same order, tokens, log-probs and versions included, by the same policies,
    whatever the order in which things become ready."""
    found = []
    for scheduler, schedule in ((Sync(2), 0), (Async(2, 0), 0), (Async(2, 0), 1)):
        with memory() as folder:
            run = explore(folder, scheduler, Script(seed), steps=6, seed=schedule)
        found.append(([[to_json(group) for group in batch] for batch in run.batches], run.step_of))
    assert found[0] == found[1] == found[2]
    assert set(run.stale) == {0}


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Of two samples, by Kolmogorov and Smirnov, over what chance exceeds in one case of a thousand."""
    every = np.sort(np.concatenate([one, other]))
    share = lambda sample: np.searchsorted(np.sort(sample), every, side="right") / len(sample)
    critical = math.sqrt(-math.log(0.001 / 2) / 2) * math.sqrt(1 / len(one) + 1 / len(other))
    return float(np.abs(share(one) - share(other)).max()) / critical


def test_consumed_lengths_have_the_law_of_sampled_ones():
    """Invariant 9: under `wait`; and `drop` is found out, which shows that the test has power."""
    script = Script(9, size=1, failing=0, raising=0, letting_go=0, sigma=1.2, train_s=0.2, push_s=0.1)
    law, far = np.array([script.length(f"fresh-{i}") for i in range(5000)]), {}
    for order in ("wait", "drop"):
        with memory() as folder:
            run = explore(folder, Async(8, 1, order), script, steps=80)
        lengths = [len(one.turns[0].completion.ids) for batch in run.batches for group in batch
                   for one in group.trajectories]
        assert len(lengths) == 640
        far[order] = distance(np.array(lengths), law)
    assert far["wait"] < 1 < far["drop"]


class Stage:
    """A world, and what a test does with it beyond `explore`."""

    def __init__(self, folder, scheduler, script=Script(0), player=Player, trainer=Trainer, **options):
        self.world = World(folder, script)
        self.world.ledger = self.ledger = Ledger(folder / "ledger.sqlite")
        self.player, self.trainer = player(self.world), trainer(self.world)
        self.loop = lambda: Loop(self.ledger, scheduler, self.player, self.trainer, **options)

    def run(self, steps, seed=0):
        return harness.run(lambda: self.loop().run(steps), seed)


@pytest.fixture
def stage():
    with memory() as folder:
        made = []

        def make(*args, **options):
            made.append(Stage(folder, *args, **options))
            return made[-1]

        yield make
        for one in made:
            one.ledger.close()


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda one: f"{type(one).__name__} {getattr(one, 'order', '')}")
def test_all_environments_fail(stage, scheduler):
    """Invariant 7: with no valid groups the loop ends, and says why."""
    one = stage(scheduler, Script(0, failing=1.0, raising=0.0), patience=5)
    with pytest.raises(Stuck, match=r"after 0 of 3 steps: [567] groups in a row came to nothing, the last one with 0 of"
                                    r" 3 complete; failed: environment 3"):
        one.run(3)
    assert one.ledger.balance().dropped == {"environment": one.ledger.balance().dispatched - one.ledger.balance(
        ).in_flight}
    assert not one.player.playing


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda one: f"{type(one).__name__} {getattr(one, 'order', '')}")
def test_the_end_of_data(stage, scheduler):
    """Invariant 7: the loop trains on what there is, and then says that it is at an end."""
    one = stage(scheduler, Script(3, data=7, failing=0, raising=0))
    with pytest.raises(Stuck, match=r"after 3 of 9 steps: there are no more problems, and nothing is under way; a "
                                    r"batch takes 2 groups, [01] are done"):
        one.run(9)
    books = one.ledger.balance()
    assert books.consumed == 6 and books.in_flight + books.dropped.get("stale", 0) == 1


def test_problems_that_come_after_the_end_of_data(stage):
    """More are added with every step."""
    class Growing(Player):
        def next(self, number):
            if number >= 2 * (1 + len(self.world.checkpoints)):
                raise EndOfData
            return super().next(number)

    one = stage(Async(2, 1), Script(3, failing=0, raising=0), player=Growing)
    one.run(3)
    assert one.ledger.balance().consumed == 6


def test_no_problem_for_now(stage):
    """Tasks that come and go: the loop asks again, and gives up where nothing comes for long."""
    class Shy(Player):
        until = 0.0

        def next(self, number):
            return super().next(number) if asyncio.get_running_loop().time() >= self.until else None

    one = stage(Async(2, 1), player=Shy, wait_s=30)
    one.player.until = 25.0
    one.run(2)
    assert min(event[0] for event in one.world.log if event[1] == "play") == pytest.approx(25, abs=2)
    one.player.until = math.inf
    with pytest.raises(Stuck, match="there has been no problem for 30 seconds, and nothing is under way"):
        one.run(9)


def test_a_scheduler_that_admits_nothing(stage):
    class Idle(Sync):
        def admit(self, view):
            return 0

    with pytest.raises(Stuck, match=r"after 0 of 1 steps: .*Idle\(groups=2\) admits no group"):
        stage(Idle(2)).run(1)


def test_a_dropped_group_is_replaced_by_exactly_one(stage):
    """Invariant 7: with sync, what was dispatched is what was trained on, and what was dropped."""
    one = stage(Sync(2), Script(5, failing=0.35))
    one.run(6)
    books = one.ledger.balance()
    assert sum(books.dropped.values()) >= 3
    assert books.dispatched == 12 + sum(books.dropped.values()) and books.in_flight == 0


def test_what_the_player_breaks_fails_alone(stage):
    """A rollout that raises, is another one's or none, gives up uncalled, is cancelled, has forgotten its tokens, or
    has them of a policy that nobody knows: it has failed, and the loop goes on."""
    class Broken(Player):
        async def play(self, order, id, so_far):
            found = await super().play(order, id, so_far)
            match int(id.split("-")[1]):
                case 1:
                    raise OSError("no disk")
                case 2:
                    return dataclasses.replace(found, id="another")
                case 3:
                    return None
                case 4:
                    return dataclasses.replace(found, turns=(), end=EndReason.ABORTED)
                case 5:
                    raise asyncio.CancelledError
                case 6 if so_far is None:  # a partial one, which is played on, and then has forgotten it
                    return self._trajectory(order, id, self.script.tokens(id, 0, 1, version=1))
                case 6:
                    return dataclasses.replace(found, turns=())
                case 7:
                    return self._trajectory(order, id, self.script.tokens(id, 0, 99, version=99))
            return found

    script = Script(2, failing=0, raising=0, letting_go=0, median=40, sigma=0.1)
    one = stage(Sync(2), script, player=Broken)
    one.run(3)
    books = one.ledger.balance()
    assert books.dropped == {"worker": 7} and books.consumed == 6
    details = [str(one.ledger.trajectories(f"task{n % 2}-{n}")[0].failure) for n in range(1, 8)]
    for detail, said in zip(details, ("OSError: no disk", "found 'another'", "AttributeError", "nothing new",
                                      "CancelledError", "LedgerError", "some of [99]")):
        assert said in detail


def partial_tokens(ledger):
    return sum(len(turn.completion.ids) for order in ledger.in_flight() for one in ledger.trajectories(order.id)
               if one.end is EndReason.ABORTED for turn in one.turns)


def test_a_trainer_that_raises(stage):
    """The error passes; what was being played is called back, and its tokens are kept."""
    class Breaking(Trainer):
        async def train(self, step, batch):
            if step == 3:
                raise FloatingPointError("nan")
            return await super().train(step, batch)

    one = stage(Async(2, 2), trainer=Breaking)
    with pytest.raises(FloatingPointError, match="nan"):
        one.run(5)
    assert partial_tokens(one.ledger) > 0 and not one.player.playing
    one.trainer = Trainer(one.world)
    one.run(5)
    assert one.ledger.balance().consumed == 10


@pytest.mark.parametrize("after", [0.5, 3.0, 6.0, 10.0])
def test_a_cancellation_keeps_tokens_and_leaves_nothing_running(stage, after):
    one = stage(Async(2, 2))

    async def main():
        task = asyncio.create_task(one.loop().run(50))
        await asyncio.sleep(after)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    harness.run(main)
    assert not one.player.playing
    kept = partial_tokens(one.ledger)
    one.run(one.trainer.step + 1)
    assert kept > 0 or after == 0.5


def test_a_run_that_has_ended_goes_on(stage):
    one = stage(April(2, 2.0))
    one.run(2)
    numbers = [policy.number for policy in one.ledger.policies()]
    one.run(2)  # nothing to do
    assert [policy.number for policy in one.ledger.policies()] == numbers == [1, 2, 3]
    one.run(4)
    assert one.ledger.balance().consumed == 8
    assert [(policy.number, policy.step) for policy in one.ledger.policies()] == [
        (1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (6, 4)]


def test_batches_of_another_size_after_a_restart(stage):
    """What the bound allows is of today's size."""
    one = stage(Async(2, 1))
    one.run(3)
    two = stage(Async(4, 1))
    two.run(5)
    assert [len(two.ledger.batch(step)) for step in range(1, 6)] == [2, 2, 2, 4, 4]
    assert two.world.most_in_flight <= 8


def test_a_ledger_of_another_run(stage):
    one = stage(Sync(2))
    one.run(2)
    one.world.checkpoints = one.world.checkpoints + [["unknown"]] * 5
    with pytest.raises(ValueError, match="expected the ledger of this run, whose trainer is at step 7"):
        one.run(9)


def test_an_empty_ledger_behind_a_checkpoint(stage):
    """Training goes on with a new ledger, without dispatching for the steps before it."""
    one = stage(Async(2, 1))
    one.world.checkpoints = [["known"]] * 5
    one.run(7)
    assert one.ledger.balance().consumed == 4 and one.world.most_in_flight <= 4


def test_a_trainer_that_pushes_another_policy(stage):
    class Confused(Trainer):
        async def push(self, number):
            return PolicyVersion(number + 1, 0)

    with pytest.raises(RuntimeError, match="trainer.push: expected policy 1, found 2"):
        stage(Sync(2), trainer=Confused).run(1)


@pytest.mark.parametrize("options, message", [({"at_once": 0}, "at_once: expected at least 1, found 0"),
                                              ({"patience": 0}, "patience: expected at least 1, found 0")])
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Loop(None, Sync(2), None, None, **options)


def test_at_once(stage):
    """No more rollouts than that are played at a time, and all of them in the end."""
    class Counting(Player):
        most = 0

        async def play(self, order, id, so_far):
            Counting.most = max(Counting.most, len(self.playing) + 1)
            return await super().play(order, id, so_far)

    stage(Async(2, 2), player=Counting, at_once=4).run(4)
    assert Counting.most == 4


def test_april_stops_at_a_batch_and_resumes_first(stage):
    """Invariant 4 at the loop: what was called back is played on from its tokens, before anything new is begun."""
    one = stage(April(2, 2.0), Script(4, letting_go=0.0, raising=0.0, failing=0.0), at_once=4)
    one.run(6)
    events = [event[1:] for event in one.world.log]
    played = [event for event in events if event[0] == "play"]
    assert sum(tokens > 0 for _, _, tokens in played) >= 4
    pushes = [i for i, event in enumerate(events) if event[0] == "push"]
    for push, next_push in zip(pushes, pushes[1:]):  # those of the first four begin in any order
        resumed = [event[2] > 0 for event in events[push:next_push] if event[0] == "play"]
        assert not any(resumed[4:])
    trains = [i for i, event in enumerate(events) if event[0] == "train"]
    for train in trains:  # engines and trainer share devices
        push = next(i for i in pushes if i > train)
        assert not any(event[0] == "play" for event in events[train:push])


def test_one_step_off_trains_while_it_generates_and_drains_before_weights_move(stage):
    one = stage(OneStepOff(2), Script(0, letting_go=0.0))
    one.run(4)
    events = [event[1:] for event in one.world.log]
    train, push = (next(i for i, event in enumerate(events) if event[:2] == what)
                   for what in (("train", 1), ("push", 2)))
    assert any(event[0] == "play" for event in events[train:push])
    for number, step in enumerate(range(1, 5)):  # no rollout spans weights
        for group in one.ledger.batch(step):
            for rollout in group.members:
                assert len(set(rollout.turns[0].completion.versions)) == 1


def test_no_group_begins_while_engines_drain(stage):
    """Not even in the place of one that was dropped meanwhile."""
    one = stage(OneStepOff(2), Script(1, failing=0.4, train_s=1.0), patience=99)
    one.run(12)
    begun, drained, draining = set(), 0, False
    for _, what, *about in one.world.log:
        draining = what == "trained" or draining and what != "pushing"
        if what == "dropped":
            drained += draining
        if what == "play":
            group = about[0].rpartition("-")[0]
            assert group in begun or not draining
            begun.add(group)
    assert drained > 0


class Rows:
    def __init__(self):
        self.rows = []

    def write(self, step, values):
        self.rows.append((step, dict(values)))

    def close(self):
        pass


def test_metrics_of_each_step(stage):
    seconds = collections.Counter[str]()

    class Timed(Player):
        async def play(self, order, id, so_far):
            began = asyncio.get_running_loop().time()
            try:
                return await super().play(order, id, so_far)
            finally:
                seconds[id] += asyncio.get_running_loop().time() - began

    writer = Rows()
    one = stage(Async(2, 1, "drop"), Script(6, failing=0.3, train_s=2.0), player=Timed, writer=writer,
                retried=lambda: 3 * len(one.world.checkpoints))
    one.run(8)
    assert [step for step, _ in writer.rows] == list(range(1, 9))
    assert [values["rollouts/retried"] for _, values in writer.rows] == [0, *[3] * 7]
    total = lambda name: sum(values[name] for _, values in writer.rows)
    step_of = {policy.number: policy.step for policy in one.ledger.policies()}
    for step, values in writer.rows:
        members = [rollout for group in one.ledger.batch(step) for rollout in group.trajectories
                   if rollout.end.complete]
        stale = [step - 1 - step_of[rollout.first_version] for rollout in members]
        drawn = [step - 1 - step_of[version] for rollout in members for version in rollout.turns[0].completion.versions]
        lengths = [len(rollout.turns[0].completion.ids) for rollout in members]
        longest = members[np.argmax(lengths)].id
        assert values["staleness/mean"] == pytest.approx(np.mean(stale))
        assert values["staleness/max"] == max(stale) <= 1
        assert values["staleness/share_0"] == pytest.approx(np.mean(np.array(stale) == 0))
        assert values["staleness/tokens_share_0"] == pytest.approx(np.mean(np.array(drawn) == 0))
        assert values["length/consumed"] == pytest.approx(np.mean(lengths))
        assert values["tokens/per_second_of_longest"] == pytest.approx(max(lengths) / seconds[longest])
        assert values["tokens/trained"] == sum(lengths)
        assert values["reward/mean"] == pytest.approx(np.mean([rollout.reward for rollout in members]))
        assert 0 <= values["trainer/idle"] < 1 and 0 < values["push/seconds"] < 2
        assert 0 <= values["groups/in_flight"] <= 4
    dropped = one.ledger.balance().dropped
    assert 0 < total("groups/dropped/environment") <= dropped["environment"]  # what follows the last batch is in none
    assert total("rollouts/failed/environment") > 0


def test_the_idle_share_is_what_the_scheduler_sees(stage):
    """A trainer that is done at once waits for most of its time; one that is slow for hardly any."""
    seen = {}

    @dataclasses.dataclass(frozen=True)
    class Watching(Async):
        name: str = ""

        def admit(self, view: View) -> int:
            seen[self.name] = view.idle
            return super().admit(view)

    for name, seconds in (("quick", 0.01), ("slow", 500.0)):
        with memory() as folder:
            explore(folder, Watching(2, 1, name=name), Script(0, train_s=seconds), steps=5)
    assert len(seen["quick"]) == len(seen["slow"]) == 4
    assert np.mean(seen["quick"]) > 0.5 and max(seen["slow"][1:]) < 0.05


def test_numbers_of_problems_go_on_after_a_restart(stage):
    """Every problem once: a restart neither skips nor repeats."""
    class Numbered(Player):
        asked: list[int] = []

        def next(self, number):
            self.asked.append(number)
            if number >= 9:
                raise EndOfData
            return Problem("sums", number, 2)

    one = stage(Async(2, 1), Script(0, size=2, failing=0, raising=0), player=Numbered)
    one.run(2)
    one.player = Numbered(one.world)
    with pytest.raises(Stuck):
        one.run(9)
    assert sorted(set(Numbered.asked)) == list(range(10))
    assert Numbered.asked.count(3) == 1
