"""The same forward, sharded over eight fake devices, equals one device."""

import jax
import numpy as np
import pytest

import glm5_jax as glm5
from glm5_jax.core import mesh as core_mesh
from glm5_jax.model import moe

CONFIG = glm5.tiny(vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=32, moe_intermediate_size=16,
                   n_routed_experts=4, index_topk=6)
TOKENS = np.random.default_rng(0).integers(0, 64, (4, 16)).astype(np.int32)


def loss_and_grads(params, tokens):
    def loss(params):
        out = glm5.forward(params, CONFIG, tokens, mtp_steps=1)
        picked = jax.nn.log_softmax(out.logits[:, :-1])[..., 0] + jax.nn.log_softmax(out.mtp_logits[0, :, :-1])[..., 1]
        return -picked.mean()
    return jax.value_and_grad(loss)(params)


@pytest.fixture(scope="module")
def single():
    params = glm5.init(CONFIG, jax.random.key(0))
    return params, jax.jit(loss_and_grads)(params, TOKENS)


@pytest.mark.parametrize("sizes", [dict(data=2, expert=2, tensor=2), dict(data=1, context=4, tensor=2)], ids=str)
def test_sharded_equals_single_device(single, sizes):
    params, (loss, grads) = single
    mesh = core_mesh.make_mesh(**sizes)
    shardings = core_mesh.param_shardings(glm5.param_specs(CONFIG), mesh, CONFIG.sharding)
    with jax.set_mesh(mesh):
        sharded_loss, sharded_grads = jax.jit(loss_and_grads, out_shardings=(None, shardings))(
            jax.device_put(params, shardings), TOKENS)
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-5)
    split = [leaf for leaf in jax.tree.leaves(sharded_grads) if not leaf.is_fully_replicated]
    assert len(split) > 12
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), sharded_grads, grads)


@pytest.mark.parametrize("sizes, rules", [
    (dict(data=2, expert=4), {}), (dict(expert=2, tensor=2), {}), (dict(context=5, expert=1), {}),
    (dict(expert=2), dict(batch=("data", "expert"))),
    (dict(context=2, expert=2), dict(time=("expert", "context"), experts=("expert", "tensor"), expert_mlp=()))],
    ids=str)
def test_tokens_travel_to_split_experts(sizes, rules):
    """Five positions, which two or four devices do not divide; and no exchange where no axis splits the experts."""
    config = CONFIG.replace(sharding=core_mesh.ShardingRules(**rules))
    params = glm5.init(config, jax.random.key(1))["layers"]["1"]["moe"]
    params = jax.tree.map(lambda x: x[0, 0], params)
    x = np.random.default_rng(2).normal(size=(2, 5, CONFIG.hidden_size)).astype(np.float32)
    weight = np.random.default_rng(3).normal(size=x.shape).astype(np.float32)

    def mixture(params, x):
        routing = moe.route(params, config, x.reshape(-1, x.shape[-1]))
        return (moe.apply_experts(params["experts"], config, routing, x) * weight).sum()

    mesh = core_mesh.make_mesh(devices=jax.devices()[:np.prod(list(sizes.values()))], **{"data": 1, **sizes})
    step = jax.jit(jax.value_and_grad(mixture, (0, 1)))
    wanted = step(params, x)
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.value_and_grad(mixture, (0, 1))).lower(params, x)
        assert ("all_to_all" in lowered.as_text()) == (sizes["expert"] > 1)
        found = lowered.compile()(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, wanted)


@pytest.mark.parametrize("rules, message", [
    (dict(experts=("expert", "tensor"), expert_mlp=None), "experts: expected one mesh axis, .* found expert x tensor"),
    (dict(expert_mlp=("tensor", "data")), "expert_mlp: expected mesh axes that split no tokens, .* found 'data'")])
def test_experts_that_cannot_be_split_so(rules, message):
    config = CONFIG.replace(sharding=core_mesh.ShardingRules(**rules))
    params = jax.tree.map(lambda x: x[0, 0], glm5.init(CONFIG, jax.random.key(1))["layers"]["1"]["moe"])
    with jax.set_mesh(core_mesh.make_mesh(data=2, expert=2, tensor=2)):
        with pytest.raises(ValueError, match=f"ShardingRules.{message}"):
            moe.moe(params, config, np.ones((2, 4, 32), np.float32), np.ones((2, 4), bool))
