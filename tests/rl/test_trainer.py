"""Groups of rollouts become a policy that the engines serve; and the whole way, from a sampled token to a gradient."""

import asyncio
import functools
import json
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.checkpoint.store import Store
from glm5_jax.core.metrics import collect, JsonlWriter
from glm5_jax.infer.engine import Engine
from glm5_jax.losses import distill, policy
from glm5_jax.model.config import ModelConfig
from glm5_jax.model.transformer import init, param_specs
from glm5_jax.optim import partition
from glm5_jax.records import Completion, Group, PolicyVersion, Trajectory, Turn
from glm5_jax.rl import batches, rollout, trainer, weights
from glm5_jax.rl.ledger import Ledger, Order
from glm5_jax.rl.loop import Loop, Problem
from glm5_jax.rl.schedule import Async, Sync
from glm5_jax.rl.trainer import Plan, PolicyTrainer, Teachers
from glm5_jax.serve.driver import Driver
from glm5_jax.serve.gateway import Gateway, Options as Call
from glm5_jax.text.tokenizer import Tokenizer
from glm5_jax.train import state as train_state
from glm5_jax.train.policy_step import Options, PolicyStep

CONFIG = ModelConfig(
    vocab_size=4096, hidden_size=8, num_hidden_layers=2, intermediate_size=8, moe_intermediate_size=4,
    n_routed_experts=2, num_experts_per_tok=1, mlp_layer_types=("dense", "sparse"), num_attention_heads=1,
    q_lora_rank=4, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, index_n_heads=1,
    index_head_dim=8, index_topk=4, max_position_embeddings=64, num_nextn_predict_layers=0, dtype="float32",
    remat="none")
RULE = partition.build(param_specs(CONFIG), learning_rate=1e-2, optimizer="adamw", frozen=("indexer",))


@pytest.fixture(scope="module")
def params():
    return init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def step():
    return PolicyStep(CONFIG, RULE, policy.double_sided_is, Options(aggregation="token_mean", rows=2))


async def nowhere(number: int, step: int, params: Any) -> PolicyVersion:
    return PolicyVersion(number, step)


@pytest.fixture
def make(params, step, tmp_path):
    """Trainers on one folder; each test closes what it made."""
    made: list[PolicyTrainer] = []

    def make(deliver=nowhere, step=step, rule=RULE, teachers=None, **plan: Any) -> PolicyTrainer:
        state = train_state.from_params(jax.tree.map(jnp.copy, params), rule)
        one = PolicyTrainer(state, step, rule, Store(tmp_path / "checkpoints"), deliver, Plan(length=24, **plan),
                            teachers)
        made.append(one)
        return one

    yield make
    for one in made:
        one.close()


def group(name: str, *rewards: float) -> Group:
    """Rollouts of five sampled tokens, with log-probs near those of an untrained model."""
    def one(number: int, reward: float) -> Trajectory:
        ids = [int(id) for id in np.random.default_rng([number, len(name)]).integers(10, 4000, 5)]
        turn = Turn([{"role": "user", "content": "?"}], {"role": "assistant", "content": "!"}, (1, 2, 3),
                    Completion(ids, [-8.32] * 5, [0] * 5, "stop"), reward=reward)
        return Trajectory(f"{name}-{number}", "sums", 1, [turn], "done")
    return Group(name, len(rewards), [one(i, reward) for i, reward in enumerate(rewards)])


