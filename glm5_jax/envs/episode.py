"""One episode of one environment against one generator, and the trajectory that it leaves."""

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from glm5_jax.envs.base import Environment, Failed, Limits, Start, Step
from glm5_jax.envs.context import Count, Policy, Round, keep_all
from glm5_jax.records import (
    Completion, EndReason, Failure, FailureReason, Message, StopReason, Trajectory, extend)


@dataclasses.dataclass(frozen=True)
class Reply:
    """A message together with the tokens it is made of, from generators that know them."""

    message: Message
    prompt: Sequence[int] = ()  # all ids that the engine was given
    completion: Completion | None = None


Generate = Callable[[Sequence[Message], Sequence[Message]], Message | Reply]


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
    if limits.tokens is not None and count is None:
        raise ValueError("limits.tokens: expected a `count` of the tokens of messages beside it, found none")
    played = _Played(Trajectory(id or f"{task}-{seed}", task, seed, (), EndReason.ABORTED))
    failure = None
    try:
        end = _play(played, env, generate, limits, context, count, clock)
    except Failed as failed:
        failure = failed.failure
    finally:
        try:
            env.close()
        except Exception as error:
            failure = failure or Failure.of(FailureReason.ENVIRONMENT, "close", error)
    return dataclasses.replace(played.trajectory, end=EndReason.FAILED if failure else end, failure=failure)


@dataclasses.dataclass
class _Played:
    """The episode so far: a trajectory that still waits for its end."""

    trajectory: Trajectory

    def update(self, reason: FailureReason, place: str, **fields: Any) -> None:
        self.trajectory = _blame(reason, place, dataclasses.replace, self.trajectory, **fields)


def _play(played: _Played, env: Environment, generate: Generate, limits: Limits, context: Policy, count: Count | None,
          clock: Callable[[], float]) -> EndReason:
    started = clock()
    start = _blame(FailureReason.ENVIRONMENT, "reset", lambda: Start(*env.reset(played.trajectory.seed)))
    played.update(FailureReason.ENVIRONMENT, "reset", observations=start.messages, tools=start.tools)
    question, tools = played.trajectory.observations, played.trajectory.tools
    rounds: tuple[Round, ...] = ()
    while True:
        turns = played.trajectory.turns
        if limits.turns is not None and len(turns) >= limits.turns:
            return EndReason.TURNS
        if limits.wall_s is not None and clock() - started >= limits.wall_s:
            return EndReason.TIME
        view = context(question, rounds)
        if limits.tokens is not None and count is not None and count(view.messages) > limits.tokens:
            return EndReason.TOKENS

        # Copies go out: a generator or environment that edits what it was given must not edit the record.
        reply = _blame(FailureReason.ENGINE, "generate", generate, *copy.deepcopy((view.messages, tools)))
        reply = reply if isinstance(reply, Reply) else Reply(reply)
        turn = _blame(FailureReason.ENGINE, "generate", extend, turns, view.messages, reply.message,
                      prompt=reply.prompt, completion=reply.completion)
        played.update(FailureReason.ENGINE, "generate", turns=(*turns, turn), observations=())
        if turn.completion is not None and turn.completion.stop is StopReason.ABORT:
            return EndReason.ABORTED

        step = _blame(FailureReason.ENVIRONMENT, "step", lambda: Step(*env.step(copy.deepcopy(turn.reply))))
        turn = _blame(FailureReason.ENVIRONMENT, "step", dataclasses.replace, turn, reward=step.reward, info=step.info)
        played.update(FailureReason.ENVIRONMENT, "step", turns=(*turns, turn), observations=step.messages)
        if step.done:
            return EndReason.DONE
        rounds = (*view.rounds, Round(turn.reply, played.trajectory.observations))


def _blame(reason: FailureReason, place: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What `function` returns; what it raises becomes a failure, for this reason where it does not name its own."""
    try:
        return function(*args, **options)
    except Failed:
        raise
    except Exception as error:
        reason = FailureReason.TIMEOUT if isinstance(error, TimeoutError) else reason
        raise Failed(Failure.of(reason, place, error)) from error
