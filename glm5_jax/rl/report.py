"""What a training step of the asynchronous loop says of itself: staleness, lengths, what was dropped, who waited."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from glm5_jax.core.metrics import Mean, Metric
from glm5_jax.losses.diagnostics import Max
from glm5_jax.records import EndReason, FailureReason, Group, StopReason, Trajectory
from glm5_jax.serve.generator import Totals

RUN = 8  # tokens in a row that count as repeated where they come again
OLDEST = 8  # the last bar of a histogram holds all that is staler
Counts = collections.Counter[str]


class Played(NamedTuple):
    """What a rollout has gained while this process played it, in so many seconds."""

    tokens: int = 0
    seconds: float = 0.0


@dataclasses.dataclass
class Since:
    """What happened since the step before."""

    dropped: Counts = dataclasses.field(default_factory=collections.Counter)  # groups, by reason
    failed: Counts = dataclasses.field(default_factory=collections.Counter)  # rollouts, by reason
    resumed: int = 0  # rollouts
    retried: float = math.nan  # times that a rollout was played again for a lost worker; NaN where nobody counts them
    sampled: list[int] = dataclasses.field(default_factory=list)  # tokens of each rollout that ended
    discarded: int = 0  # tokens of groups that were given up
    played: dict[str, Played] = dataclasses.field(default_factory=dict)  # by rollout, of the batch


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step: the trainer waited, trained, pushed; there may be gaps, as while engines drain."""

    waited: float
    pushed: float
    whole: float

    @property
    def idle(self) -> float:
        """The share of its time that the trainer waited for its batch."""
        return self.waited / self.whole if self.whole > 0 else 0.0


def engines(before: Totals, after: Totals) -> dict[str, Metric]:
    """What they did in between: the share of time they waited, tokens per second of one, the share of prompts that
    their caches held, and tokens that were fed again; nothing where no time has passed."""
    past = Totals(*(x - y for x, y in zip(dataclasses.astuple(after), dataclasses.astuple(before))))
    if not past.seconds:
        return {}
    over = lambda x, y: Mean(jnp.float32(x), jnp.float32(y))
    return {"engine/idle": over(past.seconds - past.busy, past.seconds),
            "engine/tokens_per_second": over(past.drawn, past.seconds),
            "engine/cache_hit": over(past.reused, past.reused + past.fed - past.again),
            "engine/tokens_again": _mean([past.again])}


def tokens(trajectory: Trajectory) -> int:
    """Sampled ones."""
    return sum(len(turn.completion.ids) for turn in trajectory.turns if turn.completion)


def staleness(trajectory: Trajectory, version: int, step_of: Mapping[int, int]) -> int | None:
    """Steps between the policy of the first sampled token and `version`, which the trajectory is consumed at.

    `step_of` gives the step of each policy's number. Below 0 where the tokens are of a step that was lost in a crash.
    """
    first = trajectory.first_version
    return None if first is None else version - step_of[first]


def repetition(trajectory: Trajectory) -> float:
    """The share of runs of `RUN` sampled tokens in a row that the same turn had sampled before; 0 without any."""
    seen = total = 0
    for turn in trajectory.turns:
        ids = turn.completion.ids if turn.completion else ()
        runs = [ids[start:start + RUN] for start in range(len(ids) - RUN + 1)]
        seen, total = seen + len(runs) - len(set(runs)), total + len(runs)
    return seen / total if total else 0.0


def truncated(trajectory: Trajectory) -> bool:
    """Whether a limit of tokens cut it off, or one of its turns."""
    return trajectory.end is EndReason.TOKENS or any(
        turn.completion is not None and turn.completion.stop is StopReason.LENGTH for turn in trajectory.turns)


def measure(batch: Sequence[Group], version: int, step_of: Mapping[int, int], since: Since, *, times: Times,
            in_flight: int, queued: int) -> dict[str, Metric]:
    """The metrics of the step from `version` on `batch`. Averages are over rollouts, those of failed ones left out.

    The speed of the longest rollout is that of all its time of being played: tools, rewards and retries count in, what
    lies between a call back and its resumption does not, nor what another process played before a restart.
    """
    rollouts = [one for group in batch for one in group.trajectories if one.end.complete]
    stale = [age for one in rollouts if (age := staleness(one, version, step_of)) is not None]
    drawn = [version - step_of[number] for one in rollouts for turn in one.turns if turn.completion
             for number in turn.completion.versions]
    lengths = [tokens(one) for one in rollouts]
    longest = since.played.get(max(rollouts, key=tokens).id, Played()) if rollouts else Played()
    of_group = [{one.reward for one in group.trajectories if one.end.complete} for group in batch]
    found: dict[str, Metric] = {
        "reward/mean": _mean([one.reward for one in rollouts]),
        "staleness/mean": _mean(stale),
        "staleness/max": Max(jnp.float32(max(stale, default=-np.inf))),
        "staleness/tokens": _mean(drawn),
        "staleness/policies": _mean([len({number for turn in one.turns if turn.completion
                                          for number in turn.completion.versions}) for one in rollouts]),
        "length/consumed": _mean(lengths),
        "length/p50": _mean([np.quantile(lengths, 0.5)] if lengths else []),
        "length/p99": _mean([np.quantile(lengths, 0.99)] if lengths else []),
        "length/sampled": _mean(since.sampled),
        "groups/no_spread": _mean([len(kinds) == 1 for kinds in of_group]),
        "groups/all_0": _mean([kinds == {0} for kinds in of_group]),
        "groups/all_1": _mean([kinds == {1} for kinds in of_group]),
        "groups/accepted": Mean(jnp.float32(len(batch)), jnp.float32(len(batch) + since.dropped.total())),
        "groups/repeats": _mean([len(group.repeats) for group in batch]),
        "groups/in_flight": _mean([in_flight]),
        "rollouts/queued": _mean([queued]),
        "rollouts/truncated": _mean([truncated(one) for one in rollouts]),
        "rollouts/repetition": _mean([repetition(one) for one in rollouts]),
        "rollouts/resumed": _mean([since.resumed]),
        "rollouts/retried": _mean([since.retried]),
        "trainer/idle": Mean(jnp.float32(times.waited), jnp.float32(times.whole)),
        "push/seconds": _mean([times.pushed]),
        "step/seconds": _mean([times.whole]),
        "tokens/trained": _mean([sum(lengths)]),
        "tokens/discarded": _mean([since.discarded]),
        "tokens/per_second": Mean(jnp.float32(sum(lengths)), jnp.float32(times.whole)),
        "tokens/per_second_of_longest": Mean(jnp.float32(longest.tokens), jnp.float32(longest.seconds)),
    }
    for name, ages in {"share": stale, "tokens_share": drawn}.items():
        counts = collections.Counter(min(max(age, 0), OLDEST) for age in ages)
        for age in range(OLDEST + 1):
            bar = f"staleness/{name}_{age}{'_and_more' if age == OLDEST else ''}"
            found[bar] = Mean(jnp.float32(counts[age]), jnp.float32(len(ages)))
    for reason in FailureReason:
        found[f"rollouts/failed/{reason}"] = _mean([since.failed[reason]])
    for reason in ["stale", *FailureReason]:
        found[f"groups/dropped/{reason}"] = _mean([since.dropped[reason]])
    for task in sorted({one.task for one in rollouts}):
        found[f"reward/{task}"] = _mean([one.reward for one in rollouts if one.task == task])
    return found


def _mean(values: Sequence[Any]) -> Mean:
    return Mean(jnp.float32(np.sum(np.array(values, np.float64))), jnp.float32(len(values)))
