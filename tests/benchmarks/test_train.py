"""benchmarks/train.py at toy size: every part runs and writes what it found. No time is asserted."""

import json
from types import ModuleType

import numpy as np
import pytest

import glm5_jax as glm5


@pytest.fixture
def train(benchmarks) -> ModuleType:
    return benchmarks("train")


@pytest.mark.slow
def test_every_part_runs_and_is_written(train, tmp_path, capsys):
    train.main(["--toy", "--out", str(tmp_path)])
    path, = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert path.name == f"train-{record['date']}-cpu.json"
    assert (record["preset"], record["rows"], record["length"]) == ("toy", 2, 16)
    assert list(record["step"]) == ["remat full", "remat dots", "remat none", "remat full, chunk 8"]
    for row in record["step"].values():
        assert row["tokens_per_second"] == pytest.approx(2 * 16 / row["seconds"])
        assert row["temporaries_mib"] > 0
    assert record["input"]["steps"] == 3 and 0 <= record["input"]["share"] < 1
    assert record["checkpoint"]["saves"] == 1 and record["checkpoint"]["mib"] > 0
    assert str(path) in capsys.readouterr().out


def test_the_pipeline_mixes_text_with_made_up_words_and_reading_ahead_changes_nothing(train):
    work, taken, given = train.Work(glm5.tiny(), "adamw", 2, 64, 0), [], None
    for read_ahead in (0, 2):
        batches = train.pipeline(work, read_ahead)
        taken.append([next(batches) for _ in range(9)])  # more than a window of either source
        given = given or batches.get_state()["given"]
        batches.close()
    assert given == {"text": 9, "words": 9}
    for one, other in zip(*taken):
        assert one.tokens.shape == (2, 64)
        np.testing.assert_array_equal(one.tokens, other.tokens)
