"""Post-training: stages of reinforcement learning one after the other, on one engine, each in a folder of its own.

    params, results = run(job, folder, config, params, tokenizer)

Before and after each stage every skill is tried on problems that were neither demonstrated nor practised. What has
ended is not played again: after an interruption the same call goes on within the stage that was under way.
"""

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from glm5_jax.core.metrics import MultiWriter, TensorBoardWriter, Writer
from glm5_jax.core.rundir import write_json
from glm5_jax.infer.engine import Engine
from glm5_jax.job import Job, RlStage
from glm5_jax.model import transformer
from glm5_jax.model.config import ModelConfig
from glm5_jax.optim import partition
from glm5_jax.rewards import blend, courtesy
from glm5_jax.rl import algorithms, curriculum, page
from glm5_jax.rl.algorithms import Algorithm
from glm5_jax.rl.curriculum import Part, Skill
from glm5_jax.rl.ledger import Ledger
from glm5_jax.rl.orchestrator import Reward, Service
from glm5_jax.rl.stage import Stage, play, run as run_stage, serve
from glm5_jax.rl.trainer import Teachers
from glm5_jax.rl.view import TerminalView
from glm5_jax.serve.driver import Driver
from glm5_jax.serve.gateway import Gateway
from glm5_jax.text.tokenizer import Tokenizer
from glm5_jax.train import policy_step, report
from glm5_jax.train.policy_step import PolicyStep

SHOWN = ("reward/", "staleness/mean", "length/consumed", "trainer/idle")  # of each step, on the terminal
TRANSCRIPTS = 6  # of each stage, in the report

KINDS: Mapping[str, Callable[[RlStage], Algorithm]] = {
    "reasoning": lambda one: algorithms.reasoning(beta=one.beta, clip_low=one.clip_low, clip_high=one.clip_high),
    "agentic": lambda one: algorithms.agentic(bound=one.bound, clip_low=one.clip_low, clip_high=one.clip_high),
    "general": lambda one: algorithms.general(beta=one.beta, clip_low=one.clip_low, clip_high=one.clip_high),
    "distillation": lambda one: algorithms.distillation(beta=one.beta, clip_low=one.clip_low, clip_high=one.clip_high)}


