"""The public names, and what importing them costs."""

import subprocess
import sys

import pytest

import glm5_jax

NAMES = {"ModelConfig", "glm5", "glm5_2", "small", "tiny", "param_specs", "init", "forward", "unembed", "Output",
         "Cache", "init_cache", "generate", "Engine", "Sampling", "load_hf", "save_hf", "to_hf"}


def test_every_public_name_resolves():
    assert set(glm5_jax.__all__) == NAMES and NAMES <= set(dir(glm5_jax))
    for name in NAMES:
        assert callable(getattr(glm5_jax, name)), name
        assert getattr(glm5_jax, name).__name__ == name
    assert glm5_jax.__version__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'forwards'"):
        glm5_jax.forwards
    with pytest.raises(ImportError):
        from glm5_jax import no_such_name  # noqa: F401


@pytest.mark.parametrize("module", ["glm5_jax", "glm5_jax.text", "glm5_jax.text.tokenizer"])
def test_importing_it_loads_no_jax(module):
    code = f"import {module}, sys; print(sorted({{'jax', 'jaxlib', 'flax', 'numpy'}} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "jax" not in answer and "flax" not in answer


def test_importing_the_model_starts_no_device():
    """A backend that is looked up at import cannot be configured any more afterwards."""
    code = ("import glm5_jax\n"
            "for name in glm5_jax.__all__: getattr(glm5_jax, name)\n"
            "glm5_jax.param_specs(glm5_jax.glm5())\n"
            "import jax\n"
            "jax.config.update('jax_num_cpu_devices', 3); print(len(jax.devices()))")
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(path for path in sys.path if path)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert answer.stdout.strip() == "3", answer.stderr
