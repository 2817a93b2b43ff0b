"""Two processes with one mesh over both read, write and restore what one process does, and the other way round."""

import os
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

import glm5_jax as glm5
from glm5_jax.checkpoint import hf_config, sources
from glm5_jax.checkpoint.store import Store
from glm5_jax.core.mesh import make_mesh
from tests.checkpoint.directories import assert_same_bits
from tests.model.reference import random_params

pytestmark = pytest.mark.slow

CONFIG = glm5.tiny(num_hidden_layers=2)
PROGRAM = """
    import sys
    import jax
    root, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    import glm5_jax as glm5
    from glm5_jax.checkpoint import hf_config, sources
    from glm5_jax.checkpoint.errors import CheckpointError
    from glm5_jax.checkpoint.store import Store
    from glm5_jax.core.mesh import make_mesh

    mesh = make_mesh(data=2, expert=2)
    assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
    config, params = glm5.load_hf(f"{root}/hf", mesh=mesh)
    assert not params["layers"]["1"]["moe"]["experts"]["up"].is_fully_addressable
    glm5.save_hf(f"{root}/from_two", config, params)
    with Store(f"{root}/store_of_two", about=hf_config.about(config)) as store:
        store.save(3, {"params": params}, None)
    restored = sources.open_source(f"{root}/store_of_one").load(mesh=mesh)
    glm5.save_hf(f"{root}/restored_by_two", config, restored)
    try:  # the first process alone sees the fault; both say so, and neither waits for the other
        glm5.save_hf(f"{root}/never", config, params, companions=["no such file"])
    except (FileNotFoundError, CheckpointError) as error:
        assert isinstance(error, CheckpointError) == (process == 1)
    else:
        raise AssertionError("expected an error")
"""


def test_two_processes(tmp_path):
    params = random_params(CONFIG)
    glm5.save_hf(tmp_path / "hf", CONFIG, params)
    with Store(tmp_path / "store_of_one", about=hf_config.about(CONFIG)) as store:
        store.save(3, {"params": params}, None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path), str(port)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    both = [subprocess.Popen([*command, str(process)], env=environment, stderr=subprocess.PIPE, text=True)
            for process in (0, 1)]
    for process in both:
        _, printed = process.communicate(timeout=600)
        assert process.returncode == 0, printed[-3000:]
    for name in ("from_two", "restored_by_two"):
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "hf" / file).read_bytes(), name
    source = sources.open_source(tmp_path / "store_of_two")
    for mesh in (None, make_mesh(data=2, tensor=2, expert=2)):
        found = source.load(mesh=mesh)
        assert_same_bits(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, params))
