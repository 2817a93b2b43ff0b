"""A checkpoint of more than 2 GB read and written in processes of their own, which measure what they hold beside it."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# Each routed-expert parameter is one array of 0.6 GB; the largest single tensor of the checkpoint is the embedding.
COMMON = """
    import json, math, sys
    import ml_dtypes, numpy as np
    import jax, jax.numpy as jnp
    import glm5_jax as glm5
    from glm5_jax.checkpoint import hf_config, hf_names, safetensors_io
    from glm5_jax.core import params as core_params

    CONFIG = glm5.tiny(
        hidden_size=1024, moe_intermediate_size=1536, n_routed_experts=28, num_hidden_layers=9, vocab_size=16384,
        num_nextn_predict_layers=0, dtype="bfloat16", param_dtype="bfloat16")
    ENTRIES = hf_names.entries(CONFIG)

    def kb(field):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

    def report(before, result):
        # `before` is what was held without the result, in kB.
        largest = max(math.prod(entry.shape) for entry in ENTRIES) * 2
        print(json.dumps({"above": (kb("VmHWM") - before) * 1024 - result, "largest": largest, "result": result}))
"""
WRITE = """
    tensors, rng = [], np.random.default_rng(0)
    for entry in ENTRIES:
        kind = np.float32 if entry.name.endswith("bias") else ml_dtypes.bfloat16
        tensors.append(safetensors_io.Tensor(entry.name, np.dtype(kind), entry.shape))
    values = (np.full(x.shape, i % 251, x.dtype) for i, x in enumerate(tensors))
    safetensors_io.write(sys.argv[1], tensors, values, shard_bytes=2**29)
    with open(sys.argv[1] + "/config.json", "w") as file:
        json.dump(hf_config.to_json(CONFIG, "bfloat16"), file)
    print(json.dumps({"bytes": sum(x.nbytes for x in tensors)}))
"""
LOAD = """
    jax.block_until_ready(jnp.zeros(3) + 1)
    glm5.load_hf(sys.argv[2])  # whatever the first load imports and compiles
    before = kb("VmRSS")
    config, params = glm5.load_hf(sys.argv[1])
    jax.block_until_ready(params)
    report(before, sum(x.nbytes for x in jax.tree.leaves(params)))
    for i, entry in enumerate(ENTRIES):
        for path, index in entry.slices:
            assert float(hf_names.leaf_at(params, path)[index].reshape(-1)[-1]) == i % 251, entry.name
"""
SAVE = """
    glm5.save_hf(sys.argv[2], *glm5.load_hf(sys.argv[2]))
    params = core_params.map_specs(lambda spec: jnp.full(spec.shape, 3, spec.dtype), glm5.param_specs(CONFIG))
    jax.block_until_ready(params)
    result = sum(x.nbytes for x in jax.tree.leaves(params))
    before = kb("VmRSS") - result // 1024
    glm5.save_hf(sys.argv[1], CONFIG, params, shard_bytes=2**29)
    report(before, result)
"""


def run(program, *arguments):
    text = "\n".join(line[4:] for line in (COMMON + program).splitlines())
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run([sys.executable, "-c", text, *map(str, arguments)], capture_output=True, text=True,
                          env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    import glm5_jax as glm5
    from tests.model.reference import MICRO, random_params
    directory = tmp_path_factory.mktemp("small") / "small"
    glm5.save_hf(directory, MICRO, random_params(MICRO))
    return directory


def test_what_reading_holds_beside_the_result(small, tmp_path):
    (tmp_path / "big").mkdir()
    assert run(WRITE, tmp_path / "big")["bytes"] > 2e9
    assert len(list((tmp_path / "big").glob("*.safetensors"))) > 3
    found = run(LOAD, tmp_path / "big", small)
    assert found["result"] > 2e9
    assert found["above"] <= 2 * found["largest"], found


def test_what_writing_holds_beside_the_parameters(small, tmp_path):
    found = run(SAVE, tmp_path / "big", small)
    assert len(list((tmp_path / "big").glob("*.safetensors"))) > 3
    assert found["above"] <= 2 * found["largest"], found
