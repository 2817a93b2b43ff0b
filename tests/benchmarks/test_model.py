"""benchmarks/model.py without torch and at toy size: every job of ours runs, the attention part writes its results.

No time is asserted.
"""

import json

import jax
import numpy as np
import pytest

import glm5_jax as glm5


@pytest.fixture
def config() -> glm5.ModelConfig:
    return glm5.tiny(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, first_k_dense_replace=0, moe_intermediate_size=8,
        n_routed_experts=4, index_topk=8, query_chunk=8, num_nextn_predict_layers=0)


@pytest.mark.slow
def test_every_job_of_ours_runs(benchmarks, config):
    model = benchmarks("model")
    params = glm5.init(config, jax.random.key(0))
    sizes = model.Sizes(prefill=(2, 12), train=(1, 12), prompt=8, new=4, batches=(2,))
    work = model.ours(config, params, sizes)
    assert [model.count(workload, sizes) for workload in work] == [24, 12, 8]
    assert {workload.split(",")[0] for workload in work} == set(model.AIMS)
    run = lambda workload: (job := work[workload]["ours"]).run(*job.prepare())
    np.testing.assert_array_equal(run("decode, batch 2")[:, -1], run("prefill")[0].argmax(-1))
    assert len(work["training step"]) == len(model.REMATS)
    for job in work["training step"].values():  # traced only: compiling it would be most of this test
        assert {"lm_loss", "grad_norm"} <= set(jax.eval_shape(job.run, *job.prepare()))


@pytest.mark.slow
def test_the_attention_part_measures_itself_and_replaces_nothing(benchmarks, config, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmarks("model").glm5, "small", lambda: config)
    arguments = ["--parts", "attention", "--lengths", "16", "32", "--attention-rounds", "1", "--out", str(tmp_path)]
    benchmarks("model").main(arguments)
    path, = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert path.name == f"model-{record['date']}-cpu.json"
    assert set(record["attention"]["lengths"]) == {"16", "32"}
    assert set(record["attention"]["exponents"]) == {"dense", "sparse", "selection", "gathered attention"}
    assert {"date", "device", "processor", "cores", "versions"} <= set(record)
    assert str(path) in capsys.readouterr().out

    first = path.read_text()
    again = benchmarks("measure").write(tmp_path, "model", record | {"rounds": 0})
    assert (again.name, path.read_text()) == (f"model-{record['date']}-cpu-2.json", first)


def test_jobs_take_turns_and_warm_up_untimed(benchmarks):
    calls = []
    job = lambda name: benchmarks("measure").Job(calls.append, lambda: (name,))
    seconds = benchmarks("measure").taking_turns({"a": job("a"), "b": job("b")}, rounds=3)
    assert calls == ["a", "b"] * 5
    assert {name: len(found) for name, found in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_and_exponents_are_what_they_say(benchmarks):
    row = benchmarks("measure").speed({"them": [2.0, 6.0, 3.0], "us": [1.0, 1.0, 2.0]}, "them")["us"]
    assert row == {"seconds": 1.0, "ratio": 2.0, "ratio_lowest": 1.5, "ratio_highest": 6.0}
    assert benchmarks("measure").growth([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
