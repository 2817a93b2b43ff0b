"""One episode of one environment against one generator, and the trajectory that it leaves.

`episode` is the logic alone: a generator of requests, to the environment (`Act`) and to the model (`Ask`), answered by
whoever drives it. `run_episode` drives it by plain calls.
"""

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from glm5_jax.envs.base import Environment, Failed, Limits, Start, Step
from glm5_jax.envs.context import Count, Policy, Round, keep_all
from glm5_jax.records import (
    Completion, EndReason, Failure, FailureReason, Message, StopReason, Trajectory, Turn, extend)


@dataclasses.dataclass(frozen=True)
class Reply:
    """A message together with the tokens it is made of, from generators that know them."""

    message: Message
    prompt: Sequence[int] = ()  # all ids that the engine was given
    completion: Completion | None = None


@dataclasses.dataclass(frozen=True)
class Act:
    """Asks for what `function(*args)`, a call of the environment, returns or raises."""

    place: str  # reset, step or close
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ask:
    """Asks for a reply of the model: a `Reply`, or a message alone."""

    messages: tuple[Message, ...]
    tools: tuple[Message, ...]
    turn: int  # its index in the trajectory
    so_far: Completion | None = None  # of a reply that was called back: the new one goes on from it and contains it


class CalledBack(Exception):
    """Answers an `Ask` where the scheduler called the episode back: it ends as aborted, with what it has."""


class OutOfRoom(Exception):
    """Answers an `Ask` whose messages leave no room for a reply: the episode ends at its token limit."""


Generate = Callable[[Sequence[Message], Sequence[Message]], Message | Reply]
Requests = Generator[Act | Ask, Any, Any]


def run_episode(
    env: Environment, generate: Generate, *, task: str, seed: int, id: str | None = None, limits: Limits = Limits(),
    context: Policy = keep_all, count: Count | None = None, clock: Callable[[], float] = time.monotonic,
) -> Trajectory:
    """Plays `env` from `seed` with the replies of `generate(messages, tools)` until it is done or cut off.

    `context` chooses the messages of each call; the same tuple is sent and recorded. `count` gives the tokens of a list
    of messages, and is needed for a token limit. `clock` gives seconds. `id` is `task-seed` where none is given. A
    completion that was called back ends the episode as aborted.

    An exception in the environment or the generator, or a breach of their protocol, ends the episode as a `Failure`
    behind the turns so far; `Failed` brings its own. `env.close` is called in any case. Raises ValueError for a token
    limit without `count`, and passes on what `context`, `count` and `clock` raise.
    """
    requests = episode(env, task=task, seed=seed, id=id, limits=limits, context=context, count=count, clock=clock)
    go_on: Callable[[], Act | Ask] = functools.partial(next, requests)
    while True:
        try:
            request = go_on()
        except StopIteration as ended:
            return ended.value
        try:
            answer = (request.function(*request.args) if isinstance(request, Act)
                      else generate(request.messages, request.tools))
        except BaseException as error:
            go_on = functools.partial(requests.throw, error)
        else:
            go_on = functools.partial(requests.send, answer)


def episode(
    env: Environment, *, task: str, seed: int, id: str | None = None, limits: Limits = Limits(),
    context: Policy = keep_all, count: Count | None = None, clock: Callable[[], float] = time.monotonic,
    so_far: Trajectory | None = None,
) -> Generator[Act | Ask, Any, Trajectory]:
    """The requests of an episode as of `run_episode`; its return value is the trajectory.

    Each request is answered by `send`, or by `throw` with what was raised meanwhile. The last one is always
    `env.close`, also after an exception that is passed on, such as a cancellation.

    `so_far` is an aborted trajectory of the same episode to go on from: the environment is reset and given the recorded
    replies again, and has to answer as it did; where it does not, the episode has failed, as a whole and with what was
    recorded. A reply that had been called back is asked for with its completion. A time limit begins anew.
    """
    if limits.tokens is not None and count is None:
        raise ValueError("limits.tokens: expected a `count` of the tokens of messages beside it, found none")
    fresh = Trajectory(id or f"{task}-{seed}", task, seed, (), EndReason.ABORTED)
    if so_far is not None and (so_far.task, so_far.seed, so_far.end) != (task, seed, EndReason.ABORTED):
        raise ValueError(f"so_far: expected an aborted trajectory of {task!r} and seed {seed}, found one of "
                         f"{so_far.task!r} and {so_far.seed} that ended with {so_far.end.value!r}")
    played = _Played(fresh if so_far is None else so_far)
    end, failure, passed_on = EndReason.ABORTED, None, None
    try:
        end = yield from _play(played, env, limits, context, count, clock)
    except CalledBack:
        end = EndReason.ABORTED
    except OutOfRoom:
        end = EndReason.TOKENS
    except Failed as failed:
        failure = failed.failure
    except GeneratorExit:  # nobody is left to close it
        raise
    except BaseException as error:
        passed_on = error
    try:
        yield Act("close", env.close)
    except Exception as error:
        failure = failure or Failure.of(FailureReason.ENVIRONMENT, "close", error)
    if passed_on is not None:
        raise passed_on
    return dataclasses.replace(played.trajectory, end=EndReason.FAILED if failure else end, failure=failure)


