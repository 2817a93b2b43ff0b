"""What a rollout leaves behind: turns, completions, trajectories, groups, why each ended and what went wrong.

Records are frozen and checked when built: a field of the wrong type or value raises TypeError or ValueError naming it.
Any iterable serves as a tuple and any number type as its Python counterpart, so that arrays can be passed as they are.
`to_json` and `from_json` keep every record exactly, floats included.
"""

import dataclasses
import enum
import json
import math
import operator
from collections.abc import Callable, Iterable, Sequence

from glm5_jax.records.fields import Message, Record, from_json, to_json

__all__ = ["Completion", "EndReason", "Failure", "FailureReason", "Group", "Message", "PolicyVersion", "StopReason",
           "Trajectory", "Turn", "extend", "from_json", "to_json"]


class StopReason(enum.StrEnum):
    """Why the engine stopped sampling a completion.

    >>> StopReason("length") is StopReason.LENGTH
    True
    """

    STOP = "stop"  # a stop id or stop string, the former being the last id
    LENGTH = "length"  # the token limit or the end of the context
    ABORT = "abort"  # called back by the scheduler; may be resumed


class EndReason(enum.StrEnum):
    """Why an episode ended.

    >>> [reason.value for reason in EndReason if reason.complete]
    ['done', 'turns', 'tokens', 'time']
    """

    DONE = "done"  # the environment said so
    TURNS = "turns"  # this and the next two: a limit
    TOKENS = "tokens"
    TIME = "time"
    ABORTED = "aborted"  # called back by the scheduler; may be resumed
    FAILED = "failed"  # see the trajectory's failure

    @property
    def complete(self) -> bool:
        """Whether the episode ran to an end that has a reward: its own, or a limit's."""
        return self not in (EndReason.ABORTED, EndReason.FAILED)


class FailureReason(enum.StrEnum):
    """What failed around the model; a bad answer is no failure.

    >>> FailureReason.WORKER.value
    'worker'
    """

    ENVIRONMENT = "environment"  # it raised, or broke its protocol
    ENGINE = "engine"  # no reply came from the generator, or something that is none
    REWARD = "reward"  # the reward could not be computed
    TIMEOUT = "timeout"  # a part did not answer in its time
    WORKER = "worker"  # the process or host that ran it was lost


@dataclasses.dataclass(frozen=True)
class PolicyVersion(Record):
    """One set of weights handed to the engine; tokens are stamped with its number.

    >>> PolicyVersion(number=3, step=12, checksum="9f86d081")
    PolicyVersion(number=3, step=12, checksum='9f86d081')
    """

    number: int  # 0 is the start, each push adds at least one
    step: int  # optimiser steps taken
    checksum: str = ""  # of the weights, empty where nobody asked for it

    def validate(self) -> None:
        self.require(self.number >= 0, "number", "0 or more", self.number)
        self.require(self.step >= 0, "step", "0 or more", self.step)


@dataclasses.dataclass(frozen=True)
class Failure(Record):
    """What went wrong, where, and in which words.

    >>> Failure.of(FailureReason.ENVIRONMENT, "step", OSError("disk full"))
    Failure(reason=<FailureReason.ENVIRONMENT: 'environment'>, place='step', detail='OSError: disk full')
    """

    reason: FailureReason
    place: str  # the call that failed: reset, generate, step, close, reward, or the name of a worker
    detail: str = ""  # for people

    @classmethod
    def of(cls, reason: FailureReason, place: str, error: BaseException) -> "Failure":
        return cls(reason, place, f"{type(error).__name__}: {error}")


@dataclasses.dataclass(frozen=True)
class Completion(Record):
    """Sampled ids, each with its log-probability and the version of the policy that sampled it, as the engine stamped
    them; the three have one length.

    >>> part = Completion(ids=(7, 9), logprobs=(-0.5, -0.25), versions=(3, 3), stop="abort")
    >>> whole = part + Completion(ids=(2,), logprobs=(-0.125,), versions=(4,), stop="stop")
    >>> whole.ids, whole.versions, whole.stop.value
    ((7, 9, 2), (3, 3, 4), 'stop')
    """

    ids: tuple[int, ...]  # the stop id included
    logprobs: tuple[float, ...]  # natural, finite, at most 0
    versions: tuple[int, ...]  # never decreasing: weights change under a completion, but only forwards
    stop: StopReason

    def validate(self) -> None:
        for name in ("logprobs", "versions"):
            self.require(len(getattr(self, name)) == len(self.ids), name, f"{len(self.ids)} values, one for each id",
                         len(getattr(self, name)))
        self.require_each("ids", _natural, "0 or more")
        self.require_each("logprobs", lambda value: value <= 0, "at most 0")
        self.require_each("versions", _natural, "0 or more")
        self.require(all(map(operator.le, self.versions, self.versions[1:])), "versions", "none below the one before",
                     self.versions)

    def __add__(self, rest: "Completion") -> "Completion":
        """The whole of an aborted completion and what was sampled after it was resumed."""
        self.require(self.stop is StopReason.ABORT, "stop", "'abort' in a completion that is resumed", self.stop.value)
        return Completion(self.ids + rest.ids, self.logprobs + rest.logprobs, self.versions + rest.versions, rest.stop)


