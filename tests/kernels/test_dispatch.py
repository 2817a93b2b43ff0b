"""The choice of an implementation: by target platform and shape, with its reason, refused with one, told once."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch

SHAPES = {"q_BTIC": (1, 2, 3, 4), "k_BSC": (1, 2, 4), "w_BTI": (1, 2, 3), "top_k": (2,), "q_BTHR": (1, 2, 3, 4),
          "kv_BSR": (1, 2, 4), "indices_BTK": (1, 2, 2), "value_dim": (2,), "x_NK": (4, 3), "w_EKM": (2, 3, 5)}
X = jnp.ones(3)


@pytest.fixture
def op(monkeypatch) -> dict:
    """An operation `twist` with implementations that can be told apart, and a rule: Pallas on a TPU for 4 and more."""
    def prefer(platform, shapes):
        if platform == "tpu" and shapes["x_N"][0] >= 4:
            return "pallas_tpu", "long"
        return "xla", "short"

    refuse = lambda implementation, shapes: "x_N is odd" if shapes["x_N"][0] % 2 else None
    monkeypatch.setitem(dispatch.RULES, "twist", dispatch.Rules(("x_N",), prefer, refuse))
    dispatch._announce.cache_clear()
    return {"reference": jnp.tan, "xla": jnp.sin, "pallas_tpu": jnp.cos}


def twist(op, x, **options):
    return dispatch.call("twist", op, x, shapes={"x_N": x.shape}, **options)


@pytest.mark.parametrize("platform", dispatch.PLATFORMS)
@pytest.mark.parametrize("name", dispatch.RULES)
def test_every_operation_explains_its_choice(name, platform):
    choice = dispatch.explain(name, platform, SHAPES)
    assert choice == dispatch.explain(name, platform, SHAPES)
    assert choice.implementation in dispatch.IMPLEMENTATIONS and choice.reason
    assert dispatch.PALLAS_PLATFORM.get(choice.implementation, platform) == platform


@pytest.mark.parametrize("arguments, named", [
    (("index_score", "cpu", SHAPES), "op: expected one of index_scores, .*found 'index_score'"),
    (("index_scores", "gpu", SHAPES), "platform: expected one of cpu, tpu, cuda, found 'gpu'"),
    (("select_topk", "cpu", {"q_BTIC": (1, 2, 3, 4), "w_BTI": (1, 2, 3)}), "shapes: expected .* found no k_BSC, top_k"),
])
def test_what_cannot_be_explained(arguments, named):
    with pytest.raises(ValueError, match=named):
        dispatch.explain(*arguments)


@pytest.mark.parametrize("name, expected", [("reference", jnp.tan), ("xla", jnp.sin), (None, jnp.sin)])
def test_a_named_implementation_runs(op, name, expected):
    assert jnp.array_equal(twist(op, X, implementation=name), expected(X))


@pytest.mark.parametrize("length, platform, found", [(4, "tpu", "cosine"), (4, "cuda", "sine"), (3, "tpu", "sine")])
def test_the_target_platform_and_the_shape_choose(op, length, platform, found):
    """Compiled from a CPU host, where no such device is."""
    traced = jax.jit(lambda x: twist(op, x)).trace(jnp.ones(length))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert f"stablehlo.{found} " in text
    assert f"stablehlo.{'sine' if found == 'cosine' else 'cosine'} " not in text


def test_no_branch_where_all_platforms_agree(op):
    assert "cond" not in str(jax.make_jaxpr(lambda x: twist(op, x))(X))
    assert "cond" in str(jax.make_jaxpr(lambda x: twist(op, x))(jnp.ones(4)))


@pytest.mark.parametrize("around", [lambda fn: fn, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
def test_a_kernel_of_another_platform_is_refused_with_the_reason(op, around):
    with pytest.raises(NotImplementedError, match="twist: pallas_tpu runs on tpu alone; .*interpret=True"):
        around(lambda x: twist(op, x, implementation="pallas_tpu"))(jnp.ones((4, 4)))


def test_a_kernel_is_compiled_for_its_platform_from_any_host(op):
    traced = jax.jit(lambda x: twist(op, x, implementation="pallas_tpu")).trace(jnp.ones(4))
    assert "stablehlo.cosine " in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_an_interpreted_kernel_runs_anywhere(op):
    x = jnp.ones(4)
    assert jnp.array_equal(twist(op, x, implementation="pallas_tpu", interpret=True), jnp.cos(x))


@pytest.mark.parametrize("name, reason", [("pallas_tpu", "x_N is odd"), ("pallas_gpu", "x_N is odd")])
def test_a_shape_is_refused_with_the_reason(op, name, reason):
    with pytest.raises(NotImplementedError, match=f"twist: {name} cannot run: {reason}"):
        twist(op, X, implementation=name)


def test_a_kernel_that_does_not_exist_is_refused(op):
    with pytest.raises(NotImplementedError, match="pallas_gpu cannot run: there is no such kernel"):
        twist(op, jnp.ones(4), implementation="pallas_gpu")


@pytest.mark.parametrize("options, named", [
    ({"implementation": "cuda"}, "implementation: expected one of reference, .*found 'cuda'"),
    ({"interpret": True}, "interpret: expected the name of a Pallas implementation beside it"),
    ({"implementation": "xla", "interpret": True}, "interpret: expected the name of a Pallas implementation beside it"),
])
def test_wrong_options(op, options, named):
    with pytest.raises(ValueError, match=named):
        twist(op, X, **options)


def test_the_choice_is_logged_once(op, caplog):
    with caplog.at_level(logging.INFO, logger="pallas_kernels.dispatch"):
        for length in (4, 4, 6):
            twist(op, jnp.ones(length))
        assert [record.getMessage() for record in caplog.records] == [
            "twist: on cpu xla (short); on tpu pallas_tpu (long); on cuda xla (short)"]
        twist(op, jnp.ones(2))  # another choice
        assert len(caplog.records) == 2


def test_importing_the_package_starts_no_backend():
    """An unknown platform is an error as soon as jax looks for its devices."""
    done = subprocess.run([sys.executable, "-c", "import pallas_kernels"], cwd=Path(__file__).parents[2], text=True,
                          env=os.environ | {"JAX_PLATFORMS": "none_such"}, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
