import hashlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.core import params
from glm5_jax.core.params import ParamSpec

SPECS = {
    "embed": ParamSpec((64, 32), ("vocab", "embed"), tags=frozenset({"embedding"})),
    "layers": {"up": ParamSpec((32, 48), ("embed", "mlp"), dtype=jnp.bfloat16, scale=0.5, tags=frozenset({"matrix"})),
               "norm": ParamSpec((32,), ("norm",), init="ones"), "bias": ParamSpec((4,), (None,), init="zeros")},
}


@pytest.mark.parametrize("kwargs, message", [
    ({"shape": (2, 3), "axes": ("embed",)}, r"ParamSpec.axes: expected one name per dimension of \(2, 3\)"),
    ({"shape": (2,), "axes": ("embed",), "tags": frozenset({"matrx"})}, r"ParamSpec.tags: unknown \['matrx'\]"),
])
def test_a_wrong_spec_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ParamSpec(**kwargs)


def test_count_and_abstract_allocate_nothing():
    assert params.count(SPECS) == 64 * 32 + 32 * 48 + 32 + 4
    huge = {"w": ParamSpec((10**6, 10**6, 10**3), (None,) * 3)}
    assert params.count(huge) == 10**15
    assert params.abstract(huge)["w"] == jax.ShapeDtypeStruct((10**6, 10**6, 10**3), jnp.float32)


@pytest.mark.parametrize("large", [1, 2000, 2**24])
def test_initialise_matches_the_specs(monkeypatch, large):
    monkeypatch.setattr(params, "_LARGE", large)
    tree = params.initialise(SPECS, jax.random.key(0))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    assert shapes == params.abstract(SPECS)
    assert (tree["layers"]["norm"] == 1).all() and not tree["layers"]["bias"].any()
    for leaf, scale in ((tree["embed"], 0.02), (tree["layers"]["up"], 0.5)):
        values = np.asarray(leaf, np.float64)
        assert abs(values.mean()) < 4 * scale / values.size**0.5
        assert abs(values.std() / scale - 1) < 4 / (2 * values.size)**0.5 + 0.01


@pytest.mark.parametrize("large", [1, 2000, 2**24])
def test_a_new_leaf_moves_no_other(monkeypatch, large):
    monkeypatch.setattr(params, "_LARGE", large)  # every parameter drawn alone, some of them, none of them
    before = params.initialise(SPECS, jax.random.key(7))
    grown = {**SPECS, "a_first": ParamSpec((3,), (None,)),
             "layers": {**SPECS["layers"], "extra": ParamSpec((5,), (None,))}}
    after = params.initialise(grown, jax.random.key(7))
    np.testing.assert_array_equal(before["embed"], after["embed"])
    np.testing.assert_array_equal(before["layers"]["up"], after["layers"]["up"])


def test_leaves_and_keys_draw_differently():
    twins = {"a": ParamSpec((16,), (None,)), "b": ParamSpec((16,), (None,)), "c": {"a": ParamSpec((16,), (None,))}}
    first = params.initialise(twins, jax.random.key(0))
    second = params.initialise(twins, jax.random.key(1))
    draws = [np.asarray(x) for x in jax.tree.leaves((first, second))]
    assert len({d.tobytes() for d in draws}) == 6


def test_initialise_is_the_same_in_jit_and_in_another_process():
    key = jax.random.key(3)
    tree = params.initialise(SPECS, key)
    jitted = jax.jit(lambda key: params.initialise(SPECS, key))(key)
    for eager, compiled in zip(jax.tree.leaves(tree), jax.tree.leaves(jitted)):
        rounding = 4 * float(jnp.finfo(eager.dtype).eps)  # the compiler may fuse the scale into the draw
        np.testing.assert_allclose(np.float64(eager), np.float64(compiled), rtol=rounding)
    code = ("import hashlib, jax, numpy as np\nfrom glm5_jax.core.params import ParamSpec, initialise\n"
            "x = initialise({'embed': ParamSpec((64, 32), ('vocab', 'embed'))}, jax.random.key(3))['embed']\n"
            "print(hashlib.sha256(np.asarray(x).tobytes()).hexdigest())")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split()[-1] == hashlib.sha256(np.asarray(tree["embed"]).tobytes()).hexdigest()


def test_stacked_adds_layer_axes():
    tree = params.stacked(SPECS["layers"], 2, 3)
    assert tree["up"].shape == (2, 3, 32, 48) and tree["up"].axes == ("layers", "layers", "embed", "mlp")
    assert tree["up"].dtype == jnp.bfloat16 and tree["up"].tags == {"matrix"}
    drawn = params.initialise(tree, jax.random.key(0))["up"]
    assert not np.array_equal(drawn[0, 0], drawn[1, 2])


def test_with_tags_adds_and_keeps():
    tree = params.with_tags(SPECS, "mtp")
    assert tree["embed"].tags == {"embedding", "mtp"} and tree["layers"]["norm"].tags == {"mtp"}
    assert SPECS["embed"].tags == {"embedding"}
    with pytest.raises(ValueError, match="unknown"):
        params.with_tags(SPECS, "no_such_tag")


def test_path_names_read_like_paths():
    tree = {"layers": [{"q_a": 0}, {"q_a": 1}]}
    names = [params.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert names == ["layers/0/q_a", "layers/1/q_a"]
