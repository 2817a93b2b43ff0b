"""What an environment is: it speaks messages, gives rewards, and is a pure function of its seed and the replies."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from glm5_jax.records import Failure, Message


class Start(NamedTuple):
    """The first messages, and the JSON-schema definitions of the tools that the model may call."""

    messages: tuple[Message, ...]
    tools: tuple[Message, ...] = ()


class Step(NamedTuple):
    """The environment's answer to one reply: tool results or what a user says next, and what the reply earned."""

    messages: tuple[Message, ...] = ()
    reward: float = 0.0
    done: bool = False
    info: Mapping[str, Any] = {}  # JSON, for the record; the model never sees it


class Failed(Exception):
    """Raised by an environment or generator that can say what failed, such as a reward that could not be computed."""

    def __init__(self, failure: Failure):
        super().__init__(failure)
        self.failure = failure


class Environment(Protocol):
    """One episode at a time: `reset`, then `step` for each reply until it is done, then `close`.

    The same seed gives the same problem, in every process and on every version of Python. A bad reply, a malformed call
    among them, earns its reward; an exception, `Failed` or any other, says that the environment itself has failed, and
    the episode counts for nothing. Plain tuples serve as `Start` and `Step`.
    """

    def reset(self, seed: int) -> Start: ...

    def step(self, message: Message) -> Step: ...

    def close(self) -> None:
        """Frees what `reset` took; called once, also after a failed `reset`."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Where an episode is cut off; None is no limit. Raises ValueError for a limit that is not positive."""

    turns: int | None = None  # calls of the model
    tokens: int | None = None  # of the messages sent in one call
    wall_s: float | None = None  # looked at before each call: a call that hangs is its caller's to interrupt

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ValueError(f"Limits.{field.name}: expected None or more than 0, found {value!r}")
