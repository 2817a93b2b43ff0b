"""Post-training: stages of reinforcement learning one after the other, on one engine, each in a folder of its own.

    params, results = run(job, folder, config, params, tokenizer)

Before and after each stage every skill is tried on problems that were neither demonstrated nor practised. What has
ended is not played again: after an interruption the same call goes on within the stage that was under way.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import pathlib
import statistics
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from glm5_jax.core.metrics import JsonlWriter, MultiWriter, TensorBoardWriter, Writer, collect
from glm5_jax.core.rundir import write_json
from glm5_jax.infer.engine import Engine
from glm5_jax.job import Job, RlStage
from glm5_jax.model import transformer
from glm5_jax.model.config import ModelConfig
from glm5_jax.optim import partition
from glm5_jax.records import Trajectory
from glm5_jax.rewards import blend, courtesy, flags, monitor
from glm5_jax.rewards.blend import Blend, Score
from glm5_jax.rl import algorithms, curriculum, page
from glm5_jax.rl.algorithms import Algorithm
from glm5_jax.rl.curriculum import Part
from glm5_jax.rl.orchestrator import Service
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
JUDGED = "courtesy"  # the skill whose rewards are a blend

KINDS: Mapping[str, Callable[[RlStage], Algorithm]] = {
    "reasoning": lambda one: algorithms.reasoning(beta=one.beta, clip_low=one.clip_low, clip_high=one.clip_high),
    "agentic": lambda one: algorithms.agentic(bound=one.bound, clip_low=one.clip_low, clip_high=one.clip_high),
    "general": lambda one: algorithms.general(beta=one.beta, clip_low=one.clip_low, clip_high=one.clip_high),
    "distillation": lambda one: algorithms.distillation(beta=one.beta, clip_low=one.clip_low, clip_high=one.clip_high)}


def run(job: Job, folder: pathlib.Path, config: ModelConfig, params: Any, tokenizer: Tokenizer,
        say: Callable[[str], None] = print) -> tuple[Any, dict[str, Any]]:
    """The parameters after the last stage, and what each stage did: {stage: {"steps", "seconds", "tokens", "flags",
    "skills": {skill: {"before", "after"}}}}. Writes `report.html` into the folder. Raises as `rl.stage.run` does, and
    RuntimeError where nothing that is held out can be played."""
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


class _Monitor:
    """A writer that looks, at each step, at what the blend has scored since the one before. Where a stage is taken up,
    it begins anew, and its rows go on where the stage does."""

    def __init__(self, folder: pathlib.Path):
        self._rows = JsonlWriter(folder / "rewards.jsonl")
        self._scored: list[tuple[Trajectory, Score]] = []
        self.history: list[monitor.Snapshot] = []

    def keep(self, trajectory: Trajectory, score: Score) -> None:
        self._scored.append((trajectory, score))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._scored:
            if not self.history:
                self._rows.truncate_after(step - 1)
            self.history.append(monitor.observe(step, self._scored))
            self._rows.write(step, collect(monitor.as_metrics(self.history[-1])))
            self._scored = []

    def close(self) -> None:
        self._rows.close()


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
        rl = self.job.rl
        self.results: dict[str, Any] = {}
        self.samples: dict[str, Any] = {}
        self.skills = curriculum.skills(level=rl.level, hops=rl.hops, flaky=rl.flaky)
        self.used = [name for name in self.skills if any(name in rl.stages[stage].skills for stage in rl.order)]
        self.sound = curriculum.skills(level=rl.level, hops=rl.hops, flaky=0.0)  # to be tested by
        self.held_out = {name: self.skills[name].seeds(Part.HELD_OUT, rl.held_out) for name in self.used}
        self.log_probs = PolicyStep(self.config, self._optimizer(1.0), algorithms.reasoning().loss,
                                    policy_step.Options(rows=1)).log_probs  # compiled once for all stages

    @functools.cached_property
    def blend(self) -> Blend:
        return courtesy.blend()

    async def through(self, params: Any) -> Any:
        teachers: list[Any] = []
        scores: dict[str, float] | None = None  # of the policy so far
        for name in self.job.rl.order:
            stage, folder = self.job.rl.stages[name], self.folder / name
            stored = folder / "result.json"
            if not stored.exists():
                scores = scores or await self._scores(params)
            params, found = await self._practise(name, stage, params, teachers)
            if stored.exists():
                self.results[name], scores = json.loads(stored.read_text(encoding="utf-8")), None
            else:
                assert scores is not None
                before, scores = scores, await self._scores(params)
                rows = report.read_rows(folder / "metrics.jsonl")
                self.results[name] = {
                    "steps": stage.steps, "seconds": sum(row["step/seconds"] for row in rows),
                    "tokens": round(sum(row["tokens/trained"] for row in rows)), "flags": found,
                    "skills": {skill: {"before": before[skill], "after": scores[skill]} for skill in self.used}}
                write_json(stored, self.results[name])
            await self._sample(name, stage, params)
            teachers.append(params)
        return params

    async def _practise(self, name: str, stage: RlStage, params: Any, teachers: Sequence[Any]
                        ) -> tuple[Any, list[str]]:
        """The parameters after the stage, and what is suspicious about its rewards."""
        rl, folder = self.job.rl, self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        composed = Stage(name, KINDS[stage.kind](stage), stage.steps, stage.groups,
                         self._optimizer(stage.learning_rate), rl.length, policy_step.Options(rows=rl.rows),
                         save_every=stage.save_every)
        taught = self._teachers(name, stage, teachers) if composed.algorithm.teachers else None
        writers: list[Writer] = [TerminalView(SHOWN)]
        writers += [TensorBoardWriter(folder / "tensorboard")] if rl.tensorboard else []
        watch = _Monitor(folder) if JUDGED in stage.skills else None
        writers += [watch] if watch else []
        with contextlib.closing(MultiWriter(*writers)) as writer:
            params = await run_stage(composed, params, [self._service(skill, stage, watch) for skill in stage.skills],
                                     self.driver, folder, config=self.config, teachers=taught, writer=writer)
        found = [f"step {flag.step}: {flag.scorer} {flag.finding.value}: {flag.look}"
                 for flag in (flags.flags(watch.history) if watch else ())]
        for line in found:
            self.say(f"{name}, {line}")
        return params, found

    async def _scores(self, params: Any) -> dict[str, float]:
        """What a policy earns on the problems that are held out, one rollout of each."""
        scores = {}
        for name, ended in (await self._tried(params, self.held_out)).items():
            complete = [one for one in ended if one.end.complete]
            marks = [_mark(one) if name == JUDGED else one.reward or 0.0 for one in complete]
            if not marks:
                raise RuntimeError(f"{name}: expected some problems that can be played, found that all "
                                   f"{len(ended)} failed, the first with {ended[0].failure}")
            scores[name] = statistics.fmean(marks)
        self.say("Held out: " + ", ".join(f"{name} {score:.3f}" for name, score in scores.items()))
        return scores

    async def _tried(self, params: Any, problems: Mapping[str, Sequence[int]]) -> dict[str, list[Trajectory]]:
        await serve(params, self.driver)
        return await play([curriculum.service(self.sound[name], self.gateway, seeds=()) for name in problems], problems)

    def _optimizer(self, rate: float) -> Any:
        chosen = self.job.rl.optimizer
        return partition.build(
            transformer.param_specs(self.config), optimizer=typing.cast(partition.Optimizer, chosen.name),
            learning_rate=rate, weight_decay=chosen.weight_decay, b1=chosen.b1, b2=chosen.b2, frozen=("indexer",))

    def _service(self, name: str, stage: RlStage, watch: _Monitor | None) -> Service:
        reward = blend.as_reward(self.blend, watch.keep) if watch and name == JUDGED else None
        return curriculum.service(
            self.skills[name], self.gateway, size=stage.size, most=2 * stage.groups, reward=reward,
            seeds=self.skills[name].seeds(Part.PRACTISED, self.job.rl.problems))

    def _teachers(self, name: str, stage: RlStage, policies: Sequence[Any]) -> Teachers:
        """Of each skill, the policy at the end of the last stage before this one that practised it."""
        before = [self.job.rl.stages[earlier] for earlier in self.job.rl.order[:self.job.rl.order.index(name)]]
        return Teachers(policies, {skill: max(number for number, one in enumerate(before) if skill in one.skills)
                                   for skill in stage.skills})

    async def _sample(self, name: str, stage: RlStage, params: Any) -> None:
        """Some rollouts of the policy after the stage, for the report: trainer and engine have the same weights."""
        each = -(-TRANSCRIPTS // len(stage.skills))
        tried = await self._tried(params, {skill: self.held_out[skill][:each] for skill in stage.skills})
        some = [one for ended in tried.values() for one in ended if one.end.complete]
        if some:
            logp = self.log_probs(params, page.contexts(some, length=self.job.rl.length, multiple=1))
            self.samples[name] = page.samples(some, logp, self.gateway.tokenizer)


def _mark(trajectory: Trajectory) -> float:
    """The exact marks of a reply, which no reward is made of: 0 for a wrong one, else the mean of all three."""
    marks = courtesy.marks_of(trajectory)
    return marks.correctness * (marks.correctness + marks.tone + marks.quality) / 3
