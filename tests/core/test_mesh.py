import functools

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.core import compat
from glm5_jax.core.mesh import AXES, ShardingRules, constrain, make_mesh, param_shardings, spec
from glm5_jax.core.params import ParamSpec, initialise

RULES = ShardingRules()


def pieces(x: jax.Array) -> tuple[int, ...]:
    """The shape that one device holds."""
    return x.sharding.shard_shape(x.shape)


@pytest.fixture(autouse=True)
def eight_devices():
    assert jax.device_count() == 8, "these tests need JAX_NUM_CPU_DEVICES=8"


@pytest.mark.parametrize("sizes, expected", [
    ({}, (8, 1, 1, 1)),
    ({"tensor": 2}, (4, 1, 1, 2)),
    ({"data": 2, "context": 2, "expert": -1, "tensor": 2}, (2, 2, 1, 2)),
    ({"data": 1, "context": 1, "expert": 8}, (1, 1, 8, 1)),
])
def test_mesh_has_every_axis(sizes, expected):
    mesh = make_mesh(**sizes)
    assert mesh.axis_names == AXES
    assert tuple(mesh.shape[name] for name in AXES) == expected
    assert set(mesh.devices.flat) == set(jax.devices())


def test_mesh_states_its_axis_types():
    assert make_mesh().axis_types == (AxisType.Auto,) * 4
    assert make_mesh(explicit=True).axis_types == (AxisType.Explicit,) * 4


def test_mesh_of_some_devices():
    mesh = make_mesh(tensor=2, devices=jax.devices()[4:])
    assert mesh.shape["data"] == 2
    assert set(mesh.devices.flat) == set(jax.devices()[4:])


@pytest.mark.parametrize("sizes, message", [
    ({"data": 3}, "needs 3 devices, found 8"),
    ({"tensor": 3}, "needs a multiple of 3 devices, found 8"),
    ({"tensor": 16}, "needs a multiple of 16 devices, found 8"),
    ({"data": 2, "tensor": 2}, "needs 4 devices, found 8"),
    ({"tensor": -1}, "at most one axis can be -1, found .'data', 'tensor'."),
    ({"tensor": 0}, "found {'tensor': 0}"),
    ({"tensor": -2}, "found {'tensor': -2}"),
])
def test_mesh_rejects_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_rules_reject_unknown_mesh_axis():
    with pytest.raises(ValueError, match="ShardingRules.batch: unknown mesh axis 'model'"):
        ShardingRules(batch=("data", "model"))


def test_spec_follows_rules():
    assert spec(RULES, ("batch", "time", None)) == P("data", "context", None)
    rules = ShardingRules(batch=("data", "expert"), vocab=())
    assert spec(rules, ("batch", "vocab", "embed")[:2]) == P(("data", "expert"), None)
    assert spec(RULES, ()) == P()


def test_spec_names_the_nearest_logical_axis():
    with pytest.raises(ValueError, match="unknown logical axis 'expertz': did you mean 'experts'"):
        spec(RULES, ("expertz",))


def test_spec_rejects_double_use():
    with pytest.raises(ValueError, match="both 'heads' and 'mlp' are split by mesh axis 'tensor'"):
        spec(RULES, ("heads", None, "mlp"))
    with pytest.raises(ValueError, match="both 'batch' and 'batch' are split by mesh axis 'data'"):
        spec(RULES, ("batch", "batch"))


def test_param_shardings_place_parameters():
    mesh = make_mesh(expert=2, tensor=2)
    specs = {"experts": {"up": ParamSpec((3, 4, 8, 6), ("layers", "experts", "embed", "expert_mlp"))},
             "norm": ParamSpec((5,), ("norm",), init="ones"), "free": ParamSpec((7,), (None,))}
    shardings = param_shardings(specs, mesh, RULES)
    assert shardings["experts"]["up"] == NamedSharding(mesh, P(None, "expert", "data", "tensor"))
    placed = jax.jit(functools.partial(initialise, specs), out_shardings=shardings)(jax.random.key(0))
    assert pieces(placed["experts"]["up"]) == (3, 2, 4, 3)
    assert pieces(placed["norm"]) == (5,) and pieces(placed["free"]) == (7,)


def test_param_shardings_name_what_does_not_divide():
    specs = {"layers": {"attention": {"o": ParamSpec((6, 16), ("heads", "embed"))}}}
    with pytest.raises(ValueError, match=r"layers/attention/o: dimension 0 \('heads'\).*size 6.*axis tensor of size 4"):
        param_shardings(specs, make_mesh(tensor=4), RULES)
    rules = ShardingRules(embed=("data", "context"))
    specs = {"o": ParamSpec((2, 12), ("heads", "embed"))}
    with pytest.raises(ValueError, match="parameter o: dimension 1.*data x context of size 8"):
        param_shardings(specs, make_mesh(context=2), rules)
    with pytest.raises(ValueError, match="parameter o: unknown logical axis 'head'"):
        param_shardings({"o": ParamSpec((2,), ("head",))}, make_mesh(), RULES)


