"""One rollout of an environment through a session of the gateway: what the agent saw is what is trained on."""

import asyncio
import dataclasses
import functools
from collections.abc import Awaitable, Callable
from typing import Any

from glm5_jax.envs.base import Environment, Failed, Limits
from glm5_jax.envs.context import Count, Policy, keep_all
from glm5_jax.envs.episode import Act, Ask, CalledBack, OutOfRoom, Reply, episode
from glm5_jax.infer.request import RequestTooLong
from glm5_jax.records import Completion, Failure, FailureReason, StopReason, Trajectory, Turn
from glm5_jax.rl.executors import Threads, WorkerLost
from glm5_jax.serve.gateway import Gateway, Options, Stream
from glm5_jax.serve.generator import EngineLost
from glm5_jax.text.template import ChatError

AGAIN_S = 1.0
Run = Callable[..., Awaitable[Any]]  # run(function, *args): what `function(*args)` returns or raises


async def threads(function: Callable[..., Any], *args: Any) -> Any:
    """In a thread of its own, however many others there are. A call that was begun is waited for, also where this is
    cancelled: one thread at a time plays."""
    call = asyncio.ensure_future(Threads(1).run(function, *args))
    try:
        return await asyncio.shield(call)
    finally:
        await asyncio.wait([call])


async def at_once(function: Callable[..., Any], *args: Any) -> Any:
    """On the event loop itself, for environments that answer within microseconds."""
    return function(*args)


async def play(
    env: Environment, gateway: Gateway, *, task: str, seed: int, id: str, so_far: Trajectory | None = None,
    called_back: asyncio.Event | None = None, options: Options = Options(), limits: Limits = Limits(),
    context: Policy = keep_all, count: Count | None = None, run: Run = threads, reply_s: float | None = None,
) -> Trajectory:
    """Plays `env` as `envs.episode.run_episode` does, in the gateway's session `id`, or goes on from `so_far`.

    Calls of the environment are made by `run`; a reply may take `reply_s` seconds. Once `called_back` is set, the
    episode ends as aborted, at once with the tokens it has, or after the call of the environment that is under way. So
    it does where its engine is lost: no token that had come is drawn again. A prompt too long for the engine ends it at
    its token limit. What fails is the trajectory's failure: ENGINE what comes from the gateway, ENVIRONMENT messages
    that cannot be rendered, WORKER a worker that was lost, or an engine before anything new had come, TIMEOUT what was
    late. A cancellation closes environment and session, and passes.
    """
    called_back = called_back or asyncio.Event()
    talk = _Talk(gateway, id, so_far, called_back, options, reply_s)
    requests = episode(env, task=task, seed=seed, id=id, limits=limits, context=context, count=count,
                       clock=asyncio.get_running_loop().time, so_far=so_far)
    go_on: Callable[[], Act | Ask] = functools.partial(next, requests)
    try:
        while True:
            try:
                request = go_on()
            except StopIteration as ended:
                return ended.value
            try:
                answer = await (_act(run, request) if isinstance(request, Act) else talk.reply(request))
            except (Exception, asyncio.CancelledError) as error:
                go_on = functools.partial(requests.throw, error)
            else:
                go_on = functools.partial(requests.send, answer)
    finally:
        talk.close()


async def _act(run: Run, request: Act) -> Any:
    try:
        return await run(request.function, *request.args)
    except WorkerLost as error:
        raise Failed(Failure.of(FailureReason.WORKER, request.place, error)) from error


@dataclasses.dataclass
class _Talk:
    """The rollout's side of its session, which is opened for the first reply."""

    gateway: Gateway
    session: str
    so_far: Trajectory | None
    called_back: asyncio.Event
    options: Options
    reply_s: float | None
    opened: bool = False
    answered: bool = False  # at least once

    async def reply(self, ask: Ask) -> Reply:
        if self.called_back.is_set():
            raise CalledBack
        try:
            stream = self._stream(ask)
        except RequestTooLong as error:
            raise OutOfRoom from error
        except ChatError as error:
            raise Failed(Failure.of(FailureReason.ENVIRONMENT, "generate", error)) from error
        watch = asyncio.ensure_future(self._watch())
        try:
            async with stream, asyncio.timeout(self.reply_s):
                self._require_same(ask, stream.prompt)
                answer = await stream.answer()
        except EngineLost as error:
            return self._kept(ask, stream.prompt, error)
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        if answer.completion.stop is StopReason.ABORT and not answer.completion.ids:
            raise CalledBack  # nothing came of it
        self.answered = True
        return Reply(answer.reply, answer.prompt, answer.completion)

    def _stream(self, ask: Ask) -> Stream:
        if not self.opened:
            turns = self.so_far.turns if self.so_far else ()
            self.gateway.open(self.session, turns=turns[:-1] if ask.so_far else turns)
            self.opened = True
        return self.gateway.chat(self.session, ask.messages, ask.tools, self.options, resume=ask.so_far)

    def _kept(self, ask: Ask, prompt: tuple[int, ...], error: EngineLost) -> Reply:
        """What had come of a reply whose engine was lost; where that is nothing, the episode ends with its replies, or
        fails for want of any, so that it is not begun again without end."""
        known = len(ask.so_far.ids) if ask.so_far else 0
        match self.gateway.turns(self.session)[-1:]:
            case [Turn(completion=Completion(stop=StopReason.ABORT) as drawn) as turn] if len(drawn.ids) > known:
                return Reply(turn.reply, prompt, drawn)
        if self.answered:
            raise CalledBack from error
        raise Failed(Failure.of(FailureReason.WORKER, "generate", error)) from error

    def _require_same(self, ask: Ask, prompt: tuple[int, ...]) -> None:
        """Tokens are gone on with behind the prompt that they were sampled from, or not at all."""
        if ask.so_far and self.so_far and prompt != self.so_far.prompt(ask.turn):
            raise ValueError(f"turn {ask.turn}: expected the prompt that its first {len(ask.so_far.ids)} tokens were "
                             f"sampled from, found another one: were tokenizer, template or options changed?")

    async def _watch(self) -> None:
        await self.called_back.wait()
        while True:  # a call that has not reached its engine yet may miss it
            self.gateway.abort(self.session)
            await asyncio.sleep(AGAIN_S)

    def close(self) -> None:
        if self.opened:
            self.gateway.close(self.session)
