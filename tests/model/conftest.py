"""Tiny models that several test files share; each is made once."""

from typing import Any

import jax
import numpy as np
import pytest

import glm5_jax as glm5
from tests.model.reference import MICRO, random_params, RICH


@pytest.fixture(scope="session")
def micro() -> tuple[glm5.ModelConfig, Any]:
    """Three layers, the first dense, every one with an indexer, and an MTP layer."""
    return MICRO, random_params(MICRO, 0)


@pytest.fixture(scope="session")
def rich() -> tuple[glm5.ModelConfig, Any]:
    """Index sharing, interleaved layer kinds, expert groups, bias, tied table, an MTP layer."""
    return RICH, random_params(RICH, 1)


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    return np.random.default_rng(7).integers(0, MICRO.vocab_size, (2, 24)).astype(np.int32)


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield
