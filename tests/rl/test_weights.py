"""Policies as directories: exact, numbered upwards, refused when anything is missing or changed."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.rl import weights
from glm5_jax.rl.weights import WeightsError


def params(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {"layers": {"0": {"w": jnp.asarray(rng.normal(size=(3, 5)), jnp.bfloat16), "b": jnp.zeros(5)}},
            "norm": jnp.asarray(rng.normal(size=4), jnp.float32), "scalar": jnp.float32(2.0)}


def test_a_policy_comes_back_bit_for_bit(tmp_path):
    policy = weights.publish(tmp_path, params(), number=3, step=12)
    shapes = jax.eval_shape(params)
    fetched, found = weights.fetch(tmp_path, 3, shapes)
    assert fetched == policy and (policy.number, policy.step) == (3, 12) and len(policy.checksum) == 64
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, params())
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, params())
    assert weights.publish(tmp_path / "other", params(), number=0, step=0).checksum == policy.checksum
    assert weights.publish(tmp_path / "third", params(1), number=0, step=0).checksum != policy.checksum


def test_numbers_only_rise(tmp_path):
    assert weights.numbers(tmp_path / "nowhere") == []
    for number in (1, 2, 10):
        weights.publish(tmp_path, params(number), number=number, step=number)
    (tmp_path / "policy-x").mkdir()
    assert weights.numbers(tmp_path) == [1, 2, 10]
    for number in (10, 9):
        with pytest.raises(ValueError, match=f"number: expected above 10, .* found {number}"):
            weights.publish(tmp_path, params(), number=number, step=11)
    assert weights.prune(tmp_path, keep=2) == [1] and weights.numbers(tmp_path) == [2, 10]
    (tmp_path / "policy-00000002" / "policy.json").unlink()  # what is half removed is no policy
    assert weights.numbers(tmp_path) == [10]
    with pytest.raises(ValueError, match="keep: expected at least 1"):
        weights.prune(tmp_path, keep=0)


def damaged(directory):
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (directory / "model.safetensors").write_bytes(data)


def cut(directory):
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:-3])


def renumbered(directory):
    record = json.loads((directory / "policy.json").read_text())
    (directory / "policy.json").write_text(json.dumps(record | {"number": 4}))


@pytest.mark.parametrize("damage, message", [
    (damaged, "expected policy 3 with checksum"), (cut, "cannot be read"), (renumbered, "found 4 with another record"),
    (lambda directory: (directory / "policy.json").unlink(), r"cannot be read|there are \[\]"),
    (lambda directory: (directory / "model.safetensors").unlink(), "cannot be read"),
    (lambda directory: (directory / "policy.json").write_text("{"), "cannot be read"),
])
def test_what_is_not_whole_is_refused(tmp_path, damage, message):
    """Invariant 10."""
    weights.publish(tmp_path, params(), number=3, step=12)
    damage(tmp_path / "policy-00000003")
    with pytest.raises(WeightsError, match=message):
        weights.fetch(tmp_path, 3, params())


def test_a_policy_of_another_model_is_refused(tmp_path):
    weights.publish(tmp_path, params(), number=0, step=0)
    with pytest.raises(WeightsError, match=r"norm: expected float32 \[5\], found float32 \[4\]"):
        weights.fetch(tmp_path, 0, params() | {"norm": jnp.zeros(5)})
    with pytest.raises(WeightsError, match="more: expected float32 .* found none"):
        weights.fetch(tmp_path, 0, params() | {"more": jnp.zeros(5)})
    with pytest.raises(WeightsError, match=r"expected a policy, found none; there are \[0\]"):
        weights.fetch(tmp_path, 1, params())


PUBLISHER = """
import sys
import numpy as np
from glm5_jax.rl import weights
big = {"w": np.zeros((1024, 1024), np.float32)}
for number in range(1000):
    big["w"][:] = number
    weights.publish(sys.argv[1], big, number=number, step=number)
    print(number, flush=True)
"""


def test_a_killed_trainer_leaves_whole_policies(tmp_path):
    """Invariant 10: whatever has a number can be served."""
    process = subprocess.Popen([sys.executable, "-c", PUBLISHER, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"JAX_PLATFORMS": "cpu"})
    said = [int(process.stdout.readline()) for _ in range(3)]
    process.send_signal(signal.SIGKILL)
    said += [int(line) for line in process.communicate()[0].splitlines()]
    there = weights.numbers(tmp_path)
    assert set(said) <= set(there) and len(there) <= len(said) + 1
    for number in there:
        _, found = weights.fetch(tmp_path, number, {"w": np.zeros((1024, 1024), np.float32)})
        assert (found["w"] == number).all()
