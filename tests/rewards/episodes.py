"""Finished episodes for the tests of rewards, and scorers that say what they are told."""

import dataclasses
from collections.abc import Callable

from glm5_jax.records import Completion, Trajectory, Turn
from glm5_jax.rewards.base import Dimension, Judgement


def episode(reply, *, asked="1 + 1?", seed=0, id="a", ids=None):
    """One question and one reply, a text or a whole message."""
    message = reply if isinstance(reply, dict) else {"role": "assistant", "content": reply}
    tokens = {} if ids is None else {"prompt": ids[0], "completion": Completion(
        ids[1], [-1.0] * len(ids[1]), [0] * len(ids[1]), "stop")}
    return Trajectory(id, "talk", seed, [Turn([{"role": "user", "content": asked}], message, **tokens)], "done")


NOTHING = Trajectory("empty", "talk", 0, [], "done")


@dataclasses.dataclass(frozen=True)
class Says:
    """A scorer that gives `value`, or what it makes of the trajectory."""

    name: str
    dimension: Dimension
    value: float | Callable[[Trajectory], float]

    async def score(self, trajectories):
        return [Judgement(self.name, self.dimension, self.value(one) if callable(self.value) else self.value)
                for one in trajectories]
