"""glm5-jax: GLM-5 in JAX, exact and sparse, from a laptop CPU to a pod.

Names below are imported on first use, so that `glm5_jax.text` and `glm5_jax.envs` never load jax.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "ModelConfig": "glm5_jax.model.config",
    "glm5": "glm5_jax.model.config",
    "glm5_2": "glm5_jax.model.config",
    "small": "glm5_jax.model.config",
    "tiny": "glm5_jax.model.config",
    "param_specs": "glm5_jax.model.transformer",
    "init": "glm5_jax.model.transformer",
    "forward": "glm5_jax.model.transformer",
    "unembed": "glm5_jax.model.transformer",
    "Output": "glm5_jax.model.transformer",
    "Cache": "glm5_jax.model.cache",
    "init_cache": "glm5_jax.model.cache",
    "generate": "glm5_jax.infer.sampler",
    "Engine": "glm5_jax.infer.engine",
    "Sampling": "glm5_jax.infer.request",
    "load_hf": "glm5_jax.checkpoint.released",
    "save_hf": "glm5_jax.checkpoint.released",
    "to_hf": "glm5_jax.checkpoint.hf_names",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'glm5_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
