"""kill -9 at random moments of training, some of them during a save: the run ends where an uninterrupted one does."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
    import hashlib, sys
    import jax, numpy as np
    from glm5_jax.checkpoint.store import Store
    from glm5_jax.data import packing
    from glm5_jax.model import config as model_config, transformer
    from glm5_jax import optim
    from glm5_jax.train import loop, state as train_state, step as train_step

    class Telling:
        def write(self, step, values):
            print("step", step, file=sys.stderr, flush=True)

    config = model_config.tiny(num_hidden_layers=2, vocab_size=512, num_nextn_predict_layers=0, remat="none")
    optimizer = optim.build(transformer.param_specs(config), learning_rate=1e-3)
    rng = np.random.default_rng(0)
    rows = packing.pack([rng.integers(1, 512, size).astype(np.int32) for size in rng.integers(5, 60, 40)], 32)
    batches = iter(packing.batches(rows, batch_size=2, seed=0))
    step = train_step.make_train_step(config, optimizer, train_step.Options())
    with Store(sys.argv[1] + "/checkpoints") as store:
        state = loop.resume(store, train_state.abstract(config, optimizer), batches)
        state = state or train_state.create(config, optimizer, jax.random.key(0))
        state = loop.run(state, step, batches, until=int(sys.argv[2]), store=store, writer=Telling(),
                         cadence=loop.Cadence(log_every=1, save_every=1), name="")
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((state.params, state.opt_state, state.tokens_seen, state.guard)):
        digest.update(np.asarray(leaf).tobytes())
    print("hash", digest.hexdigest())
"""
KILLS, DURING_SAVES = 10, 2


def start(directory, until):
    directory.mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(PROGRAM), str(directory), str(until)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})
    for line in process.stderr:
        if line.startswith("step "):  # compiled and under way
            break
    return process


def half_saved(directory):
    return [path.name for path in (directory / "checkpoints").iterdir() if "orbax-checkpoint-tmp" in path.name]


def finished(process):
    printed, complaint = process.communicate()
    assert process.returncode == 0, complaint
    return printed.split("hash ")[1]


def test_ten_kills(tmp_path):
    chance, directory = random.Random(0), tmp_path / "killed"
    kills = during = 0
    while kills < KILLS or during < DURING_SAVES:
        assert kills < 50, "no kill met a save"
        process = start(directory, until=10**6)
        time.sleep(chance.uniform(0, 2))
        while kills % 2 and process.poll() is None and not half_saved(directory):
            pass  # every other time, as soon as a save is seen under way
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        kills += 1
        during += bool(half_saved(directory))
    until = max(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit()) + 5
    whole = finished(start(tmp_path / "whole", until))
    assert len(whole.strip()) == hashlib.sha256().digest_size * 2
    assert finished(start(directory, until)) == whole
    assert not half_saved(directory)
