"""One stage of reinforcement learning: parameters in, parameters out, and a folder from which it can be taken up.

    params = asyncio.run(run(stage, params, services, driver, folder, config=config))

The folder holds the ledger, the checkpoints, `metrics.jsonl` and `transcripts.jsonl`. A stage that was killed at any
moment goes on when the same call is made again; one that has ended gives its parameters at once.
"""

import asyncio
import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from glm5_jax.checkpoint.store import Store
from glm5_jax.core.metrics import JsonlWriter, MultiWriter, Writer
from glm5_jax.model.config import ModelConfig
from glm5_jax.records import PolicyVersion, Trajectory
from glm5_jax.rl.algorithms import Algorithm
from glm5_jax.rl.ledger import Ledger, Order
from glm5_jax.rl.loop import Loop
from glm5_jax.rl.orchestrator import Orchestrator, Service
from glm5_jax.rl.trainer import Plan, PolicyTrainer, Teachers, to_driver
from glm5_jax.rl.transcripts import Transcripts
from glm5_jax.serve.driver import Driver
from glm5_jax.train import policy_step, state as train_state
from glm5_jax.train.policy_step import PolicyStep


@dataclasses.dataclass(frozen=True)
class Stage:
    """`steps` training steps on `groups` groups each, by an `optimizer` for the `frozen` and `trainable` tags of
    `options`. Rows are `length` tokens, as long as the engine's `max_len` or longer. Raises ValueError unless
    `save_every` divides `steps`: what comes after the newest checkpoint would be lost."""

    name: str
    algorithm: Algorithm
    steps: int
    groups: int
    optimizer: optax.GradientTransformationExtraArgs
    length: int
    options: policy_step.Options = policy_step.Options()
    updates: int = 1
    save_every: int = 1

    def __post_init__(self) -> None:
        self.plan  # checks what it shares
        if self.steps < 1 or self.steps % self.save_every:
            raise ValueError(f"Stage {self.name}: steps: expected a positive multiple of save_every = "
                             f"{self.save_every}, found {self.steps}")

    @property
    def plan(self) -> Plan:
        return Plan(length=self.length, updates=self.updates, advantage=self.algorithm.advantage,
                    reset_optimizer=self.algorithm.reset_optimizer, save_every=self.save_every)


async def run(stage: Stage, params: Any, services: Iterable[Service], driver: Driver,
              folder: str | os.PathLike[str], *, config: ModelConfig, teachers: Teachers | None = None,
              writer: Writer | None = None) -> Any:
    """The parameters after the stage; `params`, which stay the caller's, are those before it.

    The services play on `driver`, which serves the newest parameters from the first step on; where there is nothing
    left to do, it is left as it is. Metrics go to `metrics.jsonl` in the folder, and to `writer`. Raises ValueError for
    rows shorter than the contexts of the engine, and for teachers that the algorithm has no use for, or that it or one
    of the services lacks; and as `Loop.run` does.
    """
    if stage.algorithm.teachers != (teachers is not None):
        raise ValueError(f"Stage {stage.name}: teachers: expected {'some' if stage.algorithm.teachers else 'none'}, as "
                         f"its algorithm says, found {'none' if teachers is None else 'some'}")
    if stage.length < driver.max_len:
        raise ValueError(f"Stage {stage.name}: length: expected at least {driver.max_len}, the engine's max_len, found "
                         f"{stage.length}")
    services = tuple(services)
    if teachers is not None:
        for service in services:
            teachers.number(service.name)  # raises at once for a task without
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    options = dataclasses.replace(stage.options, aggregation=stage.algorithm.aggregation)
    step = PolicyStep(config, stage.optimizer, stage.algorithm.loss, options)
    state = train_state.from_params(jax.tree.map(jnp.copy, params), stage.optimizer)
    with contextlib.ExitStack() as stack:
        learner = PolicyTrainer(state, step, stage.optimizer, Store(folder / "checkpoints", keep=1), to_driver(driver),
                                stage.plan, teachers)
        stack.callback(learner.close)
        ledger = stack.enter_context(Ledger(folder / "ledger.sqlite"))
        log = stack.enter_context(Transcripts(folder / "transcripts.jsonl"))
        rows = stack.enter_context(contextlib.closing(JsonlWriter(folder / "metrics.jsonl")))
        rows.truncate_after(learner.step)
        served = await driver.call(lambda engine: engine.version)
        if served > max((one.number for one in ledger.policies()), default=0):
            ledger.push(PolicyVersion(served, learner.step))  # numbers go on where the engine is
        orchestrator = Orchestrator(services, limit=sum(one.most * one.size for one in services), log=log.add)
        await Loop(ledger, stage.algorithm.scheduler(stage.groups), orchestrator, learner,
                   writer=MultiWriter(*(one for one in (rows, writer) if one is not None)), totals=driver.totals,
                   retried=orchestrator.retried).run(stage.steps)
        return learner.params


async def serve(params: Any, driver: Driver) -> None:
    """Has the engine serve these parameters, which stay the caller's."""
    version = await driver.call(lambda engine: engine.version)
    await driver.push(jax.tree.map(jnp.copy, params), version + 1)


async def play(services: Iterable[Service], problems: Mapping[str, Sequence[int]]) -> dict[str, list[Trajectory]]:
    """One rollout of each problem, given as {task: seeds}, with the weights that the engines serve: to measure a
    policy, or to find out what it can do. Nothing is recorded."""
    orchestrator = Orchestrator(services, limit=1 << 20)
    orders = [Order(f"{task}-{seed}-{number}", task, seed, 1, 0)
              for task, seeds in problems.items() for number, seed in enumerate(seeds)]
    ended = await asyncio.gather(*(orchestrator.play(order, order.id, None) for order in orders))
    return {task: [one for one in ended if one.task == task] for task in problems}
