import json
import math
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.core.metrics import (
    ConsoleWriter, JsonlWriter, Mean, MultiWriter, TensorBoardWriter, collect, merge)


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_merged_means_equal_the_mean_of_everything():
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(3, 10)).astype(np.float32), np.arange(10) < [[1], [4], [9]]
    parts = [{"loss": Mean.of(x[i], mask[i])} for i in range(3)]
    merged = collect(merge(*parts))
    np.testing.assert_allclose(merged["loss"], x[mask].mean(), rtol=1e-5)
    local = np.mean([x[i][mask[i]].mean() for i in range(3)])
    assert abs(local - x[mask].mean()) > 1e-3  # the mean of means is another number


def test_mean_of_everything_and_of_weights():
    assert Mean.of(jnp.array([1.0, 2.0, 6.0])).value() == 3
    metric = Mean.of(jnp.array([1.0, jnp.nan, 4.0]), jnp.array([0.5, 0.0, 1.0]))
    assert metric.total == 4.5 and metric.count == 1.5
    assert Mean.of(jnp.ones((2, 3)), jnp.array([True, False, True])).count == 4
    assert Mean.of(2.5).value() == 2.5


def test_nothing_counted_is_nan():
    assert math.isnan(collect({"a": Mean.of(jnp.ones(2), jnp.zeros(2, bool))})["a"])


def test_merge_is_a_union():
    one, two = Mean.of(jnp.array(1.0)), Mean.of(jnp.array(3.0))
    assert collect(merge({"a": one}, {"a": two, "b": two}, {})) == {"a": 2.0, "b": 3.0}


def test_mean_passes_through_jit_and_scan():
    def step(carry, x):
        return merge(carry, {"x": Mean.of(x)}), None
    start = {"x": Mean(jnp.float32(0), jnp.float32(0))}
    total, _ = jax.jit(lambda xs: jax.lax.scan(step, start, xs))(jnp.arange(4.0))
    assert collect(total) == {"x": 1.5}


def test_jsonl_appends_and_is_readable_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(1, {"loss": jnp.float32(2.5), "tokens": 7})
    assert rows(path) == [{"step": 1, "loss": 2.5, "tokens": 7.0}]
    writer.write(2, {"loss": math.inf})
    writer.close()
    again = JsonlWriter(path)
    again.write(3, {"loss": math.nan})
    again.close()
    assert [row["step"] for row in rows(path)] == [1, 2, 3]
    assert rows(path)[1]["loss"] == math.inf and math.isnan(rows(path)[2]["loss"])


@pytest.mark.parametrize("torn", ['{"st', '{"step": 2, "loss": 1.0}', "x" * 200_000])
def test_jsonl_cuts_a_torn_last_line(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + torn)
    writer = JsonlWriter(path)
    assert rows(path) == [{"step": 1}]
    writer.write(2, {})
    assert rows(path) == [{"step": 1}, {"step": 2}]
    writer.close()


def test_jsonl_cuts_a_torn_only_line_and_leaves_whole_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step"')
    JsonlWriter(path).close()
    assert path.read_text() == ""
    whole = "".join(f'{{"step": {i}}}\n' for i in range(9))
    path.write_text(whole)
    JsonlWriter(path).close()
    assert path.read_text() == whole


def test_jsonl_survives_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = ("import os, signal, sys\nfrom glm5_jax.core.metrics import JsonlWriter\nw = JsonlWriter(sys.argv[1])\n"
            "for i in range(5): w.write(i, {'loss': 1.0})\nos.kill(os.getpid(), signal.SIGKILL)")
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert [row["step"] for row in rows(path)] == [0, 1, 2, 3, 4]


def test_jsonl_truncates_after_the_step_resumed_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    for step in range(6):
        writer.write(step, {"train": step})
        if step % 2:
            writer.write(step, {"eval": step})
    writer.truncate_after(3)
    writer.write(4, {"train": 40})
    assert [row["step"] for row in rows(path)] == [0, 1, 1, 2, 3, 3, 4]
    assert rows(path)[-1]["train"] == 40
    writer.truncate_after(100)
    assert len(rows(path)) == 7
    writer.truncate_after(-1)
    assert path.read_text() == ""
    writer.close()


def test_jsonl_names_a_broken_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n')
    writer = JsonlWriter(path)
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: expected an object with a 'step'"):
        writer.truncate_after(1)
    writer.close()
    assert path.read_text() == '{"step": 1}\nhello\n'


def test_jsonl_refuses_a_metric_named_step(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="cannot be named 'step'"):
        writer.write(1, {"step": 2})
    writer.close()


def test_console_lines_align(capsys):
    writer = ConsoleWriter()
    writer.write(1, {"loss": 8.31234, "lr": 1e-7})
    writer.write(12345, {"loss": 0.5, "lr": 0.000123})
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step       1  loss 8.312       lr 1e-07"
    assert first.index("lr") == second.index("lr")


def test_tensorboard_missing_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'glm5-jax\[metrics\]'"):
        TensorBoardWriter(tmp_path)


def test_tensorboard_gets_every_scalar(monkeypatch, tmp_path):
    calls = []

    class SummaryWriter:
        def __init__(self, path):
            calls.append(path)

        def add_scalar(self, *arguments):
            calls.append(arguments)

        def flush(self):
            pass

        def close(self):
            calls.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    writer = TensorBoardWriter(tmp_path)
    writer.write(3, {"loss": jnp.float32(2), "lr": 0.5})
    writer.close()
    assert calls == [str(tmp_path), ("loss", 2.0, 3), ("lr", 0.5, 3), "closed"]


def test_multi_writes_to_all_and_closes_all():
    class Recorder:
        def __init__(self, fails=False):
            self.seen, self.closed, self.fails = [], False, fails

        def write(self, step, values):
            self.seen.append((step, dict(values)))

        def close(self):
            self.closed = True
            if self.fails:
                raise OSError("disk full")

    writers = [Recorder(), Recorder(fails=True), Recorder()]
    multi = MultiWriter(*writers)
    multi.write(1, {"a": 2.0})
    with pytest.raises(OSError, match="disk full"):
        multi.close()
    assert all(w.seen == [(1, {"a": 2.0})] and w.closed for w in writers)


def test_no_tensorflow_is_imported():
    code = "import sys\nimport glm5_jax.core.metrics\nassert not {'tensorflow', 'tensorboardX'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
