"""benchmarks/engine.py at toy size, without torch: every part of ours runs and is written. No time is asserted."""

import json
from pathlib import Path
from types import ModuleType

import jax
import pytest

import glm5_jax as glm5
from glm5_jax.text.tokenizer import Tokenizer


@pytest.fixture
def benchmark(benchmarks) -> ModuleType:
    return benchmarks("engine")


@pytest.mark.slow
def test_every_part_of_ours_runs_and_is_written(benchmark, tmp_path):
    benchmark.main(["--toy", "--rounds", "1", "--parts", "host", "prefix", "load", "--out", str(tmp_path)])
    path, = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert 0 < record["host"]["share"] < 1
    sizes = benchmark.TOY
    # In its second turn a conversation finds all but the last of what came before, prompt and answer.
    assert record["prefix"]["reused_tokens"] == sizes.slots * (sizes.prompt + sizes.block - 1)
    assert [row["share"] for row in record["load"]] == list(sizes.shares)
    for row in record["load"]:
        assert 0 < row["latency_median"] <= row["latency_p95"] and row["tokens_per_second"] > 0


@pytest.mark.slow
def test_drafts_change_no_completion(benchmark, tmp_path):
    config = glm5.tiny(num_hidden_layers=1, first_k_dense_replace=0, mtp_unroll=2)
    glm5.save_hf(tmp_path, config, glm5.init(config, jax.random.key(0)))
    packaged = Path(glm5.__file__).parent / "text" / "assets" / "tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(packaged.read_bytes())
    assert Tokenizer.load(tmp_path).vocab_size <= config.vocab_size
    rows = benchmark.speculative(tmp_path, benchmark.TOY, 1)
    assert list(rows) == ["0", "1", "2", "3"] and rows["0"]["accept_length"] == 1
    assert all(1 <= row["accept_length"] <= 1 + int(drafts) for drafts, row in rows.items())


def test_a_checkpoint_that_is_not_there(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="--checkpoint: expected a checkpoint directory, found none .* `make run`"):
        benchmark.speculative(tmp_path / "none", benchmark.TOY, 1)
