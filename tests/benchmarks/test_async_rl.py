"""benchmarks/async_rl.py at toy size: loop, trainer and an engine in another process. No time is asserted."""

import json
import statistics

import numpy as np
import pytest


@pytest.fixture
def async_rl(benchmarks):
    return benchmarks("async_rl")


@pytest.mark.slow
def test_two_modes_run_and_are_written(async_rl, tmp_path, capsys):
    async_rl.main(["--toy", "--workloads", "agent", "--modes", "async 1", "--out", str(tmp_path)])
    path, = tmp_path.iterdir()
    record = json.loads(path.read_text())
    rows = record["workloads"]["agent"]["modes"]
    assert list(rows) == ["sync", "async 1"] and rows["sync"]["measured"] == rows["sync"]["foretold"] == 1
    for row in rows.values():
        assert row["error"] == pytest.approx(row["foretold"] / row["measured"] - 1)
    assert str(path) in capsys.readouterr().out


def test_the_simulator_is_given_the_lengths_of_the_real_run(async_rl):
    script = async_rl.Script(async_rl.WORKLOADS["agent"], 1.0)
    simulation = async_rl.Apart(async_rl.Foretold(script), async_rl.Machine(devices=2), async_rl.MODES["async 2"])
    simulation.run(6, 1)
    found = sorted(length for step in simulation.steps for length in step["lengths"])
    expected = sorted(sum(tokens for tokens, _ in rollout) for number in range(len(simulation.steps) * 4)
                      for rollout in script.group(number))
    assert found == expected and statistics.pstdev(found) > 0


def test_the_fit_finds_the_machine_that_a_log_was_made_by(async_rl):
    rng = np.random.default_rng(0)
    size = async_rl.Size(warm_up=1)
    log = [(rounds, rounds * slots, 0.004 * rounds + 0.0003 * rounds * slots)
           for rounds, slots in rng.integers(1, 9, (40, 2)).tolist()]
    timed = async_rl.Timed(None)
    timed.trained = [(9, 60.0)] + [(tokens, 0.5 + 0.002 * tokens) for tokens in (100, 250, 900)]
    timed.pushed = [9.0, 0.25, 0.35]
    found = async_rl.fitted(timed, log, size)
    assert (found.t0, found.kappa) == pytest.approx((0.004, 0.0003))
    assert (found.train_token, found.train_step, found.sync) == pytest.approx((0.002, 0.5, 0.3))