def run(job: Job, folder: pathlib.Path, config: ModelConfig, params: Any, tokenizer: Tokenizer,
        say: Callable[[str], None] = print) -> tuple[Any, dict[str, Any]]:
    """The parameters after the last stage, and what each stage did: {stage: {"steps", "seconds", "tokens", skill:
    {"before", "after"}}}. Writes `report.html` into the folder. Raises as `rl.stage.run` does."""
    engine = Engine(jax.tree.map(jnp.copy, params), config, slots=job.rl.slots, max_len=job.rl.max_len)
    with Driver(engine) as driver:
        walk = _Walk(job, folder, config, driver, Gateway(driver, tokenizer), say)
        params = asyncio.run(walk.through(params))
        page.write(folder / "report.html", title="Reinforcement learning, stage by stage", samples=walk.samples,
                   runs={name: report.read_rows(folder / name / "metrics.jsonl") for name in job.rl.order})
    return params, walk.results


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each stage and skill, as text."""
    lines = [("stage", "steps", "seconds", "tokens", "held out", "before", "after")]
    for name, result in results.items():
        first = (name, f"{result['steps']:,}", f"{result['seconds']:,.0f}", f"{result['tokens']:,}")
        for skill, score in result["skills"].items():
            lines.append((*first, skill, f"{score['before']:.3f}", f"{score['after']:.3f}"))
            first = ("", "", "", "")
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) if number in (0, 4) else cell.rjust(width)
                               for number, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)


@dataclasses.dataclass
class _Walk:
    """What is known between the first stage and the last."""

    job: Job
    folder: pathlib.Path
    config: ModelConfig
    driver: Driver
    gateway: Gateway
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.results: dict[str, Any] = {}
        self.samples: dict[str, Any] = {}
        self.skills = curriculum.skills(level=self.job.rl.level)
        self.used = [name for name in self.skills
                     if any(name in self.job.rl.stages[stage].skills for stage in self.job.rl.order)]
        self.held_out = {name: self.skills[name].seeds(Part.HELD_OUT, self.job.rl.held_out) for name in self.used}
        self.log_probs = PolicyStep(self.config, self._optimizer(1.0), algorithms.reasoning().loss,
                                    policy_step.Options(rows=1)).log_probs  # compiled once for all stages

    async def through(self, params: Any) -> Any:
        teachers: list[Any] = []
        scores: dict[str, float] | None = None  # of the policy that is served
        for name in self.job.rl.order:
            stage, folder = self.job.rl.stages[name], self.folder / name
            stored = folder / "result.json"
            if not stored.exists():
                scores = scores or await self._scores(params)
            composed, start = self._composed(name, stage), time.perf_counter()
            taught = self._teachers(name, stage, teachers) if composed.algorithm.teachers else None
            with contextlib.closing(self._writer(folder)) as writer:
                params = await run_stage(composed, params, map(self._service(stage), stage.skills), self.driver, folder,
                                         config=self.config, teachers=taught, writer=writer)
            if stored.exists():
                self.results[name] = json.loads(stored.read_text(encoding="utf-8"))
                scores = None
            else:
                assert scores is not None
                before, scores = scores, await self._scores(params)
                rows = report.read_rows(folder / "metrics.jsonl")
                self.results[name] = {
                    "steps": stage.steps, "seconds": time.perf_counter() - start,
                    "tokens": round(sum(row["tokens/trained"] for row in rows)),
                    "skills": {skill: {"before": before[skill], "after": scores[skill]} for skill in self.used}}
                write_json(stored, self.results[name])
            self._sample(name, composed, params)
            teachers.append(params)
        return params

    async def _scores(self, params: Any) -> dict[str, float]:
        """What a policy earns on the problems that are held out, one rollout of each."""
        await serve(params, self.driver)
        played = await play([curriculum.service(self.skills[name], self.gateway, seeds=(), reward=_reward(name))
                             for name in self.used], self.held_out)
        scores = {name: statistics.fmean(one.reward for one in ended if one.reward is not None)
                  for name, ended in played.items()}
        self.say("Held out: " + ", ".join(f"{name} {score:.3f}" for name, score in scores.items()))
        return scores

    def _composed(self, name: str, stage: RlStage) -> Stage:
        return Stage(name, KINDS[stage.kind](stage), stage.steps, stage.groups, self._optimizer(stage.learning_rate),
                     self.job.rl.length, policy_step.Options(rows=self.job.rl.rows), save_every=stage.save_every)

    def _optimizer(self, rate: float) -> Any:
        return partition.build(transformer.param_specs(self.config), optimizer="adamw", learning_rate=rate,
                               weight_decay=0.0, b1=0.9, b2=0.95, frozen=("indexer",))

    def _service(self, stage: RlStage) -> Callable[[str], Service]:
        def service(name: str) -> Service:
            skill: Skill = self.skills[name]
            return curriculum.service(
                skill, self.gateway, size=stage.size, most=2 * stage.groups, reward=_reward(name),
                seeds=skill.seeds(Part.PRACTISED, self.job.rl.problems))
        return service

    def _teachers(self, name: str, stage: RlStage, policies: list[Any]) -> Teachers:
        """Of each skill, the policy at the end of the last stage before this one that practised it."""
        before = [self.job.rl.stages[earlier] for earlier in self.job.rl.order[:self.job.rl.order.index(name)]]
        return Teachers(policies, {skill: max(number for number, one in enumerate(before) if skill in one.skills)
                                   for skill in stage.skills})

    def _writer(self, folder: pathlib.Path) -> Writer:
        view = TerminalView(SHOWN)
        return MultiWriter(view, TensorBoardWriter(folder / "tensorboard")) if self.job.rl.tensorboard else view

    def _sample(self, name: str, stage: Stage, params: Any) -> None:
        """Some rollouts of the last step, for the report."""
        with Ledger(self.folder / name / "ledger.sqlite") as ledger:
            groups = ledger.batch(stage.steps)
        some = [one for group in groups for one in group.trajectories if one.end.complete][::max(1, stage.groups)]
        some = some[:TRANSCRIPTS]
        logp = self.log_probs(params, page.contexts(some, length=self.job.rl.length, multiple=1))
        self.samples[name] = page.samples(some, logp, self.gateway.tokenizer)


def _reward(skill: str) -> Reward | None:
    """What is added to the rewards of its environment."""
    return blend.as_reward(courtesy.blend()) if skill == "courtesy" else None
