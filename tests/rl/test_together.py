"""Loop, orchestrator, gateway and environments together, on the virtual clock, killed and restarted."""

import asyncio
import random

import pytest

from glm5_jax.records import EndReason, PolicyVersion, StopReason
from glm5_jax.rl.assemble import rows
from glm5_jax.rl.ledger import Ledger
from glm5_jax.rl.loop import Loop
from glm5_jax.rl.orchestrator import Orchestrator, Service
from glm5_jax.rl.rollout import play
from glm5_jax.rl.schedule import April, Async, OneStepOff, Sync
from glm5_jax.serve.gateway import Gateway
from glm5_jax.serve.generator import EngineLost
from tests.rl.harness import Crash, VirtualLoop, memory
from tests.rl.test_rollout import TOKENIZER, Quiz, script
from tests.serve.fakes import ScriptedGenerator

STEPS = 4


class Breaking(ScriptedGenerator):
    """Of a hundred pieces three are lost, and their calls with them."""

    def __init__(self, rng, *args, **options):
        super().__init__(*args, **options)
        self._rng = rng

    async def _next(self, session, recalled):
        await super()._next(session, recalled)
        if self._rng.random() < 0.03:
            raise EngineLost("a step of the engine failed")


class Learner:
    """A trainer whose checkpoints are a number, and whose weights are the version that the engine stamps."""

    def __init__(self, engine):
        self.engine, self.step = engine, 0

    async def train(self, step, batch):
        await asyncio.sleep(3.0)
        self.step = step
        return {}

    async def push(self, number):
        await asyncio.sleep(0.5)
        assert number > self.engine.version
        self.engine.version = number
        return PolicyVersion(number, self.step)


def live(seed, life, ledger, learner, scheduler, crash_at):
    """One life; whether it ended by itself."""
    rng = random.Random(f"{seed}/{life}")
    events = VirtualLoop(f"{seed}/{life}", crash_at)

    async def main():
        engine = learner.engine = Breaking(rng, script, block=3, version=learner.engine.version,
                                           delay=lambda session: 0.3 * random.Random(session).random())
        gateway = Gateway(engine, TOKENIZER)

        async def act(function, *args):
            await asyncio.sleep(rng.random())
            if rng.random() < 0.02:
                raise OSError("the world broke")
            return function(*args)

        async def quiz(order, id, so_far, called_back):
            return await play(Quiz(), gateway, task=order.task, seed=order.seed, id=id, so_far=so_far,
                              called_back=called_back, run=act)

        orchestrator = Orchestrator([Service(name, ratio=ratio, most=4, size=3, seeds=lambda n: 1 + n % 3, play=quiz)
                                     for name, ratio in (("quiz", 2.0), ("test", 1.0))])
        await Loop(ledger, scheduler, orchestrator, learner).run(STEPS)
        assert gateway.running == 0 and engine.running == []

    try:
        events.run_until_complete(main())
        assert not events.errors, events.errors
        return True
    except Crash:
        return False
    finally:
        ledger.close()
        events.bury()


@pytest.mark.parametrize("scheduler", [Sync(2), OneStepOff(2), April(2, 2.0), Async(2, 1)],
                         ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("seed", range(3))
def test_together(scheduler, seed):
    """Invariants 1, 2, 5, 6, 8: whole groups, each once, of exactly the tokens that the engine would have drawn."""
    rng, learner = random.Random(seed), Learner(ScriptedGenerator(script))
    crashes = [rng.randrange(1, 3000) for _ in range(2)]
    with memory() as folder:
        lives = 0
        while not live(seed, lives, Ledger(folder / "ledger.sqlite"), learner, scheduler,
                       crashes[lives] if lives < len(crashes) else None):
            lives += 1
        with Ledger(folder / "ledger.sqlite") as ledger:
            books, step_of = ledger.balance(), {one.number: one.step for one in ledger.policies()}
            batches = [ledger.batch(step) for step in range(1, STEPS + 1)]
    assert books.dispatched == books.consumed + sum(books.dropped.values()) + books.in_flight
    groups = [group for batch in batches for group in batch]
    assert books.consumed == len(groups) == 2 * STEPS and all(len(group.members) == 3 for group in groups)
    members = {one.id: one for group in groups for one in group.members}
    # A call that the engine loses costs no rollout: nothing fails but worlds that break.
    assert not books.dropped.keys() - {"environment"}
    assert {one.failure.reason for group in groups for one in group.trajectories if one.failure} <= {"environment"}
    assert len(members) >= 2 * 2 * STEPS and {one.task for one in members.values()} == {"quiz", "test"}
    for one in members.values():
        assert one.end is EndReason.DONE and len(one.turns) == one.seed
        assert sum(sum(row.trained) for row in rows(one)) == sum(len(turn.completion.ids) for turn in one.turns)
        for index, turn in enumerate(one.turns):
            drawn = script(one.prompt(index), None, one.id)
            ended = turn.completion.stop is StopReason.STOP
            assert list(turn.completion.ids) == (drawn if ended else drawn[:len(turn.completion.ids)])
    if isinstance(scheduler, Async):
        assert max(step - step_of[one.first_version] for step, batch in enumerate(batches) for group in batch
                   for one in group.members) <= 1