@dataclasses.dataclass(frozen=True)
class Turn(Record):
    """One call of the model: what was sent, and what came back.

    `messages` and `prompt` hold only what is new since the turn that this one `extends`; `Trajectory.sent` and
    `Trajectory.prompt` give the whole. A turn that extends none starts a context of its own: the first turn, or a fork.
    The messages belong to the record; they are copied in and are not to be changed.

    >>> question = {"role": "user", "content": "1 + 1?"}
    >>> Turn(messages=[question], reply={"role": "assistant", "content": "2"}, reward=1).messages[0]["content"]
    '1 + 1?'
    """

    messages: tuple[Message, ...]  # what is new of those sent
    reply: Message  # of role assistant
    prompt: tuple[int, ...] = ()  # what is new of the ids sent, empty where the generator gave no tokens
    completion: Completion | None = None  # the sampled ids that `reply` was read from, None where it gave none
    extends: int | None = None  # index of an earlier turn of the trajectory
    reward: float = 0.0  # what the environment gave for this reply; outcome rewards stand in the last turn
    info: Message = dataclasses.field(default_factory=dict)  # what else the environment said about this reply

    def validate(self) -> None:
        self.require(self.reply.get("role") == "assistant", "reply", "a message of role 'assistant'", self.reply)
        self.require_each("messages", _has_role, "a message with a role")
        self.require_each("prompt", _natural, "0 or more")
        self.require(self.completion is not None or not self.prompt, "prompt", "no ids where there is no completion",
                     self.prompt)
        self.require(self.extends is None or self.extends >= 0, "extends", "None or 0 or more", self.extends)


@dataclasses.dataclass(frozen=True)
class Trajectory(Record):
    """One episode: its turns in the order of the calls, why it ended, and what failed if something did.

    >>> question, answer = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
    >>> turn = Turn([question], answer, prompt=(5, 6), completion=Completion((7,), (-0.5,), (3,), "stop"), reward=1)
    >>> one = Trajectory(id="sums-17-0", task="sums", seed=17, turns=[turn], end="done")
    >>> one.reward, one.first_version, one.sampled
    (1.0, 3, (7,))
    >>> again = extend(one.turns, [question, answer, {"role": "user", "content": "Sure?"}], answer,
    ...                prompt=(5, 6, 7, 8), completion=Completion((7,), (-0.25,), (4,), "stop"))
    >>> again.extends, again.prompt
    (0, (8,))
    >>> two = dataclasses.replace(one, turns=[turn, again])
    >>> two.prompt(1), len(two.sent(1)), from_json(Trajectory, to_json(two)) == two
    ((5, 6, 7, 8), 3, True)
    """

    id: str  # one of its own for each rollout
    task: str  # which environment
    seed: int  # the environment's: the same task and seed are the same problem
    turns: tuple[Turn, ...]
    end: EndReason
    failure: Failure | None = None  # there exactly if `end` is FAILED
    tools: tuple[Message, ...] = ()  # their JSON-schema definitions, the same in all turns
    observations: tuple[Message, ...] = ()  # what the environment said last, sent to nobody

    def validate(self) -> None:
        self.require(bool(self.id), "id", "a name", self.id)
        self.require(self.seed >= 0, "seed", "0 or more", self.seed)
        self.require((self.end is EndReason.FAILED) == (self.failure is not None), "failure",
                     f"{'a failure' if self.end is EndReason.FAILED else 'none'} where end is '{self.end}'",
                     self.failure)
        self.require_each("observations", _has_role, "a message with a role")
        newest: list[int] = []  # version of each turn's context; calls that overlap end in any order
        for i, turn in enumerate(self.turns):
            newest.append(0)
            if turn.extends is not None:
                self.require(turn.extends < i, f"turns[{i}].extends", "an earlier turn", turn.extends)
                parent = self.turns[turn.extends]
                self.require((turn.completion is None) == (parent.completion is None), f"turns[{i}].completion",
                             f"tokens in both or neither of turns {turn.extends} and {i}", turn.completion)
                newest[i] = newest[turn.extends]
            if turn.completion is not None and turn.completion.versions:
                first = turn.completion.versions[0]
                self.require(first >= newest[i], f"turns[{i}].completion.versions",
                             f"at least {newest[i]}, sampled before it in its context", first)
                newest[i] = turn.completion.versions[-1]

    @property
    def reward(self) -> float | None:
        """The sum over all turns; None for a failed or aborted episode, which has earned none yet."""
        return math.fsum(turn.reward for turn in self.turns) if self.end.complete else None

    @property
    def first_version(self) -> int | None:
        """The oldest policy version of a sampled token, by which staleness is measured; None without tokens."""
        stamped = (turn.completion.versions for turn in self.turns if turn.completion and turn.completion.versions)
        return min((versions[0] for versions in stamped), default=None)

    @property
    def sampled(self) -> tuple[int, ...]:
        """All sampled ids, turn after turn."""
        return tuple(id for turn in self.turns if turn.completion for id in turn.completion.ids)

    def sent(self, index: int) -> tuple[Message, ...]:
        """All messages that were sent in turn `index`."""
        return _sent(self.turns, index)

    def prompt(self, index: int) -> tuple[int, ...]:
        """All ids that were sent in turn `index`."""
        return _prompt(self.turns, index)


