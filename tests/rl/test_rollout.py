"""Rollouts through the gateway, on the virtual clock: called back at any moment, cancelled, failing in every way."""

import asyncio
import random
import threading

import pytest

from glm5_jax.envs.base import Limits, Start, Step
from glm5_jax.infer.request import RequestTooLong
from glm5_jax.records import EndReason, FailureReason, StopReason, Trajectory, from_json, to_json
from glm5_jax.rl.assemble import rows
from glm5_jax.rl.executors import WorkerLost
from glm5_jax.rl.rollout import play, threads
from glm5_jax.serve.gateway import Gateway, Options
from glm5_jax.serve.generator import EngineLost, Overloaded, UnknownSession
from glm5_jax.text.tokenizer import Tokenizer
from tests.rl import harness
from tests.serve.fakes import ScriptedGenerator

TOKENIZER = Tokenizer.packaged()


class Quiz:
    """Asks `seed` times; what it says next depends on the replies."""

    def __init__(self, **broken):
        self.broken, self.calls = broken, []

    def _do(self, place, value):
        self.calls.append(place)
        return self.broken[place]() if place in self.broken else value

    def reset(self, seed):
        self.left = seed
        return self._do("reset", Start(({"role": "user", "content": f"{seed} questions"},)))

    def step(self, message):
        self.left -= 1
        asked = {"role": "user", "content": f"{self.left} left after {len(message.get('content') or '')}"}
        return self._do("step", Step((asked,), 0.5, self.left <= 0, {"left": self.left}))

    def close(self):
        self._do("close", None)


def script(prompt, sampling, session):
    """Some words, by the prompt; every fifth reply is one that ends without a stop."""
    rng = random.Random(str(prompt))
    text = "Hm.</think>" + " ".join(rng.choice(["yes", "no", "maybe", "42"]) for _ in range(rng.randrange(1, 12)))
    return TOKENIZER.encode(text + ("<|user|>" if rng.random() < 0.8 else ""), specials=True)


class Stand:
    """A gateway over scripted tokens, ten a second; environment calls take a fifth of one."""

    def __init__(self, **options):
        self.generator = ScriptedGenerator(script, block=1, delay=lambda session: 0.1, **options)
        self.gateway = Gateway(self.generator, TOKENIZER)
        self.env = Quiz()

    async def act(self, function, *args):
        await asyncio.sleep(0.2)
        return function(*args)

    async def play(self, **options):
        options = {"seed": 3, "id": "quiz-3-0", "run": self.act} | options
        return await play(self.env, self.gateway, task="quiz", **options)

    def assert_nothing_is_left(self):
        assert self.gateway.running == 0 and self.generator.running == [] and self.env.calls[-1] == "close"
        assert self.env.calls.count("close") == 1
        with pytest.raises(UnknownSession):
            self.gateway.turns("quiz-3-0")


def test_a_rollout_is_what_the_gateway_has_on_record():
    async def main():
        stand = Stand(version=5)
        closed = []
        stand.gateway.close = lambda session, close=stand.gateway.close: closed.append(close(session))
        one = await stand.play()
        assert (one.id, one.task, one.seed, one.end, one.reward) == ("quiz-3-0", "quiz", 3, EndReason.DONE, 1.5)
        assert [turn.completion for turn in one.turns] == [turn.completion for turn in closed[0]]
        assert [turn.prompt for turn in one.turns] == [turn.prompt for turn in closed[0]]
        assert [one.prompt(i) for i in range(3)] == [asked for asked, _, _ in stand.generator.asked]
        assert one.first_version == 5
        assert sum(sum(row.trained) for row in rows(one)) == sum(len(turn.completion.ids) for turn in one.turns)
        assert [turn.info["left"] for turn in one.turns] == [2, 1, 0]
        assert from_json(Trajectory, to_json(one)) == one
        stand.assert_nothing_is_left()

    harness.run(main)


def whole():
    async def main():
        return await Stand().play()
    return harness.run(main)


