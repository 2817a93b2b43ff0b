"""The engine on eight fake devices answers what one device does, and compiles its programs once."""

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

import glm5_jax as glm5
from glm5_jax.core import mesh as core_mesh
from glm5_jax.infer import slots as device
from glm5_jax.infer.engine import Engine
from glm5_jax.infer.request import Sampling
from tests.infer.replay import assert_replays, CONFIG, MAX_LEN, params
from tests.infer.test_engine import finish, finish_one, IDS, random_request

MESHES = [{"data": 2, "expert": 2, "tensor": 2}, {"data": 1, "context": 2, "tensor": 2}]
OPTIONS = {"max_len": MAX_LEN, "chunk": 4, "block": 3}


@functools.cache
def split(version: int, **sizes: int) -> Any:
    """The parameters of a version on a mesh."""
    mesh = core_mesh.make_mesh(devices=jax.devices()[:math.prod(sizes.values())], **sizes)
    return jax.device_put(params(version), core_mesh.param_shardings(glm5.param_specs(CONFIG), mesh, CONFIG.sharding))


@pytest.mark.parametrize("sizes, drafts", [pytest.param(MESHES[0], 2, marks=pytest.mark.slow), (MESHES[1], 0)], ids=str)
def test_a_mesh_answers_what_one_device_does(sizes, drafts):
    """With sessions, and a push among the requests; after the first of them nothing is compiled."""
    one, rng = Engine(split(0, **sizes), CONFIG, slots=4, drafts=drafts, **OPTIONS), np.random.default_rng(drafts)
    one.submit(*random_request(rng))
    finish(one)
    programs = device.prefill._cache_size(), device.decode._cache_size()
    asked = [random_request(rng) for _ in range(6)]
    numbers = [one.submit(*request, session=int(rng.integers(3))) for request in asked]
    one.step()
    one.pause()
    one.push_weights(split(1, **sizes), 1)
    one.resume()
    results = finish(one)
    assert_replays(asked, [results[number] for number in numbers])
    assert (device.prefill._cache_size(), device.decode._cache_size()) == programs
    rows = one._cache.latents_LBSR.sharding.shard_shape(one._cache.latents_LBSR.shape)[1]
    assert rows == 4 // sizes["data"]


def test_fp8_experts_travel():
    sampling = Sampling(6, temperature=0.0)
    alone, spread = (Engine(weights, CONFIG, slots=4, fp8=True, **OPTIONS)
                     for weights in (params(), split(0, data=1, expert=2)))
    expected, found = (finish_one(one, IDS, sampling) for one in (alone, spread))
    assert found.completion.ids == expected.completion.ids
    np.testing.assert_allclose(found.model_logprobs, expected.model_logprobs, atol=1e-5)


def test_what_a_mesh_cannot_split():
    with pytest.raises(ValueError, match="slots: expected a multiple of 2, .* found 3; .* 'data'"):
        Engine(split(0, **MESHES[0]), CONFIG, slots=3, **OPTIONS)
    with pytest.raises(ValueError, match="fp8: expected moe_intermediate_size .* multiple of 2 x 128, .* 'tensor'"):
        Engine(split(0, **MESHES[0]), CONFIG, slots=4, fp8=True, **OPTIONS)
