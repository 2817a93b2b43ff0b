"""The walk through stages: who trains in which, what passes from one to the next, and that any stop resumes exactly."""

import dataclasses

import jax
import numpy as np
import pytest

from glm5_jax.checkpoint.store import Store
from glm5_jax.core.metrics import JsonlWriter
from glm5_jax.model import transformer
from glm5_jax.optim import partition, schedules
from glm5_jax.train import loop, report, stages as train_stages, state as train_state
from glm5_jax.train.stages import KINDS, Stage
from glm5_jax.train.step import Options

CADENCE = loop.Cadence(log_every=1, save_every=2)
OPTIONS = Options(mtp_steps=1, router_bias_rate=0.01)


@pytest.fixture(scope="module")
def small(config):
    return config.replace(num_hidden_layers=2, mlp_layer_types=("sparse", "sparse"))


@pytest.fixture(scope="module")
def stages(small):
    def stage(kind, steps, keep=False, **changes):
        config, options = small.replace(**changes), KINDS[kind](OPTIONS)
        optimizer = partition.build(transformer.param_specs(config), optimizer="adamw", frozen=options.frozen,
                                    trainable=options.trainable, learning_rate=schedules.linear(1e-2, 1e-3, total=64))
        return Stage(kind, steps, config, options, optimizer, keep)

    return (stage("pretrain", 3), stage("midtrain", 2, keep=True, rope_theta=1e3), stage("dsa_warmup", 2),
            stage("dsa_sparse", 2), stage("sft", 1))


class Stopping:
    """Batches that end the process, so to speak, when the next one is asked for after `left`."""

    def __init__(self, batches, left):
        self.batches, self.left = batches, left

    def __next__(self):
        if not self.left:
            raise RuntimeError("stopped here")
        self.left -= 1
        return next(self.batches)

    def get_state(self):
        return self.batches.get_state()

    def set_state(self, state):
        self.batches.set_state(state)


def walk(directory, stages, batches, left=100, seen=None):
    """One start of the same command; `seen` gathers (stage, parameters) of each evaluation."""
    def evaluate(stage, params):
        if seen is not None:
            seen.append((stage.name, jax.tree.map(np.asarray, params)))
        leaves = jax.tree.leaves(params)
        return {"size": float(sum(abs(leaf).sum() for leaf in leaves))}

    source = {stage.name: Stopping(batches(seed), left) for seed, stage in enumerate(stages)}
    directory.mkdir(exist_ok=True)
    writer = JsonlWriter(directory / "metrics.jsonl")
    try:
        return train_stages.run(
            stages, params=lambda: transformer.init(stages[0].config, jax.random.key(0)),
            batches=lambda stage: source[stage.name], store=lambda stage: Store(directory / "checkpoints"),
            writer=writer, cadence=CADENCE, evaluate=evaluate)
    finally:
        writer.close()


@pytest.fixture(scope="module")
def whole(stages, rows, tmp_path_factory):
    """The final state, the evaluations, and the directory of a walk without a stop."""
    from glm5_jax.data import packing
    directory, seen = tmp_path_factory.mktemp("whole"), []
    batches = lambda seed: iter(packing.batches(rows, batch_size=2, seed=seed))
    return walk(directory, stages, batches, seen=seen), seen, directory


def changed(before, after):
    """Which kinds of parameters moved."""
    kinds = set()
    for (path, old), new in zip(jax.tree_util.tree_flatten_with_path(before)[0], jax.tree.leaves(after)):
        name = jax.tree_util.keystr(path)
        if not np.array_equal(old, new):
            kinds.add("indexer" if "indexer" in name else "router_bias" if "router_bias" in name else "model")
    return kinds


@pytest.mark.slow
def test_each_stage_trains_what_it_should(whole):
    _, seen, _ = whole
    names = [name for name, _ in seen]
    assert names == ["pretrain", "pretrain", "midtrain", "midtrain", "dsa_warmup", "dsa_warmup", "dsa_sparse",
                     "dsa_sparse", "sft", "sft"]  # before and after of each
    moved = {names[i]: changed(seen[i][1], seen[i + 1][1]) for i in range(0, len(names), 2)}
    everything = {"indexer", "model", "router_bias"}
    assert moved == {"pretrain": {"model", "router_bias"}, "midtrain": {"model", "router_bias"},
                     "dsa_warmup": {"indexer"}, "dsa_sparse": everything, "sft": everything}
    for i in range(1, len(names) - 1, 2):  # what one stage ends with the next begins with
        assert changed(seen[i][1], seen[i + 1][1]) == set()