@dataclasses.dataclass
class _Played:
    """The episode so far: a trajectory that still waits for its end."""

    trajectory: Trajectory

    def update(self, reason: FailureReason, place: str, **fields: Any) -> None:
        self.trajectory = _blame(reason, place, dataclasses.replace, self.trajectory, **fields)


def _play(played: _Played, env: Environment, limits: Limits, context: Policy, count: Count | None,
          clock: Callable[[], float]) -> Generator[Act | Ask, Any, EndReason]:
    started = clock()
    record = played.trajectory
    raw = yield from _request(FailureReason.ENVIRONMENT, Act("reset", env.reset, (record.seed,)))
    start = _blame(FailureReason.ENVIRONMENT, "reset", lambda: Start(*raw))
    first = _blame(FailureReason.ENVIRONMENT, "reset", dataclasses.replace, record, turns=(),
                   observations=start.messages, tools=start.tools)
    question, tools = first.observations, first.tools
    if record.turns:
        _same("reset", "tools", record.tools, tools)
    else:
        played.trajectory = first
    rounds: tuple[Round, ...] = ()
    turns: tuple[Turn, ...] = ()  # those behind us; the trajectory has what is recorded of later ones too
    while True:
        index = len(turns)
        recorded = record.turns[index] if index < len(record.turns) else None
        if recorded is None:
            if limits.turns is not None and index >= limits.turns:
                return EndReason.TURNS
            if limits.wall_s is not None and clock() - started >= limits.wall_s:
                return EndReason.TIME
        view = context(question, rounds)
        if recorded is not None:
            _same("step" if turns else "reset", f"messages of turn {index}", record.sent(index), view.messages)
        elif limits.tokens is not None and count is not None and count(view.messages) > limits.tokens:
            return EndReason.TOKENS

        if recorded is not None and not _called_back(recorded):
            turn = recorded
        else:
            # Copies go out: a generator or environment that edits what it was given must not edit the record.
            messages, definitions = copy.deepcopy((tuple(view.messages), tools))
            reply = yield from _request(FailureReason.ENGINE, Ask(
                messages, definitions, index, recorded.completion if recorded else None))
            reply = reply if isinstance(reply, Reply) else Reply(reply)
            turn = _blame(FailureReason.ENGINE, "generate", extend, turns, view.messages, reply.message,
                          prompt=reply.prompt, completion=reply.completion)
            played.update(FailureReason.ENGINE, "generate", turns=(*turns, turn), observations=())
            recorded = None
            if _called_back(turn):
                return EndReason.ABORTED

        raw = yield from _request(FailureReason.ENVIRONMENT, Act("step", env.step, (copy.deepcopy(turn.reply),)))
        step = _blame(FailureReason.ENVIRONMENT, "step", lambda: Step(*raw))
        turn = _blame(FailureReason.ENVIRONMENT, "step", dataclasses.replace, turn, reward=step.reward, info=step.info)
        after = _blame(FailureReason.ENVIRONMENT, "step", dataclasses.replace, played.trajectory,
                       observations=step.messages)
        if recorded is None:
            played.trajectory = dataclasses.replace(after, turns=(*turns, turn))
        else:
            _same("step", f"reward of turn {index}", recorded.reward, turn.reward)
            _same("step", f"done after turn {index}", False, step.done)
            if index + 1 == len(record.turns):
                _same("step", "observations", record.observations, after.observations)
        if step.done:
            return EndReason.DONE
        turns = (*turns, turn if recorded is None else recorded)
        rounds = (*view.rounds, Round(turn.reply, after.observations))


def _called_back(turn: Turn) -> bool:
    return turn.completion is not None and turn.completion.stop is StopReason.ABORT


def _same(place: str, what: str, recorded: Any, found: Any) -> None:
    """An environment that is played again has to answer as it did."""
    if recorded != found:
        raise Failed(Failure(FailureReason.ENVIRONMENT, place, f"played again: {what}: expected {recorded!r} as "
                                                               f"recorded, found {found!r}"))


def _request(reason: FailureReason, request: Act | Ask) -> Requests:
    """The answer to a request; what it raises becomes a failure, but for what is none."""
    try:
        return (yield request)
    except (Failed, CalledBack, OutOfRoom):
        raise
    except Exception as error:
        place = request.place if isinstance(request, Act) else "generate"
        raise _failed(reason, place, error) from error


def _blame(reason: FailureReason, place: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What `function` returns; what it raises becomes a failure."""
    try:
        return function(*args, **options)
    except Exception as error:
        raise _failed(reason, place, error) from error


def _failed(reason: FailureReason, place: str, error: Exception) -> Failed:
    """For this reason where the error does not say its own."""
    return Failed(Failure.of(FailureReason.TIMEOUT if isinstance(error, TimeoutError) else reason, place, error))