X_BTD = jnp.arange(8 * 4 * 2, dtype=jnp.float32).reshape(8, 4, 2)


def test_constrain_without_mesh_is_identity_but_checks():
    assert constrain(X_BTD, "batch", "time", "act_embed", rules=RULES) is X_BTD
    with pytest.raises(ValueError, match=r"shape \(8, 4, 2\), found \('batch', 'time'\)"):
        constrain(X_BTD, "batch", "time", rules=RULES)
    with pytest.raises(ValueError, match="unknown logical axis 'tim': did you mean 'time'"):
        constrain(X_BTD, "batch", "tim", None, rules=RULES)


def test_constrain_on_one_device_is_identity():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        assert constrain(X_BTD, "batch", "time", None, rules=RULES) is X_BTD


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f])
def test_constrain_splits(explicit, wrap):
    with jax.set_mesh(make_mesh(context=2, explicit=explicit)):
        x_BTD = jnp.zeros(X_BTD.shape) + np.asarray(X_BTD)
        y_BTD = wrap(lambda x: constrain(x, "batch", "time", "act_embed", rules=RULES))(x_BTD)
    assert pieces(y_BTD) == (2, 2, 2)
    np.testing.assert_array_equal(y_BTD, X_BTD)


@pytest.mark.parametrize("explicit", [False, True])
def test_constrain_can_gather_again(explicit):
    with jax.set_mesh(make_mesh(context=2, explicit=explicit)):
        @jax.jit
        def there_and_back(x):
            return constrain(constrain(x, "batch", "time", None, rules=RULES), None, None, None, rules=RULES)
        assert pieces(there_and_back(X_BTD)) == X_BTD.shape


@pytest.mark.parametrize("explicit", [False, True])
def test_constrain_under_grad_and_vmap(explicit):
    def loss(x_TD):
        return jnp.sum(constrain(x_TD * x_TD, "time", "act_embed", rules=RULES))
    with jax.set_mesh(make_mesh(context=2, explicit=explicit)):
        np.testing.assert_array_equal(jax.jit(jax.vmap(jax.grad(loss)))(X_BTD), 2 * X_BTD)


@pytest.mark.parametrize("explicit", [False, True])
def test_constrain_rejects_what_does_not_divide(explicit):
    with jax.set_mesh(make_mesh(explicit=explicit)):
        with pytest.raises(ValueError, match=r"constrain: dimension 0 \('batch'\) of shape \(6, 4\) has size 6"):
            jax.jit(lambda x: constrain(x, "batch", None, rules=RULES))(jnp.ones((6, 4)))


def test_constrain_rejects_a_foreign_mesh():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="lacks .'context', 'expert', 'tensor'"):
        constrain(X_BTD, "batch", None, None, rules=RULES)


@pytest.mark.parametrize("explicit", [False, True])
def test_constrain_leaves_manual_axes_alone(explicit):
    def double(x_BTD):
        assert x_BTD.shape == (2, 4, 2)  # split in four by hand
        return 2 * constrain(x_BTD, "batch", "time", "act_heads", rules=RULES)
    mesh = make_mesh(tensor=2, explicit=explicit)
    with jax.set_mesh(mesh):
        x_BTD = jax.device_put(X_BTD, NamedSharding(mesh, P("data")))
        all_manual = jax.jit(jax.shard_map(double, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
        np.testing.assert_array_equal(all_manual(x_BTD), 2 * X_BTD)
        one_manual = jax.jit(jax.shard_map(double, mesh=mesh, in_specs=P("data"), out_specs=P("data"),
                                           axis_names={"data"}))
        y_BTD = one_manual(x_BTD)
    np.testing.assert_array_equal(y_BTD, 2 * X_BTD)
    if explicit or compat.constrains_beside_manual_axes():
        assert pieces(y_BTD) == (2, 4, 1)


def test_constrain_serves_mixed_axis_types():
    types = (AxisType.Explicit, AxisType.Auto, AxisType.Auto, AxisType.Auto)
    with jax.set_mesh(jax.make_mesh((4, 1, 1, 2), AXES, axis_types=types)):
        y_BTD = jax.jit(lambda x: constrain(x, "batch", "time", "act_heads", rules=RULES))(X_BTD)
    assert pieces(y_BTD) == (2, 4, 1)
