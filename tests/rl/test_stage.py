"""A stage as one call, with every algorithm: what it leaves behind, what it leaves alone, and how it is taken up."""

import asyncio
import collections
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from glm5_jax.core import params as core_params
from glm5_jax.envs.verifiable import chains
from glm5_jax.envs.verifiable.task import Verifiable
from glm5_jax.infer.engine import Engine
from glm5_jax.model.transformer import init, param_specs
from glm5_jax.optim import partition
from glm5_jax.records import Trajectory
from glm5_jax.rl import algorithms, rollout, stage, transcripts
from glm5_jax.rl.algorithms import Algorithm
from glm5_jax.rl.ledger import Balance, Ledger
from glm5_jax.rl.orchestrator import Service
from glm5_jax.rl.stage import Stage
from glm5_jax.rl.trainer import Plan, Teachers
from glm5_jax.serve.driver import Driver, Gauges
from glm5_jax.serve.gateway import Gateway, Options as Call
from glm5_jax.text.tokenizer import Tokenizer
from glm5_jax.train.policy_step import Options
from tests.rl.test_trainer import CONFIG as WHOLE

CONFIG = WHOLE.replace(num_hidden_layers=1, mlp_layer_types=("dense",))
SPECS = param_specs(CONFIG)
RULE = partition.build(SPECS, learning_rate=1e-2, optimizer="adamw", frozen=("indexer",))
REASONING = algorithms.reasoning()
STEPS, GROUPS, LENGTH = 3, 2, 32
TOKENIZER = Tokenizer.packaged()


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Stages of one kind share theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "PolicyStep", functools.cache(stage.PolicyStep))
        yield


@pytest.fixture(scope="module")
def params():
    return init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def driver(params):
    with Driver(Engine(params, CONFIG, slots=4, max_len=LENGTH, chunk=8, block=4)) as driver:
        yield driver


def a_stage(algorithm: Algorithm = REASONING, **changes: Any) -> Stage:
    return Stage(**{"name": "tiny", "algorithm": algorithm, "steps": STEPS, "groups": GROUPS, "optimizer": RULE,
                    "length": LENGTH, "options": Options(rows=2)} | changes)


def run(one: Stage, params: Any, driver: Driver, folder: pathlib.Path, played: list[str] | None = None,
        size: int = 4, **options: Any) -> Any:
    async def main() -> Any:
        return await stage.run(one, params, services(driver, size, played), driver, folder, config=CONFIG, **options)

    return asyncio.run(main())


def services(driver: Driver, size: int = 1, played: list[str] | None = None) -> list[Service]:
    """Two tasks. What a rollout earns is up to the first token that it samples; its id is added to `played`."""
    gateway = Gateway(driver, TOKENIZER)
    return [service(name, gateway, size, [] if played is None else played) for name in ("sums", "turns")]


def service(name: str, gateway: Gateway, size: int, played: list[str]) -> Service:
    async def play(order, id, so_far, called_back):
        played.append(id)
        env = Verifiable(functools.partial(chains.KINDS[name], level=1, instruction=""))
        return await rollout.play(env, gateway, task=order.task, seed=order.seed, id=id, so_far=so_far,
                                  called_back=called_back, options=Call(max_new_tokens=4, thinking=False))

    async def parity(one):
        return float(one.turns[0].completion.ids[0] % 2)

    return Service(name, ratio=1, most=2, size=size, seeds=lambda n: n, play=play, reward=parity)


def serving(driver: Driver) -> int:
    """The number of the policy, as of now: the gauges may lag behind a push."""
    return asyncio.run(driver.call(lambda engine: engine.version))


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.array(x) for x in jax.tree.leaves(tree)]


def same(one: Any, other: Any) -> list[bool]:
    """Of every parameter, whether it is the same bit for bit."""
    return [np.array_equal(x, y) for x, y in zip(leaves(one), leaves(other), strict=True)]


def tagged(tag: str) -> list[bool]:
    """Of every parameter, whether it has this tag."""
    return jax.tree.leaves(core_params.map_specs(lambda spec: tag in spec.tags, SPECS))