BATCH = [group("a", 0.0, 1.0), group("bb", 1.0, 0.5)]


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_it_goes_on_from_its_newest_checkpoint(make):
    whole = make(save_every=2)

    async def some(one: PolicyTrainer, *steps: int) -> None:
        for number in steps:
            await one.train(number, BATCH)

    asyncio.run(some(whole, 1, 2, 3))
    whole.close()
    again = make(save_every=2)
    assert again.step == 2  # the third was never saved, and is taken anew
    asyncio.run(some(again, 3))
    assert again.step == 3
    for one, other in zip(leaves(again.params), leaves(whole.params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_engines_get_parameters_that_the_next_step_leaves_alone(make):
    got: list[tuple[int, int, Any]] = []

    async def deliver(number: int, step: int, params: Any) -> PolicyVersion:
        got.append((number, step, params))
        return PolicyVersion(number, step)

    async def two() -> None:
        one = make(deliver)
        await one.push(5)
        await one.train(1, BATCH)
        assert await one.push(6) == PolicyVersion(6, 1)

    asyncio.run(two())
    assert [(number, step) for number, step, _ in got] == [(5, 0), (6, 1)]
    assert any((one != other).any() for one, other in zip(leaves(got[0][2]), leaves(got[1][2])))


@pytest.mark.parametrize("reset", [False, True])
def test_after_a_push_the_optimiser_is_as_the_plan_says(make, reset):
    """Invariant 10."""
    async def one_step() -> PolicyTrainer:
        one = make(reset_optimizer=reset)
        await one.train(1, BATCH)
        await one.push(1)
        return one

    one = asyncio.run(one_step())
    fresh = leaves(RULE.init(one.params))
    assert all((found == new).all() for found, new in zip(leaves(one._state.opt_state), fresh, strict=True)) == reset


def test_a_batch_in_two_updates_compares_with_the_policy_before_both(make, params):
    seen: list[Any] = []

    class Watching:
        options = Options(rows=2)

        def log_probs(self, params, rows):
            return np.full(rows.tokens.shape, -1.5, np.float32)

        def __call__(self, state, rows):
            seen.append(rows)
            return state.replace(step=state.step + 1), {}

    one = make(step=Watching(), updates=2)
    asyncio.run(one.train(1, BATCH))
    assert len(seen) == 2 and all((rows.streams["logp_old"] == -1.5).all() for rows in seen)
    own = [set(rows.targets[rows.weights > 0].tolist()) for rows in seen]
    assert own == [{id for one in part.trajectories for id in one.turns[0].completion.ids} for part in BATCH]
    with pytest.raises(ValueError, match="expected a multiple of 2 groups .*, found 1"):
        asyncio.run(one.train(2, BATCH[:1]))


def test_a_step_that_was_begun_is_taken_though_it_is_cancelled(make):
    """Else a thread would go on with a state that others take for theirs."""
    begun, go_on = threading.Event(), threading.Event()

    class Slow:
        options = Options(rows=2)

        def __call__(self, state, rows):
            begun.set()
            assert go_on.wait(60)
            return state.replace(step=state.step + 1), {}

    async def cancel() -> None:
        one = make(step=Slow())
        task = asyncio.create_task(one.train(1, BATCH))
        while not begun.is_set():
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done() and one.step == 0
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert one.step == 1

    asyncio.run(cancel())


def alone(task: str, first: int, *sizes: int) -> Group:
    """One rollout of a context for each of `sizes`, so many sampled tokens; their ids count from `first` on."""
    ids, turns = iter(range(first, first + sum(sizes))), []
    for size in sizes:
        turns.append(Turn([{"role": "user", "content": "?"}], {"role": "assistant", "content": "!"}, (1, 2, 3),
                          Completion([next(ids) for _ in range(size)], [-8.32] * size, [0] * size, "stop")))
    return Group(f"{task}-{first}", 1, [Trajectory(f"{task}-{first}", task, 1, turns, "done")])


TAUGHT = [alone("sums", 100, 5), alone("turns", 200, 4, 2), alone("sums", 300, 3)]
STILL = partition.build(param_specs(CONFIG), learning_rate=1e-2, optimizer="adamw", weight_decay=0, frozen=("indexer",))


@pytest.fixture(scope="module")
def pupil():
    return PolicyStep(CONFIG, STILL, distill.distillation, Options(rows=2))


@pytest.fixture(scope="module")
def elders():
    """Far more certain than the student, each of something else."""
    return [{**one, "head": 20 * one["head"]} for one in (init(CONFIG, jax.random.key(seed)) for seed in (1, 2))]


def test_the_advantage_of_a_token_is_what_its_own_teacher_would_rather_have_said(make, params, step, elders):
    """A rollout of two contexts counts as much as the others, whatever it has earned."""
    seen: list[Any] = []

    class Watching:
        options = Options(rows=2)
        log_probs = step.log_probs

        def __call__(self, state, rows):
            seen.append(rows)
            return state.replace(step=state.step + 1), {}

    of = {"turns": 0, "sums": 1}
    one = make(step=Watching(), teachers=Teachers(elders, of))
    asyncio.run(one.train(1, TAUGHT))
    rows, = seen
    student, *teachers = (np.asarray(step.log_probs(one, rows)) for one in (params, *elders))
    places = list(zip(*np.nonzero(rows.weights)))
    assert len(places) == 5 + 4 + 2 + 3 and np.abs(teachers[0] - teachers[1])[rows.weights > 0].min() > 1e-4
    for place in places:
        id = rows.targets[place]
        task, share = ("sums", 1) if not 200 <= id < 300 else ("turns", (4 if id < 204 else 2) / 6)
        wanted = (teachers[of[task]][place] - student[place]) * share * 4 / 3  # four contexts of three rollouts
        np.testing.assert_allclose(rows.streams["advantage"][place], wanted, rtol=1e-5)


def test_a_teacher_that_is_the_student_moves_no_weight(make, params, pupil):
    one = make(step=pupil, rule=STILL, teachers=Teachers([params], {"sums": 0, "turns": 0}))
    for number in (1, 2):
        metrics = collect(asyncio.run(one.train(number, TAUGHT)))
        assert metrics["grad_norm"] == metrics["teacher_kl"] == 0
    for found, before in zip(leaves(one.params), leaves(params), strict=True):
        np.testing.assert_array_equal(found, before)


def test_the_student_comes_nearer_to_another_teacher(make, params, pupil, elders):
    """The mean of half the squared gap: of the estimates of the KL the one whose gradient on given tokens this is."""
    one = make(step=pupil, rule=STILL, teachers=Teachers(elders, {"sums": 1, "turns": 1}))
    rows = batches.of_groups(TAUGHT, length=24, multiple=2, advantage=lambda rewards, _: rewards,
                             aggregation="token_mean")

    def gap(params: Any) -> float:
        apart = np.asarray(pupil.log_probs(params, rows) - pupil.log_probs(elders[1], rows))
        return (apart[rows.weights > 0] ** 2).mean() / 2

    gaps = [gap(params)]
    for number in range(1, 7):
        asyncio.run(one.train(number, TAUGHT))
        gaps.append(gap(one.params))
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.7 * gaps[0]


def test_teachers_that_are_not_there(make, params):
    for number in (1, -1):
        with pytest.raises(ValueError, match=rf"Teachers.of\['sums'\]: expected one of 1 policies, found {number}"):
            Teachers([params], {"turns": 0, "sums": number})
    one = make(teachers=Teachers([params], {"sums": 0}))
    with pytest.raises(ValueError, match=r"expected a teacher for task 'turns', found those of \['sums'\]"):
        asyncio.run(one.train(1, TAUGHT))
    assert one.step == 0


def test_policies_are_published_told_and_pruned(params, tmp_path):
    told: list[tuple[int, list[int]]] = []

    async def tell(number: int) -> None:
        told.append((number, weights.numbers(tmp_path)))

    async def three() -> list[PolicyVersion]:
        deliver = trainer.to_folder(tmp_path, tell, keep=2)
        return [await deliver(number, number * 10, params) for number in (1, 2, 3)]

    found = asyncio.run(three())
    assert [number for number, _ in told] == [1, 2, 3] and all(number in there for number, there in told)
    assert weights.numbers(tmp_path) == [2, 3] and weights.fetch(tmp_path, 3, params)[0] == found[-1]


@pytest.mark.parametrize("field", ["length", "updates", "save_every"])
def test_plans_that_make_no_sense(field):
    with pytest.raises(ValueError, match=f"Plan.{field}: expected at least 1, found 0"):
        Plan(**{"length": 8, field: 0})


class Parity:
    """Two questions; a reply earns the parity of its length."""

    def reset(self, seed: int):
        self.asked = 0
        return [{"role": "user", "content": f"{seed}?"}], ()

    def step(self, message):
        self.asked += 1
        return [{"role": "user", "content": "and?"}], float(len(message["content"]) % 2), self.asked == 2

    def close(self) -> None:
        pass


class Playing:
    """Rollouts of one environment through the gateway."""

    def __init__(self, gateway: Gateway):
        self._gateway, self._events = gateway, dict[str, asyncio.Event]()

    def restore(self, tasks) -> None:
        pass

    def next(self, number: int) -> Problem:
        return Problem("parity", number, 4)

    async def play(self, order: Order, id: str, so_far: Trajectory | None) -> Trajectory:
        event = self._events.setdefault(id, asyncio.Event())
        return await rollout.play(Parity(), self._gateway, task=order.task, seed=order.seed, id=id, so_far=so_far,
                                  called_back=event, options=Call(max_new_tokens=6, thinking=False))

    def call_back(self, ids) -> None:
        for id in ids:
            self._events.setdefault(id, asyncio.Event()).set()

    def played(self, group: str, task: str) -> None:
        pass

    def ended(self, group: str, task: str, consumed: bool) -> None:
        pass


@pytest.mark.parametrize("scheduler", [Sync(2), Async(2, 1)])
def test_from_a_sampled_token_to_a_gradient(params, step, tmp_path, scheduler):
    """Invariants 5, 8 and 17: engine, gateway, ledger, packing, step, and the weights back to the engine."""
    async def run() -> list[dict[str, float]]:
        engine = Engine(params, CONFIG, slots=4, max_len=48, chunk=8, block=4)
        with Driver(engine) as driver, Ledger(tmp_path / "ledger.sqlite") as ledger:
            gateway = Gateway(driver, Tokenizer.packaged())
            state = train_state.from_params(jax.tree.map(jnp.copy, params), RULE)
            learner = PolicyTrainer(state, step, RULE, Store(tmp_path / "checkpoints"), trainer.to_driver(driver),
                                    Plan(length=48, advantage=functools.partial(
                                        trainer.advantage.group_advantage, std=False)))
            writer = JsonlWriter(tmp_path / "metrics.jsonl")
            await Loop(ledger, scheduler, Playing(gateway), learner, writer=writer, totals=driver.totals).run(3)
            writer.close()
            learner.close()
            await gateway.shutdown()
            balance = ledger.balance()
            assert (balance.consumed, balance.dropped) == (6, {})
            assert balance.dispatched == balance.consumed + balance.in_flight
            policies = {one.number: one.step for one in ledger.policies()}
            assert sorted(policies.values()) == [0, 1, 2, 3] and driver.gauges.version == max(policies)
            for number in range(3):
                for one in (one for group in ledger.batch(number + 1) for one in group.trajectories):
                    assert len(one.turns) == 2 and one.turns[1].extends == 0
                    assert 0 <= number - policies[one.first_version] <= getattr(scheduler, "bound", 0)
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    rows = asyncio.run(run())
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert 0 <= row["engine/idle"] <= 1 and row["engine/tokens_per_second"] > 0 and 0 <= row["engine/cache_hit"] < 1
    if isinstance(scheduler, Sync):  # what the engine stamped is what the trainer computes of the same ids
        assert max(row["mismatch/log_max"] for row in rows) < 1e-4
        assert max(abs(row["ppo_kl"]) for row in rows) == 0
