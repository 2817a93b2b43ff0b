"""The experiments that stand behind claims: each runs in its quick mode, and what it measures with is right.

What they find is not asserted: quick is too small to find anything.
"""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Callable, Iterator

import jax
import numpy as np
import pytest

from glm5_jax.model import mla, transformer
from glm5_jax.model.primitives import rms_norm, rope_table

EVIDENCE = Path(__file__).parents[1] / "experiments" / "evidence"
NAMES = sorted(path.stem for path in EVIDENCE.glob("*.py"))


@pytest.fixture
def evidence(monkeypatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports an experiment by name, as `python experiments/evidence/<name>.py` finds it and what lies beside it."""
    monkeypatch.syspath_prepend(str(EVIDENCE))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


def quick(module: ModuleType, folder: Path) -> dict:
    """What the quick mode of an experiment writes."""
    module.main(["--quick", "--out", str(folder)])
    path, = folder.iterdir()
    return json.loads(path.read_text())


# Muon Split, Muon, AdamW.

def course(loss: float, *logits: float) -> dict:
    points = [{"tokens": 8 * number, "loss": loss, "largest_logit": logit} for number, logit in enumerate(logits, 1)]
    return {"learning_rate": 1e-2, "seed": 0, "points": points, "skipped": 0.0}


def test_claims_about_muon_split_compare_the_means_of_its_seeds(evidence):
    muon_split = evidence("muon_split")
    runs = {"muon_split": [course(3.0, 1.0, 2.0), course(5.0, 4.0, 1.0)], "muon": [course(3.5, 5.0, 4.0)] * 2,
            "adamw": [course(4.5, 1.0, 1.0)] * 2}
    results = {name: {"grid": each[:1], "runs": each} for name, each in runs.items()}
    logits, by_muon, by_adamw = muon_split.claims(results)
    assert (logits.found, logits.holds) == (pytest.approx(3 / 5), True)
    assert (by_muon.found, by_muon.holds) == (pytest.approx(0.5), False)
    assert (by_adamw.found, by_adamw.holds) == (pytest.approx(-0.5), True)
    assert "4.5" in muon_split.show(results)


@pytest.mark.parametrize("best, rates", [
    (3, [1, 3, 9]), (9, [1, 3, 9, 27]), (1 / 9, [1 / 27, 1 / 9, 1 / 3, 1, 3, 9]), (1000, [1, 3, 9, 27, 81, 243])])
def test_the_grid_grows_until_its_best_rate_is_inside(evidence, best, rates):
    muon_split = evidence("muon_split")
    run = lambda rate, steps, seed: course(abs(np.log(rate / best)), 0.0) | {"learning_rate": rate}
    sizes = muon_split.QUICK._replace(rates=(1.0, 3.0, 9.0), more_rates=3)
    found = [each["learning_rate"] for each in muon_split.search(run, sizes)]
    np.testing.assert_allclose(found, rates)


@pytest.mark.slow
def test_the_largest_logit_is_that_of_absorbed_attention(evidence):
    muon_split = evidence("muon_split")
    bench = muon_split.prepare(muon_split.QUICK)
    config, batch = bench.config, bench.held_out
    params = transformer.init(config, jax.random.key(0))
    layer = jax.tree.map(lambda x: x[0, 0], params["layers"]["0"])
    u = rms_norm(params["embedding"][batch.tokens], layer["input_norm"], config.rms_norm_eps)
    rope = rope_table(batch.positions, config.qk_rope_head_dim, config.rope_theta)
    q = mla.queries(layer["attention"], config, mla.query_latent(layer["attention"], config, u), rope)
    logits = np.einsum("bthr,bsr->bhts", mla.absorb_queries(layer["attention"], config, q),
                       mla.latent_rows(layer["attention"], config, u, rope)) / np.sqrt(config.qk_head_dim)
    logits = logits[(batch.segment_ids != 0).all(1)]
    alone = np.tril(np.ones(logits.shape[-2:], bool)) & (batch.segment_ids[:1, :, None] == batch.segment_ids[:1, None])
    found = muon_split.largest_logits(params, config, jax.tree.map(lambda x: x[:1], batch))
    assert found.shape == (4, config.num_attention_heads)
    np.testing.assert_allclose(found[0], np.where(alone, logits[:1], -np.inf).max((0, 2, 3)), rtol=1e-4)


@pytest.mark.slow
def test_muon_split_in_quick(evidence, tmp_path):
    found = quick(evidence("muon_split"), tmp_path)
    assert set(found["results"]) == {"muon_split", "muon", "adamw"}
    for each in found["results"].values():
        assert (len(each["grid"]), len(each["runs"])) == (3, 2)  # of two rates, one is at the end of the grid
        assert [point["tokens"] for point in each["runs"][0]["points"]] == [96, 192]


# MTP: three trained steps and one.

def test_agreement_of_drafts_by_hand(evidence):
    trunk = np.array([[5, 6, 7, 8, 9, 6]])  # row t is for token t+1
    drafts = np.array([[[6, 7, 0, 9, 0, 0]],   # row t is for token t+2, which the trunk chooses in row t+1
                       [[7, 0, 9, 0, 0, 0]]])  # and this for t+3
    one = np.ones_like(trunk)
    found = evidence("mtp_sharing").agreement(trunk, drafts, one)
    assert found["positions"] == 4  # rows 0 to 3 have a row two ahead
    assert found["steps"] == [3 / 4, 2 / 4]
    assert found["tokens_per_verification"] == 1 + (2 + 1 + 0 + 1) / 4  # right behind wrong counts for nothing
    assert found["constant"] == 2 / 6
    cut = evidence("mtp_sharing").agreement(trunk, drafts, np.array([[1, 1, 1, 2, 2, 0]]))
    assert (cut["positions"], cut["steps"], cut["constant"]) == (1, [1, 1], 1 / 5)


@pytest.mark.slow
def test_mtp_sharing_in_quick(evidence, tmp_path):
    found = quick(evidence("mtp_sharing"), tmp_path)
    assert set(found["results"]["runs"]) == {"3 trained", "1 trained"}
    for run in sum(found["results"]["runs"].values(), []):
        assert len(run["steps"]) == 4
        assert all(1 <= run[name] <= 5 for name in ("tokens_per_verification", "greedy", "drawn"))


# DSA adaptation and length extension: both look for needles.

def test_rows_to_learn_from_answer_their_questions(evidence):
    recall = evidence("recall")
    words = recall.words(6)
    batch = recall.rows(words, 0, 20, 40, facts=4, questions=6, rest=0.1)
    fact, ask = (words.numbers(word)[0] for word in (words.fact, words.ask))
    for tokens, targets, weights in zip(batch.tokens, batch.targets, batch.weights):
        facts = {tokens[at + 1]: tokens[at + 2] for at in np.flatnonzero(tokens == fact)}
        keys, asked = np.flatnonzero(tokens == ask) + 1, np.flatnonzero(weights == 1)
        assert len(facts) == 4 and set(facts) <= set(words.numbers(*words.style.keys))
        assert asked.tolist() == keys.tolist() == list(range(23, 40, 3))
        assert [facts[key] for key in tokens[asked]] == targets[asked].tolist()
        assert set(tokens[asked[:4]]) == set(facts)  # each once before any again
        np.testing.assert_array_equal(tokens[1:], targets[:-1])
        np.testing.assert_allclose(weights.sum(), 6 + 0.1 * 33, rtol=1e-6)


def test_needles_are_the_tasks_of_the_library(evidence):
    recall = evidence("recall")
    words = recall.words(6)
    needles = recall.needles(words, 0, 3, 40, facts=4)
    for task, tokens, targets, asked in zip(needles.tasks, needles.batch.tokens, needles.batch.targets,
                                            needles.asked_NQ):
        text = words.tokenizer.decode([int(id) for id in words.ids[tokens]])
        questions = "".join(f" {words.ask} {key} {value}" for key, value in zip(task.prompt.split()[-4:], task.answers))
        assert text == task.prompt.rpartition(f" {words.ask} ")[0] + questions
        assert task.score(words.tokenizer.decode([int(id) for id in words.ids[targets[asked]]])) == 1


def test_only_indexers_are_shuffled(evidence):
    model = evidence("walk").model(4)
    params = jax.device_get(transformer.init(model, jax.random.key(0)))
    other = evidence("dsa_adaptation").shuffled(params, 1)
    moved = set()
    for (path, before), after in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(other)):
        np.testing.assert_array_equal(np.sort(before, None), np.sort(after, None))
        if not np.array_equal(before, after):
            moved.add(jax.tree_util.keystr(path, simple=True, separator="/").partition("/0/")[2])
    assert moved == {"indexer/q", "indexer/k", "indexer/weights"}


def test_claims_about_length_are_read_at_the_ends(evidence):
    extension = evidence("length_extension")
    share = {("pretrain_512", 512): 1.0, ("pretrain_512", 4096): 0.4, ("midtrain_4096", 512): 0.95,
             ("midtrain_4096", 4096): 0.8}
    found = {"models": [{"model": model, "length": length, "found": value} for (model, length), value in share.items()]}
    claims = extension.judge(found, extension.FULL)
    assert [(claim.found, claim.holds) for claim in claims] == [(1.0, True), (0.4, True), (0.8, False), (0.95, True)]


@pytest.mark.slow
def test_dsa_adaptation_in_quick(evidence, tmp_path):
    found = quick(evidence("dsa_adaptation"), tmp_path)["results"]
    assert [row["attention"] for row in found["models"]] == ["dense", "sparse", "sparse", "sparse", "dense", "sparse"]
    assert found["models"][0] != found["models"][1]
    for kinds in found["agreement"].values():
        assert set(kinds) == {"indexer", "recency", "uniform"}
    before, warm, _ = (kinds["indexer"]["kl"] for kinds in found["agreement"].values())
    assert len(before) == 2 and before != warm


@pytest.mark.slow
def test_length_extension_in_quick(evidence, tmp_path):
    found = quick(evidence("length_extension"), tmp_path)["results"]["models"]
    assert [(row["model"], row["length"]) for row in found[::2]] == [
        ("pretrain_16", 16), ("pretrain_16, new base alone", 16), ("midtrain_32", 16)]
    assert found[0]["token_nats"] != found[2]["token_nats"] != found[4]["token_nats"]


# Reasoning RL.

def test_shuffled_rewards_stay_in_their_group(evidence):
    reasoning = evidence("reasoning_rl")
    rewards, groups = np.array([1.0, 0, 0, 1, 1, 0, 1, 0]), np.array([0, 1, 0, 1, 0, 1, 2, 2])
    rng, seen = np.random.default_rng(0), set()
    for _ in range(20):
        found = np.asarray(reasoning.shuffled_advantage(rng, rewards, groups))
        for group in range(3):
            plain = np.asarray(reasoning.advantage.group_advantage(rewards, groups))[groups == group]
            np.testing.assert_allclose(np.sort(found[groups == group]), np.sort(plain), rtol=1e-6)
        seen.add(tuple(found))
    assert len(seen) > 5


def test_claims_about_reasoning_take_the_worst_seed(evidence):
    reasoning = evidence("reasoning_rl")
    run = lambda before, after, moved=0.0: {
        "before": {"sampled": before}, "after": {"sampled": after}, "seconds": 100 * after, "moved": {"indexer": moved}}
    found = {"runs": {"seed 0": run(0.25, 0.75), "seed 1": run(0.5, 0.75, 1e-9), "shuffled rewards": run(0.25, 0.3125)}}
    claims = reasoning.judge(found)
    assert [(claim.found, claim.holds) for claim in claims] == [
        (0.25, True), (0.5, True), (25.0, False), (75.0, True), (6.25, False), (1e-9, False)]


@pytest.mark.slow
def test_reasoning_rl_in_quick(evidence, tmp_path):
    runs = quick(evidence("reasoning_rl"), tmp_path)["results"]["runs"]
    assert list(runs) == ["seed 0", "shuffled rewards"]
    for run in runs.values():
        assert run["moved"]["indexer"] == 0 and len(run["reward/mean"]) == 2
        assert run["before"]["tokens"] > 0 and set(run["practised"]) == {"sums", "products", "turns"}