@pytest.mark.parametrize("part", range(4))
def test_a_rollout_called_back_at_any_moment_goes_on_as_if_nothing_had_been(part):
    """Invariant 4: called back again and again, each time after so and so long, it ends as it would have without."""
    expected = whole()

    async def main(after):
        so_far, lives = None, 0
        while so_far is None or so_far.end is EndReason.ABORTED:
            stand, called_back = Stand(), asyncio.Event()
            lives += 1
            asyncio.get_running_loop().call_later(after * lives, called_back.set)
            before = len(so_far.turns) if so_far else 0
            so_far = from_json(Trajectory, to_json(await stand.play(so_far=so_far, called_back=called_back)))
            stand.assert_nothing_is_left()
            assert len(so_far.turns) >= before and so_far.failure is None
        assert so_far == expected
        return lives

    lives = [harness.run(lambda: main(0.03 + 0.11 * number), seed=number) for number in range(part, 40, 4)]
    assert max(lives) > 2


@pytest.mark.parametrize("part", range(4))
def test_a_rollout_whose_engine_is_lost_at_any_moment_goes_on_from_its_tokens(part):
    """Invariant 4: it ends as it would have without. It fails where the engine gave nothing at all."""
    expected = whole()

    async def main(after):
        so_far, found, lives = None, None, 0
        while found is None or not found.end.complete:
            stand, lives = Stand(), lives + 1
            asyncio.get_running_loop().call_later(after * lives, setattr, stand.generator, "error", EngineLost("w3"))
            found = from_json(Trajectory, to_json(await stand.play(so_far=so_far)))
            stand.assert_nothing_is_left()
            before = so_far.sampled if so_far else ()
            assert found.sampled[:len(before)] == before
            if found.failure:
                assert found.failure.reason is FailureReason.WORKER and found.sampled == before
            else:
                assert len(found.sampled) > len(before)
                so_far = found
        assert found == expected
        return lives

    lives = [harness.run(lambda: main(0.03 + 0.11 * number), seed=number) for number in range(part, 40, 4)]
    assert max(lives) > 2


def test_tokens_of_other_weights_follow_those_of_the_first():
    """Invariant 8: versions never decrease, and a completion may have several."""
    async def main():
        so_far = None
        for version in range(3, 9):
            stand, called_back = Stand(version=version), asyncio.Event()
            asyncio.get_running_loop().call_later(0.9, called_back.set)
            so_far = await stand.play(so_far=so_far, called_back=called_back)
        versions = [version for turn in so_far.turns for version in turn.completion.versions]
        assert versions == sorted(versions) and len(set(versions)) == 6
        assert any(len(set(turn.completion.versions)) > 1 for turn in so_far.turns)

    harness.run(main)


def test_called_back_before_it_began():
    async def main():
        stand, called_back = Stand(), asyncio.Event()
        called_back.set()
        one = await stand.play(called_back=called_back)
        assert (one.end, one.turns) == (EndReason.ABORTED, ())
        assert stand.env.calls == ["reset", "close"] and stand.generator.asked == []

    harness.run(main)


@pytest.mark.parametrize("after", [0.1, 0.25, 0.7, 1.9])
def test_a_cancellation_closes_environment_and_session(after):
    async def main():
        stand = Stand()
        task = asyncio.create_task(stand.play())
        await asyncio.sleep(after)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stand.assert_nothing_is_left()

    harness.run(main)


def raising(error):
    def call():
        raise error
    return call


FAILURES = {
    "reset": ({"reset": raising(OSError("no disk"))}, None, "environment", "reset", "OSError: no disk", 0),
    "step": ({"step": raising(KeyError("x"))}, None, "environment", "step", "KeyError", 1),
    "late": ({"step": raising(TimeoutError())}, None, "timeout", "step", "TimeoutError", 1),
    "worker": ({"step": raising(WorkerLost("gone"))}, None, "worker", "step", "WorkerLost: gone", 1),
    "close": ({"close": raising(OSError("busy"))}, None, "environment", "close", "OSError: busy", 3),
    "messages": ({"reset": lambda: Start(({"role": "king", "content": "Hear!"},))}, None, "environment", "generate",
                 "ChatError", 0),
    "engine": ({}, EngineLost("w3"), "worker", "generate", "EngineLost: w3", 0),
    "overloaded": ({}, Overloaded("full"), "engine", "generate", "Overloaded: full", 0),
}


@pytest.mark.parametrize("broken, error, reason, place, detail, turns", FAILURES.values(), ids=FAILURES)
def test_what_fails_is_the_failure_of_the_rollout(broken, error, reason, place, detail, turns):
    async def main():
        stand = Stand()
        stand.env, stand.generator.error = Quiz(**broken), error
        one = await stand.play()
        assert one.end is EndReason.FAILED and one.reward is None and len(one.turns) == turns
        assert (one.failure.reason, one.failure.place) == (FailureReason(reason), place)
        assert detail in one.failure.detail
        assert stand.env.calls[-1] == "close" and stand.gateway.running == 0

    harness.run(main)


