"""benchmarks/gpu.py at toy size, its kernels interpreted: every part runs, what is wrong is named and not measured, and
results are kept after every part. No time is asserted.
"""

import json
import math
import re
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest

KERNELS = {"implementation": "pallas_gpu", "interpret": True}


@pytest.fixture
def gpu(benchmarks) -> ModuleType:
    return benchmarks("gpu")


def run(gpu: ModuleType, folder: Path, *arguments: str) -> tuple[int, dict]:
    """The exit code and the record of one run."""
    code = gpu.main(["--toy", "--rounds", "1", "--out", str(folder), *arguments])
    path, = folder.iterdir()
    return code, json.loads(path.read_text(encoding="utf-8"))


def bench(gpu: ModuleType, **rates: float):
    rates = {"copied": 1e9, "multiplied": 1e12, **rates}
    return gpu.Bench(gpu.TOY, gpu.Pace(rounds=1), KERNELS, **rates)


def test_parity_comes_first_and_a_part_is_kept_with_its_ceilings(gpu, tmp_path, capsys):
    code, record = run(gpu, tmp_path, "--only", "G1")
    assert code == 0
    assert list(record["parity"]) == ["index_scores"]  # no kernel that G1 does not rest on
    errors = record["parity"]["index_scores"]["small float32"]
    assert set(errors) == {"forward", "gradient of q", "gradient of k", "gradient of w"} and max(errors.values()) < 1e-5
    assert set(record["ceilings"]) == {"copy", "product"}
    rows = record["G1"]["8 x 24"]
    work = 2 * 2 * 16 * sum(range(17, 25)) / rows["index_scores"]["seconds"]
    assert rows["index_scores"]["of_matmul"] == pytest.approx(work / record["ceilings"]["product"]["per_second"])
    assert rows["index_scores"]["aims"] == {"of_matmul": 0.55}
    assert {"date", "device", "versions", "toy"} <= set(record)
    assert "(aim: at least 0.55)" in capsys.readouterr().out


def wrong_by_one(scores):
    return lambda *args, **options: scores(*args, **options) * 1.01


def raises(_):
    def kernel(*args, **options):
        raise ValueError("no such registers")
    return kernel


@pytest.mark.parametrize("spoil, message", [
    (wrong_by_one, "forward: expected within 1e-05 of the reference, found 1.0e-02"),
    (raises, "ValueError: no such registers")])
def test_what_a_broken_kernel_would_be_measured_by_is_left_out(gpu, monkeypatch, tmp_path, capsys, spoil, message):
    kernel = gpu.gpu_parity.pallas_kernels.index_scores
    broken = spoil(kernel)
    spoiled = lambda *args, implementation, **options: (
        broken if implementation == "pallas_gpu" else kernel)(*args, implementation=implementation, **options)
    monkeypatch.setattr(gpu.gpu_parity.pallas_kernels, "index_scores", spoiled)
    monkeypatch.setitem(gpu.PARTS, "G5", gpu.PARTS["G5"]._replace(measure=lambda _: {"measured": {}}, kernels=()))
    code, record = run(gpu, tmp_path, "--only", "G1,G5")
    assert code == 1
    assert record["G1"] == {"failed": "left out: wrong results of index_scores"}
    assert record["G5"] == {"measured": {}}
    printed = capsys.readouterr().out
    assert f"WRONG parity, index_scores, small float32: {message}" in printed
    assert "WRONG G1: left out: wrong results of index_scores" in printed


@pytest.mark.parametrize("kernel, results", [
    ("select_topk", {"indices"}), ("sparse_mla_decode", {"forward"}),
    pytest.param("sparse_mla", {"forward", "gradient of q", "gradient of kv", "gradient of q, any order",
                                "gradient of kv, any order"}, marks=pytest.mark.slow),
    pytest.param("grouped_matmul", {"forward", "gradient of x", "gradient of w"}, marks=pytest.mark.slow)])
def test_every_kernel_has_the_results_of_its_reference(gpu, kernel, results):
    found = gpu.gpu_parity.compared(kernel, gpu.gpu_parity.SMALL[0], KERNELS)
    assert set(found) == results and max(found.values()) <= gpu.gpu_parity.TOLERANCE["float32"]


def test_one_wrong_index_and_one_missing_value_are_seen(gpu):
    apart = gpu.gpu_parity._apart
    x = jnp.asarray([1.0, -jnp.inf, 3.0])
    assert apart(x, x) == 0
    assert apart(x.at[1].set(0), x) == jnp.inf
    assert jnp.isnan(apart(x.at[0].set(jnp.nan), x))
    assert apart(jnp.asarray([3, 5, -1]), jnp.asarray([3, 4, -1])) > 0


