"""What a reward is made of: scorers, each of which judges finished episodes in one dimension.

Rules, outcome models and generative judges stand behind the one protocol `Scorer`. A judgement is a number from 0 to 1;
a scorer that cannot judge raises, so that the episode counts for nothing instead of 0.
"""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any, Protocol

from glm5_jax.records import Message, Trajectory
from glm5_jax.records.fields import Record


class Dimension(enum.StrEnum):
    """The three objectives of general RL (GLM-5, section 3.4)."""

    CORRECTNESS = "correctness"  # instructions, facts, logic: without it the others count for nothing
    TONE = "tone"  # empathy and a natural style
    QUALITY = "quality"  # what the kind of task asks for


@dataclasses.dataclass(frozen=True)
class Judgement(Record):
    """What one scorer says of one episode."""

    scorer: str  # its name
    dimension: Dimension
    value: float  # 0 to 1
    detail: str = ""  # for people

    def validate(self) -> None:
        self.require(0 <= self.value <= 1, "value", f"0 to 1 of scorer {self.scorer!r}", self.value)


class ScorerFailed(Exception):
    """A scorer could not judge an episode; the message names both."""


class Scorer(Protocol):
    """Judges a batch: one judgement for each trajectory, in order, or an exception.

    It runs on an event loop, so that what takes long is awaited, in another thread or process.
    """

    @property
    def name(self) -> str: ...

    @property
    def dimension(self) -> Dimension: ...

    async def score(self, trajectories: Sequence[Trajectory]) -> Sequence[Judgement]: ...


def text(message: Message) -> str:
    """The text of a message's content, which may come in parts; empty where it has none. Reasoning is left out."""
    content: Any = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content
                          if isinstance(part, dict) and isinstance(part.get("text"), str))
    return content if isinstance(content, str) else ""


def final_text(trajectory: Trajectory) -> str:
    """The text of the last reply; raises ScorerFailed for an episode without one."""
    _require_turns(trajectory)
    return text(trajectory.turns[-1].reply)


def asked(trajectory: Trajectory) -> str:
    """What the last reply answers, as `conversation` gives it; raises ScorerFailed for an episode without a reply."""
    _require_turns(trajectory)
    return conversation(trajectory.sent(len(trajectory.turns) - 1))


def conversation(messages: Sequence[Message]) -> str:
    """Messages as plain text, `role: text` each."""
    return "\n".join(f"{message['role']}: {text(message)}" for message in messages)


def _require_turns(trajectory: Trajectory) -> None:
    if not trajectory.turns:
        raise ScorerFailed(f"trajectory {trajectory.id}: expected a turn whose reply can be judged, found none")
