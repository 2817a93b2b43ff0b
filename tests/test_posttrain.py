"""The walk through stages of reinforcement learning, the stages themselves replaced: order, teachers, interruptions."""

import asyncio
import importlib.util
import json
import pathlib
from types import SimpleNamespace

from ml_collections import ConfigDict
import pytest

from glm5_jax import job as jobs, posttrain
from glm5_jax.records import Failure, FailureReason, Trajectory, Turn

ORDER = ("reasoning_rl", "general_rl", "again", "distillation")


class Killed(BaseException):
    """The process ends here."""


class World:
    """Policies are texts: a stage adds its name. What is asked for is counted, and may be the last thing asked for."""

    def __init__(self, folder, monkeypatch, dies_at=None):
        self.folder, self.asked, self.dies_at, self.served = folder, [], dies_at, None
        self.taught, self.lines = {}, []
        for name in ("run_stage", "play", "serve"):
            monkeypatch.setattr(posttrain, name, getattr(self, name))
        monkeypatch.setattr(posttrain.courtesy, "blend", lambda: None)
        monkeypatch.setattr(posttrain.blend, "as_reward", lambda *_: None)
        monkeypatch.setattr(posttrain._Walk, "_sample", self.sample)
        job = jobs.resolve(ConfigDict(_values()))
        self.walk = posttrain._Walk(job, folder, job.model, SimpleNamespace(max_len=128), None, self.lines.append)

    def ask(self, what):
        self.asked.append(what)
        if len(self.asked) == self.dies_at:
            raise Killed

    async def run_stage(self, stage, params, services, driver, folder, *, config, teachers, writer):
        self.ask(f"run {stage.name}")
        done = folder / "checkpoint"
        if not done.exists():
            rows = [{"step": 1, "step/seconds": 2.0, "tokens/trained": 10.0},
                    {"step": 2, "step/seconds": 3.0, "tokens/trained": 20.0}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            done.write_text(f"{params}+{stage.name}")
            self.ask(f"ran {stage.name}")
        if teachers is not None:
            self.taught = {skill: teachers.policies[number] for skill, number in teachers.of.items()}
        return done.read_text()

    async def serve(self, params, driver):
        self.ask(f"serve {params}")
        self.served = params

    async def play(self, services, problems):
        """Every stage behind a policy is worth 0.1."""
        reward = self.served.count("+") / 10
        turn = Turn([{"role": "user", "content": "?"}], {"role": "assistant", "content": "!"}, reward=reward)
        return {name: [Trajectory(f"{name}-{seed}", name, seed, (turn,), "done") for seed in seeds]
                for name, seeds in problems.items()}

    async def sample(self, name, stage, params):
        self.ask(f"sample {name}")


def _values():
    values = _experiment().to_dict()
    stages = values["rl"]["stages"]
    stages["again"] = stages["reasoning_rl"] | {"skills": ("sums",)}
    stages["distillation"] |= {"skills": ("sums", "turns", "courtesy")}
    values["rl"] |= {"order": ORDER, "held_out": 2, "problems": 3}
    return values


def _experiment():
    path = pathlib.Path(__file__).parents[1] / "experiments" / "glm5.py"
    spec = importlib.util.spec_from_file_location("experiment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config("tiny")


def walked(folder, monkeypatch, dies_at=None):
    world = World(folder, monkeypatch, dies_at)
    monkeypatch.setattr(posttrain, "_mark", lambda one: one.reward)
    try:
        return world, asyncio.run(world.walk.through("sft"))
    except Killed:
        return world, None


def test_each_stage_goes_on_from_the_one_before(tmp_path, monkeypatch):
    world, params = walked(tmp_path, monkeypatch)
    assert params == "sft+reasoning_rl+general_rl+again+distillation"
    assert list(world.walk.results) == list(ORDER)
    assert set(world.walk.results["again"]["skills"]) == {"sums", "products", "turns", "courtesy"}
    for number, name in enumerate(ORDER):
        result = world.walk.results[name]
        assert (result["seconds"], result["tokens"], result["flags"]) == (5.0, 30, [])
        before, after = result["skills"]["turns"].values()
        assert (before, after) == (pytest.approx(number / 10), pytest.approx((number + 1) / 10))
    assert "again" in posttrain.table(world.walk.results) and "0.300" in posttrain.table(world.walk.results)


def test_a_teacher_is_the_last_policy_that_practised_the_skill(tmp_path, monkeypatch):
    world, _ = walked(tmp_path, monkeypatch)
    assert world.taught == {"sums": "sft+reasoning_rl+general_rl+again", "turns": "sft+reasoning_rl",
                            "courtesy": "sft+reasoning_rl+general_rl"}


def test_killed_anywhere_the_same_call_comes_to_the_same_end(tmp_path, monkeypatch):
    whole, end = walked(tmp_path / "whole", monkeypatch)
    for dies_at in range(1, len(whole.asked) + 1):
        folder = tmp_path / str(dies_at)
        _, none = walked(folder, monkeypatch, dies_at)
        again, params = walked(folder, monkeypatch)
        assert none is None and params == end and again.walk.results == whole.walk.results
    finished, params = walked(tmp_path / "whole", monkeypatch)
    assert params == end and finished.walk.results == whole.walk.results
    assert not any(one.startswith(("ran", "serve")) for one in finished.asked)


def test_a_skill_of_which_nothing_can_be_played_is_an_error(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch)

    async def nothing(services, problems):
        failure = Failure(FailureReason.ENVIRONMENT, "step", "no sandbox here")
        return {name: [Trajectory(f"{name}-{seed}", name, seed, (), "failed", failure) for seed in seeds]
                for name, seeds in problems.items()}

    monkeypatch.setattr(posttrain, "play", nothing)
    with pytest.raises(RuntimeError, match="sums: expected some problems that can be played.*no sandbox here"):
        asyncio.run(world.walk.through("sft"))


def test_every_kind_of_the_configuration_has_its_algorithm():
    assert set(posttrain.KINDS) == set(jobs.RL_KINDS)


def test_rows_of_the_monitor_are_not_repeated_where_a_stage_is_taken_up(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(posttrain.monitor, "observe", lambda step, scored: seen.append(len(scored)) or step)
    monkeypatch.setattr(posttrain.monitor, "as_metrics", lambda snapshot: {})
    for steps in ((1, 2, 3), (3, 4)):  # the first process was killed behind its checkpoint of step 2
        watch = posttrain._Monitor(tmp_path)
        for step in steps:
            watch.keep(None, None)
            watch.write(step, {})
        watch.write(9, {})  # nothing was scored
        watch.close()
    rows = [json.loads(line)["step"] for line in (tmp_path / "rewards.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4] and seen == [1] * 5
