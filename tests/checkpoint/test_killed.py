"""kill -9 at random moments of saving: what is found afterwards is whole, and nothing half is left."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

import glm5_jax as glm5
from glm5_jax.checkpoint.store import Store

pytestmark = pytest.mark.slow

CONFIG = glm5.tiny()
# Both print a line before each save; every value of checkpoint n is n.
COMMON = """
    import itertools, sys
    import jax, jax.numpy as jnp
    import glm5_jax as glm5
    from glm5_jax.checkpoint.store import Store
    from glm5_jax.core import params as core_params

    def params(n):
        return core_params.map_specs(lambda spec: jnp.full(spec.shape, n, spec.dtype), glm5.param_specs(CONFIG))

    CONFIG = glm5.tiny()
    directory, first = sys.argv[1], int(sys.argv[2])
"""
SAVE_HF = """
    for n in itertools.count(first):
        print(n, flush=True)
        glm5.save_hf(directory, CONFIG, params(n), shard_bytes=2**19)
"""
SAVE_ORBAX = """
    with Store(directory, keep=2) as store:
        for n in itertools.count(first):
            print(n, flush=True)
            store.save(n, {"params": params(n)}, {"n": n})
"""
KILLS = 8


def killed(program, directory, first, delay):
    """Runs the program, kills it `delay` seconds after its second save began; returns the number of the last begun."""
    text = textwrap.dedent(COMMON) + textwrap.dedent(program)
    process = subprocess.Popen([sys.executable, "-c", text, str(directory), str(first)], stdout=subprocess.PIPE,
                               text=True, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})
    lines = [process.stdout.readline(), process.stdout.readline()]
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, "the program ended by itself"
    return int(("".join(lines) + rest).split()[-1])


def only_value(params):
    values = {float(value) for leaf in jax.tree.leaves(params) for value in np.unique(np.asarray(leaf))}
    assert len(values) == 1, values
    return values.pop()


def test_save_hf(tmp_path):
    chance, last = random.Random(0), 0
    for _ in range(KILLS):
        begun = killed(SAVE_HF, tmp_path / "it", last + 1, chance.uniform(0, 0.3))
        last = only_value(glm5.load_hf(tmp_path / "it")[1])
        assert begun - 1 <= last <= begun
        assert set(os.listdir(tmp_path)) <= {"it", ".it.partial"}
        last = int(last)
    params = jax.tree.map(lambda leaf: leaf * 0, glm5.load_hf(tmp_path / "it")[1])
    glm5.save_hf(tmp_path / "it", CONFIG, params)
    assert os.listdir(tmp_path) == ["it"] and only_value(glm5.load_hf(tmp_path / "it")[1]) == 0


def test_orbax(tmp_path):
    chance, last = random.Random(1), 0
    zeros = jax.tree.map(lambda spec: jax.numpy.zeros(spec.shape, spec.dtype), glm5.param_specs(CONFIG),
                         is_leaf=lambda x: hasattr(x, "axes"))
    with Store(tmp_path) as store:
        store.save(0, {"params": zeros}, {"n": 0})
    target = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), glm5.param_specs(CONFIG),
                          is_leaf=lambda x: hasattr(x, "axes"))
    for _ in range(KILLS):
        begun = killed(SAVE_ORBAX, tmp_path, last + 1, chance.uniform(0, 0.6))
        with Store(tmp_path) as store:  # what a run does when it starts again
            last = store.latest_step()
            listed = [int(name) for name in os.listdir(tmp_path) if name.isdigit()]
            for step in listed:
                assert only_value(store.restore_params(step, target)) == step
                assert store.restore(step, {"params": target})[1] == {"n": step}
        assert last == max(listed) and begun - 2 <= last <= begun
        assert sorted(os.listdir(tmp_path)) == sorted(map(str, listed))