def test_a_session_that_is_taken():
    async def main():
        stand = Stand()
        stand.gateway.open("quiz-3-0")
        one = await stand.play()
        assert one.failure.reason is FailureReason.ENGINE and "expected a name that is free" in one.failure.detail
        assert stand.gateway.turns("quiz-3-0") == ()  # still its owner's

    harness.run(main)


def test_a_reply_that_takes_too_long():
    async def main():
        stand = Stand()
        stand.generator.gate.clear()
        one = await stand.play(reply_s=30.0)
        assert (one.failure.reason, one.failure.place) == (FailureReason.TIMEOUT, "generate")
        assert asyncio.get_running_loop().time() == pytest.approx(30.4, abs=0.01)
        stand.assert_nothing_is_left()

    harness.run(main)


def test_a_prompt_that_leaves_no_room_ends_the_rollout_at_its_limit():
    async def main():
        stand = Stand(max_len=150)
        one = await stand.play(seed=20)
        assert one.end is EndReason.TOKENS and one.failure is None and 2 < len(one.turns) < 20
        assert one.reward == 0.5 * len(one.turns)

    assert issubclass(RequestTooLong, ValueError)
    harness.run(main)


def test_limits_are_those_of_an_episode():
    async def main():
        one = await Stand().play(limits=Limits(turns=2))
        assert (one.end, len(one.turns)) == (EndReason.TURNS, 2)
        one = await Stand().play(limits=Limits(wall_s=1.5))
        assert (one.end, len(one.turns)) == (EndReason.TIME, 1)

    harness.run(main)


def half(stand):
    """A rollout with the beginning of its second reply."""
    async def main():
        event = asyncio.Event()
        asyncio.get_running_loop().call_later(2.0, event.set)
        return await stand.play(called_back=event)

    one = harness.run(main)
    assert one.turns[-1].completion.stop is StopReason.ABORT and one.turns[-1].completion.ids
    return one


def test_tokens_are_not_gone_on_with_behind_another_prompt():
    so_far = half(Stand())

    async def main():
        stand = Stand()
        one = await stand.play(so_far=so_far, options=Options(thinking=False))
        assert one.failure.reason is FailureReason.ENGINE and one.turns == so_far.turns
        assert f"turn {len(so_far.turns) - 1}: expected the prompt that its first" in one.failure.detail
        stand.assert_nothing_is_left()

    harness.run(main)


def test_a_call_that_misses_its_call_back_is_called_again():
    """As when the message overtakes the call on its way to an engine elsewhere."""
    async def main():
        stand, called_back, aborts = Stand(), asyncio.Event(), []
        abort = stand.generator.abort

        def lossy(session):
            aborts.append(session)
            if len(aborts) > 1:
                abort(session)

        stand.generator.abort = lossy
        stand.generator.gate.clear()
        asyncio.get_running_loop().call_later(5.0, called_back.set)
        one = await stand.play(called_back=called_back)
        assert one.end is EndReason.ABORTED and len(aborts) >= 2
        stand.assert_nothing_is_left()

    harness.run(main)


def test_environments_play_in_threads_one_call_at_a_time():
    """A call that was begun is waited for, also where the rollout is cancelled: only then is the environment closed."""
    inside, go_on, log = threading.Event(), threading.Event(), []

    class Blocking(Quiz):
        def reset(self, seed):
            inside.set()
            go_on.wait()
            log.append("reset ends")
            return super().reset(seed)

        def close(self):
            log.append("close")

    async def main():
        stand = Stand()
        stand.env = Blocking()
        task = asyncio.create_task(stand.play(run=threads))
        await asyncio.to_thread(inside.wait)
        task.cancel()
        asyncio.get_running_loop().call_soon(go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert log == ["reset ends", "close"]


def test_a_hundred_calls_block_at_once():
    """More than the pool of threads that a loop has of its own."""
    begun, go_on = [], threading.Event()

    def block():
        begun.append(None)
        assert go_on.wait(60)

    async def many():
        calls = [asyncio.create_task(threads(block)) for _ in range(100)]
        while len(begun) < 100:
            await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(*calls)

    asyncio.run(asyncio.wait_for(many(), 60))