@pytest.mark.slow
@pytest.mark.parametrize("part, what", [
    ("G2", {"2 rows of 24": {"select_topk", "lax.top_k"},
            "2 x 24 with scores": {"select_topk", "index_scores, lax.top_k"}}),
    ("G3", {"4 queries of 24": {"sparse_mla", "XLA", "with gradient", "with gradient, any order"},
            "sequence of 16": {"sparse", "dense, xla"}}),
    ("G4", {"2 x 24": {"both", "select_topk", "sparse_mla_decode"}}),
    ("G5", {"4 rows each, even": {f"{name}{end}" for name in ("grouped_matmul", "lax.ragged_dot", "dense")
                                  for end in ("", " with gradient")},
            "4 rows each, zipf": {"grouped_matmul", "lax.ragged_dot", "dense"}}),
    ("G6", {"16 tokens": {"whole", "projections", "selection", "attention", "experts"}}),
    ("tiles", {"index_scores": {"128 x 128", "64 x 128"}, "select_topk": {"128 x 128", "64 x 128"},
               "select_topk, decoding": {"128 x 128", "16 x 128"}, "sparse_mla": {"64 x 16", "32 x 16"},
               "sparse_mla, gradient": {"32 x 32", "32 x 16"}})])
def test_the_parts_measure_themselves(gpu, part, what):
    table = gpu.PARTS[part].measure(bench(gpu))
    assert {name: set(rows) for name, rows in table.items()} == what
    for rows in table.values():
        assert all(row["lowest"] == row["seconds"] == row["highest"] > 0 for row in rows.values())
    assert not list(gpu.failures(table))


def test_a_program_that_fails_is_a_failure_and_the_others_are_timed(gpu, monkeypatch):
    def ragged_dot(*args):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(gpu.gpu_parts.lax, "ragged_dot", ragged_dot)
    rows = gpu.PARTS["G5"].measure(bench(gpu))["4 rows each, zipf"]
    assert rows["lax.ragged_dot"] == {"failed": "RuntimeError: RESOURCE_EXHAUSTED"}
    assert "of_dense" in rows["grouped_matmul"] and "faster_than_ragged_dot" not in rows["grouped_matmul"]
    assert list(gpu.failures({"G5": {"zipf": rows}})) == ["G5, zipf, lax.ragged_dot: RuntimeError: RESOURCE_EXHAUSTED"]


def test_nothing_is_begun_when_the_time_is_up(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.gpu_parity, "check", lambda *_: {})
    code, record = run(gpu, tmp_path, "--only", "G1,G4", "--seconds", "-1")
    assert code == 1
    assert [record[name] for name in ("G1", "G4")] == [{"failed": "left out: the time is up"}] * 2


def test_a_program_of_several_runs_runs_so_often(gpu):
    calls = []
    count = lambda x: jax.pure_callback(lambda x: calls.append(1) or x, jax.ShapeDtypeStruct((), jnp.float32), x)
    program = gpu.queued.repeated(lambda x: (x, count(x)), 5)
    total = jax.jit(program)(jnp.float32(2))
    assert float(total) == 4.0 and len(calls) >= 5


def test_rates_count_what_is_seen_and_selected(gpu):
    parts = gpu.gpu_parts
    assert parts.pairs(2, 5) == 4 + 5 and parts.pairs(3, 5, 4) == 3 + 4 + 4
    row = {"seconds": 2.0}
    assert gpu.queued.ratio({"seconds": 6.0}, row) == 3 and gpu.queued.per_second(10, row) == 5
    assert gpu.queued.ratio({"failed": ""}, row) is None and gpu.queued.per_second(1, {"failed": ""}) is None


def test_the_defaults_are_those_of_the_model(gpu):
    sizes, config = gpu.Sizes(), gpu.Sizes().layer
    assert sizes.index == (config.index_n_heads, config.index_head_dim)
    assert (sizes.heads, sizes.rank, sizes.value_dim, sizes.top_k) == (
        config.num_attention_heads, config.latent_dim, config.kv_lora_rank, config.index_topk)
    assert sizes.grouped[1:] == (config.hidden_size, config.moe_intermediate_size)
    assert config.layer_kinds == (("full", "sparse"),)
    assert math.prod(sizes.selecting) * 256 == math.prod(sizes.index)
    real = gpu.gpu_parity.REAL
    assert (real.index, real.heads, real.rank, real.value_dim, real.top_k, real.grouped[1:]) == (
        sizes.index, sizes.heads, sizes.rank, sizes.value_dim, sizes.top_k, sizes.grouped)


@pytest.mark.parametrize("arguments, message", [
    (["--only", "G1,G9"], "--only: expected some of G1, .*found G9"), (["--only", "G1"], "expected a GPU, found cpu")])
def test_what_cannot_be_run_is_refused(gpu, capsys, arguments, message):
    with pytest.raises(SystemExit) as refused:
        gpu.main(arguments)
    assert refused.value.code == 2
    assert re.search(message, capsys.readouterr().err)