def test_measures_stand_before_and_after_each_stage(whole, stages):
    state, seen, directory = whole
    rows = report.read_rows(directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(11))
    assert {name for name in rows[3] if "/" in name and "size" in name} == {"pretrain/size/after",
                                                                            "midtrain/size/before"}
    summary = report.stages(rows, report.ends({stage.name: stage.steps for stage in stages}))
    assert [(name, values["steps"]) for name, values in summary.items()] == [
        ("pretrain", 3), ("midtrain", 2), ("dsa_warmup", 2), ("dsa_sparse", 2), ("sft", 1)]
    sizes = [float(sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(params))) for _, params in seen]
    for index, values in enumerate(summary.values()):
        before, after = sizes[2 * index:2 * index + 2]
        assert values["size"] == {"before": pytest.approx(before), "after": pytest.approx(after)}
    in_all = sum(values["tokens"] for values in summary.values())
    assert in_all == int(state.tokens_seen[1]) and int(state.step) == 10
    assert int(state.stage_tokens[1]) == summary["sft"]["tokens"]
    assert "sft" in report.table(summary)


@pytest.mark.slow
def test_stopped_anywhere_it_resumes_exactly(whole, stages, batches, tmp_path, capsys):
    state, _, directory = whole
    starts = 0
    while True:
        starts += 1
        try:  # every start gets three batches of each stage, so that it ends in another place
            again = walk(tmp_path / "parts", stages, batches, left=1 + starts % 2)
            break
        except RuntimeError as error:
            assert "stopped here" in str(error)
        assert starts < 20
    assert starts > 2 and "Resumed from step" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, again.replace(guard=None), state.replace(guard=None))
    timed = {"tokens_per_second"}
    plain = lambda path: [{name: value for name, value in row.items() if name not in timed}
                          for row in report.read_rows(path / "metrics.jsonl")]
    assert [row["step"] for row in plain(tmp_path / "parts")] == [row["step"] for row in plain(directory)]
    assert plain(tmp_path / "parts")[-1]["sft/size/after"] == plain(directory)[-1]["sft/size/after"]


@pytest.mark.slow
def test_a_resumed_walk_compiles_each_step_once(stages, batches, tmp_path, caplog):
    """And the same program as the walk that was stopped, so that the cache on disk has it."""
    def compiled():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return [text for text in messages if text.startswith("Compiling") and "train_step" in text]

    with jax.log_compiles():
        with pytest.raises(RuntimeError, match="stopped here"):
            walk(tmp_path, stages[:1] + stages[2:3], batches, left=2)
        [before] = compiled()
        walk(tmp_path, stages[:1] + stages[2:3], batches)
        again, following = compiled()
    assert again == before != following


def test_a_stage_may_keep_what_the_optimiser_remembers(small, stages):
    state = train_state.create(small, stages[0].optimizer, jax.random.key(0))
    moved = state.replace(opt_state=jax.tree.map(lambda x: x + 1, state.opt_state),
                          stage_tokens=state.stage_tokens + 5, tokens_seen=state.tokens_seen + 7)
    kept = train_state.next_stage(moved, stages[1].optimizer, keep=True)
    jax.tree.map(np.testing.assert_array_equal, kept.opt_state, moved.opt_state)
    fresh = train_state.next_stage(moved, stages[0].optimizer)
    jax.tree.map(np.testing.assert_array_equal, fresh.opt_state, state.opt_state)
    with pytest.raises(ValueError, match="keep: expected an optimiser for the same parameters"):
        train_state.next_stage(moved, stages[2].optimizer, keep=True)
    assert kept.stage_tokens.sum() == fresh.stage_tokens.sum() == 0 and kept.tokens_seen.sum() == 14


def test_what_makes_no_walk(stages, batches, tmp_path):
    with pytest.raises(ValueError, match=r"each with a name of its own, found \['pretrain', 'pretrain'\]"):
        walk(tmp_path / "twice", stages[:1] * 2, batches)
    with pytest.raises(ValueError, match="Stage sft: expected at least 1 step, found 0"):
        dataclasses.replace(stages[-1], steps=0)
    with Store(tmp_path / "long" / "checkpoints") as store:
        store.save(12, {"w": np.ones(2)}, {})
    with pytest.raises(ValueError, match="newest checkpoint is of step 12, but the stages end at 10"):
        walk(tmp_path / "long", stages, batches)