@dataclasses.dataclass(frozen=True)
class Group(Record):
    """The trajectories of one problem, and which of them count again in the place of failed ones.

    >>> done, lost = (Trajectory(id=f"sums-17-{i}", task="sums", seed=17, turns=[], end=end, failure=failure)
    ...               for i, (end, failure) in enumerate([("done", None), ("failed", Failure("worker", "w3"))]))
    >>> group = Group(id="sums-17", size=2, trajectories=[done, lost], repeats=[0])
    >>> [one.id for one in group.members]
    ['sums-17-0', 'sums-17-0']
    """

    id: str  # one of its own for each dispatched prompt
    size: int  # rollouts per prompt
    trajectories: tuple[Trajectory, ...]  # failed ones too, so that none is lost
    repeats: tuple[int, ...] = ()  # indices into `trajectories`

    def validate(self) -> None:
        self.require(bool(self.id), "id", "a name", self.id)
        self.require(self.size >= 1, "size", "1 or more", self.size)
        self.require(len({one.id for one in self.trajectories}) == len(self.trajectories), "trajectories",
                     "different ids", [one.id for one in self.trajectories])
        problems = {(one.task, one.seed) for one in self.trajectories}
        self.require(len(problems) <= 1, "trajectories", "one task and seed", sorted(problems))
        for i, index in enumerate(self.repeats):
            self.require(0 <= index < len(self.trajectories) and self.trajectories[index].end.complete,
                         f"repeats[{i}]", "the index of a complete trajectory", index)
        self.require(len(self.members) <= self.size, "repeats", f"at most {self.size} members in all",
                     len(self.members))

    @property
    def members(self) -> tuple[Trajectory, ...]:
        """What the update sees: the complete trajectories in order, then the repeated ones."""
        complete = tuple(one for one in self.trajectories if one.end.complete)
        return complete + tuple(self.trajectories[index] for index in self.repeats)


def extend(turns: Sequence[Turn], sent: Iterable[Message], reply: Message, *, prompt: Iterable[int] = (),
           completion: Completion | None = None, reward: float = 0.0, info: Message | None = None) -> Turn:
    """The turn that records this call after `turns`, from all messages and ids that were sent.

    It extends the latest turn whose messages and reply, prompt and sampled ids both begin what was sent; if there is
    none, because the context was cut or rendered anew, it extends nothing and the fork is on record.
    """
    turn = Turn(tuple(sent), reply, tuple(prompt), completion, None, reward, info or {})
    for index in reversed(range(len(turns))):
        parent = turns[index]
        if (parent.completion is None) != (completion is None):
            continue
        messages = _sent(turns, index) + (parent.reply,)
        ids = _prompt(turns, index) + (parent.completion.ids if parent.completion else ())
        if _same(turn.messages[:len(messages)], messages) and turn.prompt[:len(ids)] == ids:
            return dataclasses.replace(turn, messages=turn.messages[len(messages):], prompt=turn.prompt[len(ids):],
                                       extends=index)
    return turn


def _sent(turns: Sequence[Turn], index: int) -> tuple[Message, ...]:
    return _whole(turns, index, lambda turn: turn.messages, lambda turn: (turn.reply,))


def _prompt(turns: Sequence[Turn], index: int) -> tuple[int, ...]:
    return _whole(turns, index, lambda turn: turn.prompt, lambda turn: turn.completion.ids if turn.completion else ())


def _whole(turns: Sequence[Turn], index: int, asked: Callable[[Turn], tuple], given: Callable[[Turn], tuple]) -> tuple:
    """What was asked in turn `index`, after all that was asked and given in the turns that it extends."""
    whole = asked(turns[index])
    parent = turns[index].extends
    while parent is not None:
        whole = asked(turns[parent]) + given(turns[parent]) + whole
        parent = turns[parent].extends
    return whole


def _same(one: Sequence[Message], other: Sequence[Message]) -> bool:
    """Equal as text: the order of keys shows in a prompt, and True is not 1."""
    return one == other and json.dumps(one) == json.dumps(other)


def _natural(value: int) -> bool:
    return value >= 0


def _has_role(message: Message) -> bool:
    return isinstance(message.get("role"), str)
