"""What learns in the asynchronous loop: groups of rollouts in, a policy out, durable and handed to the engines."""

import asyncio
import dataclasses
import functools
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glm5_jax.checkpoint.store import Store
from glm5_jax.core.metrics import merge, Metric
from glm5_jax.data.packing import Rows
from glm5_jax.losses import advantage, distill
from glm5_jax.records import Group, PolicyVersion
from glm5_jax.rl import batches, weights
from glm5_jax.rl.executors import Threads
from glm5_jax.serve.driver import Driver
from glm5_jax.train.policy_step import PolicyStep
from glm5_jax.train.state import TrainState

# Has all engines serve parameters under a policy number; they stay the trainer's, who gives its next step new ones.
Deliver = Callable[[int, int, Any], Awaitable[PolicyVersion]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a batch of groups becomes updates. Raises ValueError naming the field.

    Rows are `length` tokens. A batch is cut into `updates` parts, a step of the optimiser for each; with more than one,
    what the loss compares with is the policy before the first. `reset_optimizer` lets the optimiser begin anew after
    every push (GLM-5 report, section 3.3). `save_every` is in training steps: a crash takes back those after it.
    """

    length: int
    updates: int = 1
    advantage: batches.Advantage = advantage.group_advantage
    reset_optimizer: bool = False
    save_every: int = 1

    def __post_init__(self) -> None:
        for field in ("length", "updates", "save_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"Plan.{field}: expected at least 1, found {getattr(self, field)!r}")


@dataclasses.dataclass(frozen=True)
class Teachers:
    """Policies to learn from, parameters of the student's own shape, and which of them is each task's. Raises
    ValueError for a task whose teacher is not there."""

    policies: Sequence[Any]
    of: Mapping[str, int]

    def __post_init__(self) -> None:
        for task, number in self.of.items():
            if not 0 <= number < len(self.policies):
                raise ValueError(f"Teachers.of[{task!r}]: expected one of {len(self.policies)} policies, "
                                 f"found {number}")

    def number(self, task: str) -> int:
        """The teacher of a task; raises ValueError for one that has none."""
        if task not in self.of:
            raise ValueError(f"Teachers.of: expected a teacher for task {task!r}, found those of {sorted(self.of)}")
        return self.of[task]


class PolicyTrainer:
    """The `Trainer` of a loop: a state, its step and optimiser; `deliver` takes policies to the engines.

    It goes on from the newest checkpoint of `store`, else from `state`, whose arrays it donates. With `teachers` the
    advantage of a token is what its rollout's teacher would rather have said (`losses.distill.teacher_advantage`),
    whatever the rewards are.
    """

    def __init__(self, state: TrainState, step: PolicyStep, optimizer: optax.GradientTransformationExtraArgs,
                 store: Store, deliver: Deliver, plan: Plan, teachers: Teachers | None = None):
        self._step, self._store, self._deliver, self._plan, self._teachers = step, store, deliver, plan, teachers
        self._reset = jax.jit(optimizer.init)
        self._taken, self._state = 0, state
        if (newest := store.latest_step()) is not None:
            self._taken = newest
            self._state, _ = store.restore(newest, jax.eval_shape(lambda: state))

    @property
    def step(self) -> int:
        """Training steps of this run that are done."""
        return self._taken

    @property
    def params(self) -> Any:
        """The parameters of the moment; the next step donates them."""
        return self._state.params

    async def train(self, step: int, batch: Sequence[Group]) -> Mapping[str, Metric]:
        """See `loop.Trainer.train`. Raises ValueError for a batch that cannot be cut into as many updates.

        A step that was begun is taken, also where this is cancelled: it ends only then.
        """
        call = asyncio.ensure_future(Threads(1).run(self._train, step, batch))
        try:
            return await asyncio.shield(call)
        finally:
            await asyncio.wait([call])

    async def push(self, number: int) -> PolicyVersion:
        """See `loop.Trainer.push`."""
        # The next step donates these: engines get their own.
        policy = await self._deliver(number, self._taken, jax.tree.map(jnp.copy, self._state.params))
        if self._plan.reset_optimizer:
            self._state = dataclasses.replace(self._state, opt_state=self._reset(self._state.params))
        return policy

    def close(self) -> None:
        """Returns when every checkpoint is on the disk."""
        self._store.close()

    def _train(self, step: int, batch: Sequence[Group]) -> Mapping[str, Metric]:
        plan = self._plan
        if len(batch) % plan.updates:
            raise ValueError(f"batch: expected a multiple of {plan.updates} groups (Plan.updates), found {len(batch)}")
        size = len(batch) // plan.updates
        parts = [self._rows(batch[start:start + size]) for start in range(0, len(batch), size)]
        if plan.updates > 1:
            parts = [dataclasses.replace(rows, streams=rows.streams | {
                "logp_old": self._step.log_probs(self._state.params, rows)}) for rows in parts]
        metrics: dict[str, Any] = {}
        for rows in parts:
            if self._teachers:
                rows = self._taught(rows, self._teachers)
            self._state, new = self._step(self._state, rows)
            metrics = merge(metrics, new)
        jax.block_until_ready(self._state)  # so that the time of a step is not taken for that of the push behind it
        self._taken = step
        if step % plan.save_every == 0:
            self._store.save(step, self._state, {})
        return metrics

    def _rows(self, groups: Sequence[Group]) -> Rows:
        plan, options, teachers = self._plan, self._step.options, self._teachers
        return batches.of_groups(groups, length=plan.length, multiple=options.rows, aggregation=options.aggregation,
                                 advantage=_alike if teachers else plan.advantage,
                                 teacher=teachers.number if teachers else None)

    def _taught(self, rows: Rows, teachers: Teachers) -> Rows:
        """The rows, with advantages of the student of the moment and each token's teacher."""
        student = self._step.log_probs(self._state.params, rows)
        taught = student
        for number in sorted(set(teachers.of.values())):
            logp = self._step.log_probs(teachers.policies[number], rows)
            taught = jnp.where(rows.streams["teacher"] == number, logp, taught)
        value = distill.teacher_advantage(taught, student) * rows.streams["advantage"]
        return dataclasses.replace(rows, streams=rows.streams | {"advantage": value})


def _alike(rewards: Any, groups: Any) -> Any:
    """Every rollout counts as much as any other."""
    return np.ones(len(rewards))


def to_driver(driver: Driver) -> Deliver:
    """Weights for an engine of this process, which may share the trainer's devices."""
    async def deliver(number: int, step: int, params: Any) -> PolicyVersion:
        await driver.push(params, number)
        return PolicyVersion(number, step)
    return deliver


def to_folder(folder: str | os.PathLike[str], tell: Callable[[int], Awaitable[Any]], *, keep: int = 2) -> Deliver:
    """Weights for engines elsewhere: published in a folder that they see, the newest `keep` of which stay; `tell` has
    them serve a number, as `rl.remote.Remote.push` does for one and `rl.pool.Pool.push` for many."""
    aside = Threads(1)

    async def deliver(number: int, step: int, params: Any) -> PolicyVersion:
        policy = await aside.run(functools.partial(weights.publish, folder, params, number=number, step=step))
        await tell(number)
        await aside.run(functools.partial(weights.prune, folder, keep=keep))
        return policy
    return deliver
