"""The loop: an interrupted and resumed run ends where an uninterrupted one does, bit for bit, and says what it did."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.checkpoint.store import Store
from glm5_jax.core.metrics import JsonlWriter, Mean
from glm5_jax.data import packing
from glm5_jax.train import guard, loop, state as train_state, step as train_step

CADENCE = loop.Cadence(log_every=2, save_every=3)


class Silent:
    """A writer that keeps its rows, and may do something at a step."""

    def __init__(self, at=None, action=None):
        self.rows, self.at, self.action = {}, at, action

    def write(self, step, values):
        self.rows[step] = dict(values)
        if step == self.at:
            self.action()

    def close(self):
        pass


@jax.jit
def mix(state, batch):
    """A step without a model, whose result depends on every batch and their order."""
    w = jnp.sin(1.1 * state.params["w"] + batch.tokens.sum() * 1e-3)
    total = jnp.float32(batch.tokens.size)
    return (state.replace(step=state.step + 1, params={"w": w}),
            {"lm_loss": Mean(state.step.astype(jnp.float32), jnp.float32(1)), "tokens": Mean.of(total)})


def start():
    return train_state.TrainState(jnp.zeros((), jnp.int32), {"w": jnp.arange(5.0)}, (), jnp.zeros(2, jnp.int32),
                                  jnp.zeros(2, jnp.int32), guard.fresh())


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def train(directory, batches, step=mix, begin=start, until=10, writer=None):
    """Resumes or starts, as the pipeline does."""
    with Store(directory) as store:
        state = begin()
        state = loop.resume(store, abstract(state), batches) or state
        return loop.run(state, step, batches, until=until, cadence=CADENCE, store=store, writer=writer or Silent())


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def interrupt(number=signal.SIGINT):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_stopped_and_resumed_is_uninterrupted(tmp_path, batches, stop):
    whole = train(tmp_path / "whole", batches())
    train(tmp_path / "parts", batches(), until=stop)
    same(train(tmp_path / "parts", batches()), whole)
    assert int(whole.step) == 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(tmp_path, batches, number, capsys):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(loop.Interrupted) as stopped:
        train(tmp_path / "parts", batches(), writer=Silent(4, interrupt(number)))
    assert (stopped.value.signum, stopped.value.step) == (number, 5)
    assert "Finishing the step and saving" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    with Store(tmp_path / "parts") as store:
        assert store.latest_step() == 5
    same(train(tmp_path / "parts", batches()), train(tmp_path / "whole", batches()))


def test_a_second_signal_stops_at_once(tmp_path, batches):
    def twice():
        interrupt()()
        interrupt()()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, batches(), writer=Silent(4, twice))
    with Store(tmp_path) as store:
        assert store.latest_step() == 3


def test_a_signal_in_the_last_step_is_not_lost(tmp_path, batches):
    with pytest.raises(loop.Interrupted):
        train(tmp_path, batches(), writer=Silent(10, interrupt()))
    with Store(tmp_path) as store:
        assert store.latest_step() == 10


def test_rows_hold_means_since_the_row_before(tmp_path, batches, capsys):
    writer = Silent()
    train(tmp_path, batches(), until=7, writer=writer)
    assert list(writer.rows) == [2, 3, 4, 6, 7]  # every second, and where a checkpoint is
    assert [row["lm_loss"] for row in writer.rows.values()] == [0.5, 2, 3, 4.5, 6]
    assert all(row["tokens"] == 32 and row["tokens_per_second"] > 0 for row in writer.rows.values())
    assert capsys.readouterr().out.count("lm_loss") == 5  # not a terminal: lines instead of a bar
    assert train(tmp_path, batches(), until=7, writer=writer).step == 7  # nothing left to do


def test_cadence():
    with pytest.raises(ValueError, match="Cadence.save_every: expected at least 1, found 0"):
        loop.Cadence(log_every=1, save_every=0)


def real_parts(config, optimizer):
    """The step and the start of a real run; the subprocess below makes the same."""
    step = train_step.make_train_step(config, optimizer, train_step.Options(indexer_loss="sparse"))
    return step, lambda: train_state.create(config, optimizer, jax.random.key(0))


@pytest.mark.slow
def test_the_model_resumes_bit_for_bit(tmp_path, config, optimizer, batches):
    step, begin = real_parts(config, optimizer)
    whole = train(tmp_path / "whole", batches(), step, begin, until=6)
    with pytest.raises(loop.Interrupted):
        train(tmp_path / "parts", batches(), step, begin, until=6, writer=Silent(3, interrupt()))
    same(train(tmp_path / "parts", batches(), step, begin, until=6), whole)
    assert int(whole.tokens_seen[1]) > 0


KILLED = """
import sys, time
sys.path.insert(0, {here!r})
import test_loop as t
from glm5_jax.data import packing

class Slow(t.Silent):
    def write(self, step, values):
        time.sleep(0.05)

rows = t.some_rows()
t.train({directory!r}, iter(packing.batches(rows, batch_size=2, seed=0)), until=1000,
        writer=Slow())
"""


def some_rows():
    rng = np.random.default_rng(0)
    return packing.pack([rng.integers(1, 128, size).astype(np.int32) for size in (10, 30, 7, 16, 25)], 16)


def test_kill_minus_nine_loses_only_what_came_after_the_last_save(tmp_path):
    program = KILLED.format(here=str(pathlib.Path(__file__).parent), directory=str(tmp_path / "parts"))
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, cwd=pathlib.Path(__file__).parents[2])
    deadline = time.monotonic() + 120
    while not (tmp_path / "parts" / "6").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    process.kill()
    process.wait()
    process.stderr.close()
    batches = lambda: iter(packing.batches(some_rows(), batch_size=2, seed=0))
    with Store(tmp_path / "parts") as store:
        until = store.latest_step() + 5
    assert 6 + 5 <= until < 1000
    same(train(tmp_path / "parts", batches(), until=until), train(tmp_path / "whole", batches(), until=until))


def test_metrics_of_lost_steps_are_not_repeated(tmp_path, batches):
    def run(until):
        with Store(tmp_path / "checkpoints") as store:
            iterator, state = batches(), start()
            resumed = loop.resume(store, abstract(state), iterator)
            writer = JsonlWriter(tmp_path / "metrics.jsonl")
            writer.truncate_after(int(resumed.step) if resumed else -1)
            loop.run(resumed or state, mix, iterator, until=until, cadence=CADENCE, store=store, writer=writer)
            writer.close()

    run(3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 4, "lm_loss": -1.0}) + "\n")  # written, then killed before step 6 was saved
    run(7)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 7]
    assert all(row["lm_loss"] >= 0 for row in rows)