def steps_of(folder: pathlib.Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Rows(collections.UserDict):
    """A writer: {step: values}."""

    def write(self, step, values):
        self[step] = values

    def close(self):
        raise AssertionError("it is the caller's")


def test_problems_are_played_with_the_weights_that_are_served(driver):
    """As often as they are named, of each task in that order."""
    async def main() -> dict[str, list[Trajectory]]:
        return await stage.play(services(driver), {"turns": [5], "sums": [3, 8, 3], "none": []})

    found = asyncio.run(main())
    assert {task: [(one.task, one.seed) for one in played] for task, played in found.items()} == {
        "turns": [("turns", 5)], "sums": [("sums", 3), ("sums", 8), ("sums", 3)], "none": []}
    for one in (one for played in found.values() for one in played):
        sampled = one.turns[0].completion
        assert one.end.complete and one.reward == sampled.ids[0] % 2
        assert set(sampled.versions) == {serving(driver)}
    assert len({one.id for one in found["sums"]}) == 3


@pytest.mark.parametrize("name", ["reasoning", "agentic", "general", "distillation"])
def test_a_stage_with_every_algorithm(name, params, driver, tmp_path):
    """Invariants 5 and 8, and that neither what was given nor the indexers move."""
    algorithm, given, rows, played = getattr(algorithms, name)(), leaves(params), Rows(), []
    options: dict[str, Any] = {"size": 4}
    if algorithm.teachers:
        teachers = [init(CONFIG, jax.random.key(seed)) for seed in (1, 2)]
        options = {"size": 1, "teachers": Teachers(teachers, {"sums": 0, "turns": 1})}
    one = a_stage(algorithm)
    found = run(one, params, driver, tmp_path, played, writer=rows, **options)
    assert same(params, given) == [True] * len(given)
    assert same(found, given) == tagged("indexer") and any(tagged("indexer"))

    assert steps_of(tmp_path) == list(rows) == [1, 2, 3]
    assert any(row["grad_norm"] > 0 for row in rows.values()) and ("teacher_kl" in rows[1]) == algorithm.teachers
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        books, step_of = ledger.balance(), {one.number: one.step for one in ledger.policies()}
        batches = [ledger.batch(step) for step in (1, 2, 3)]
    assert books.dispatched == books.consumed + sum(books.dropped.values()) + books.in_flight
    assert books.consumed == sum(map(len, batches)) == STEPS * GROUPS and max(step_of) == serving(driver)
    consumed = [(step, one) for step, batch in enumerate(batches) for group in batch for one in group.members]
    assert {one.task for _, one in consumed} == {"sums", "turns"} and len(consumed) == books.consumed * options["size"]
    assert {step - step_of[one.first_version] for step, one in consumed} <= set(range(5 if name == "agentic" else 1))
    logged = {one["id"]: one["reward"] for one in transcripts.read(tmp_path / "transcripts.jsonl")}
    assert {id: logged[id] for id in (one.id for _, one in consumed)} == {one.id: one.reward for _, one in consumed}

    before, version, count = (tmp_path / "transcripts.jsonl").read_bytes(), serving(driver), len(played)
    again = run(one, params, driver, tmp_path, played, **options)
    assert all(same(again, found)) and steps_of(tmp_path) == [1, 2, 3]
    assert (len(played), serving(driver)) == (count, version)
    assert (tmp_path / "transcripts.jsonl").read_bytes() == before


class Cancelling(Rows):
    """Cancels the stage at its first step."""

    def write(self, step, values):
        super().write(step, values)
        asyncio.current_task().cancel()


def test_a_stage_goes_on_where_its_engine_has_served_others_meanwhile(params, driver, tmp_path):
    one = a_stage(save_every=1)
    with pytest.raises(asyncio.CancelledError):
        run(one, params, driver, tmp_path, writer=Cancelling())
    for _ in range(5):
        asyncio.run(stage.serve(params, driver))
    served = serving(driver)
    run(one, params, driver, tmp_path)
    assert steps_of(tmp_path) == [1, 2, 3] and serving(driver) == served + 3  # at its beginning, and behind two steps


@pytest.mark.parametrize("save_every, policies", [(1, [0, 1, 1, 2, 3]), (3, [0, 1, 0, 1, 2, 3])])
def test_a_stage_that_was_cancelled_goes_on_from_its_checkpoint(save_every, policies, params, driver, tmp_path):
    """Without a step twice, and with the groups that were in flight."""
    one, rows = a_stage(save_every=save_every), Cancelling()
    with pytest.raises(asyncio.CancelledError):
        run(one, params, driver, tmp_path, writer=rows)
    assert steps_of(tmp_path) == list(rows) == [1]
    run(one, params, driver, tmp_path)
    assert steps_of(tmp_path) == [1, 2, 3]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.balance() == Balance(STEPS * GROUPS, STEPS * GROUPS, {}, 0)
        assert [one.step for one in ledger.policies()][-len(policies):] == policies


def test_policies_are_numbered_on_where_another_stage_has_ended(params, driver, tmp_path):
    run(a_stage(steps=1), params, driver, tmp_path / "one")
    served, driver.gauges = serving(driver), Gauges()  # as if these had not been told yet
    run(a_stage(steps=1), params, driver, tmp_path / "two")
    with Ledger(tmp_path / "two" / "ledger.sqlite") as ledger:
        assert [(one.number, one.step) for one in ledger.policies()] == [(served, 0), (served + 1, 0), (served + 2, 1)]
        assert {one.first_version for group in ledger.batch(1) for one in group.members} == {served + 1}
    assert serving(driver) == served + 2


def test_indexers_move_where_nothing_is_frozen(params, driver, tmp_path):
    """Their matrices, by weight decay alone: no loss of a policy reaches them."""
    rule = partition.build(SPECS, learning_rate=1e-2, optimizer="adamw")
    one = a_stage(steps=1, optimizer=rule, options=Options(rows=2, frozen=()))
    found = run(one, params, driver, tmp_path)
    every = zip(same(found, params), tagged("indexer"), tagged("matrix"), strict=True)
    assert {(still, matrix) for still, indexer, matrix in every if indexer} == {(False, True), (True, False)}


def test_what_the_algorithm_says_goes_before_what_the_options_say(params, driver, tmp_path, monkeypatch):
    made = []

    def record(config, optimizer, loss, options):
        made.append((loss, options))
        raise InterruptedError

    monkeypatch.setattr(stage, "PolicyStep", record)
    algorithm = algorithms.agentic()
    one = a_stage(algorithm, options=Options(rows=3, max_grad_norm=2.0))
    with pytest.raises(InterruptedError):
        run(one, params, driver, tmp_path)
    assert made == [(algorithm.loss, Options("token_mean", rows=3, max_grad_norm=2.0))]
    assert one.plan == Plan(LENGTH, advantage=algorithm.advantage, reset_optimizer=True)


@pytest.mark.parametrize("field, value, message", [
    ("steps", 0, "Stage tiny: steps: expected a positive multiple of save_every = 2, found 0"),
    ("steps", 3, "Stage tiny: steps: expected a positive multiple of save_every = 2, found 3"),
    ("length", 0, "Plan.length: expected at least 1, found 0"),
    ("updates", 0, "Plan.updates: expected at least 1, found 0"),
    ("save_every", 0, "Plan.save_every: expected at least 1, found 0"),
])
def test_stages_that_make_no_sense(field, value, message):
    with pytest.raises(ValueError, match=message):
        a_stage(**{"steps": 4, "save_every": 2, field: value})


def test_teachers_are_given_where_the_algorithm_has_a_use_for_them(params, driver, tmp_path):
    """Else nothing is begun."""
    teachers = Teachers([params], {"sums": 0, "turns": 0})
    with pytest.raises(ValueError, match="Stage tiny: teachers: expected none, as its algorithm says, found some"):
        run(a_stage(), params, driver, tmp_path / "none", teachers=teachers)
    with pytest.raises(ValueError, match="Stage tiny: teachers: expected some, as its algorithm says, found none"):
        run(a_stage(algorithms.distillation()), params, driver, tmp_path / "none")
    assert not (tmp_path / "none").exists()
