"""Every schedule against its closed form, at the figures of the reports."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.optim import schedules


def check(schedule, expected, rtol=1e-6):
    """Both as a plain call and compiled, of a traced number of tokens."""
    tokens = [float(at) for at in expected]
    found = [float(schedule(jnp.float32(at))) for at in tokens]
    np.testing.assert_allclose(found, list(expected.values()), rtol=rtol, atol=1e-12)
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(jnp.float32(tokens)), found, rtol=1e-6, atol=1e-12)


def test_warmup_cosine():
    check(schedules.warmup_cosine(2.0, warmup=100, total=300, final=0.5),
          {0: 0.0, 50: 1.0, 100: 2.0, 150: 0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2, 200: 1.25, 300: 0.5, 900: 0.5})
    check(schedules.warmup_cosine(5e-3, warmup=0, total=2.84e9, final=2e-4), {0: 5e-3, 1.42e9: 2.6e-3, 2.84e9: 2e-4})
    with pytest.raises(ValueError, match="warmup: expected"):
        schedules.warmup_cosine(2.0, warmup=10, total=10)


def test_linear():
    check(schedules.linear(4e-5, 1e-5, total=1.55e12), {0: 4e-5, 0.775e12: 2.5e-5, 1.55e12: 1e-5, 3e12: 1e-5})
    with pytest.raises(ValueError, match="total: expected more than 0 tokens, found 0"):
        schedules.linear(1, 2, total=0)


def test_the_learning_rate_of_the_whole_of_pre_training():
    warmup = 0.1e12
    rate = schedules.staged({0: schedules.warmup_cosine(2e-4, warmup=warmup, total=27e12, final=4e-5),
                             27e12: schedules.linear(4e-5, 1e-5, total=1.55e12)})
    cosine = lambda tokens: 4e-5 + 1.6e-4 * (1 + math.cos(math.pi * (tokens - warmup) / (27e12 - warmup))) / 2
    check(rate, {0: 0, 0.05e12: 1e-4, 0.1e12: 2e-4, 9e12: cosine(9e12), 18e12: cosine(18e12),
                 26.99e12: cosine(26.99e12), 27e12: 4e-5, 28e12: 4e-5 - 3e-5 / 1.55, 28.55e12: 1e-5, 40e12: 1e-5},
          rtol=1e-5)


def test_steps_of_the_mtp_weight_and_of_the_router_bias():
    check(schedules.staged({0: 0.3, 15e12: 0.1}), {0: 0.3, 14.99e12: 0.3, 15e12: 0.1, 28e12: 0.1})
    check(schedules.staged({15e12: 0.0, 0: 1e-3}), {0: 1e-3, 14.99e12: 1e-3, 15e12: 0, 28e12: 0})


def test_a_stage_stands_at_its_beginning_before_it():
    check(schedules.staged({100: schedules.linear(1.0, 3.0, total=10)}), {0: 1, 100: 1, 105: 2, 110: 3})
    with pytest.raises(ValueError, match="stages: expected at least one"):
        schedules.staged({})


def test_batch_ramp():
    multiple = 4096 * 8
    ramp = schedules.batch_ramp(16e6, 64e6, total=500e9, multiple=multiple)
    down = lambda tokens: tokens // multiple * multiple
    check(ramp, {0: down(16e6), 125e9: down(28e6), 250e9: down(40e6), 500e9: down(64e6), 9e12: down(64e6)}, rtol=0)
    with pytest.raises(ValueError, match="multiple: expected at least 1"):
        schedules.batch_ramp(100, 200, total=1e3, multiple=128)


def test_a_number_or_a_schedule():
    assert schedules.at(0.25, jnp.float32(3)) == 0.25
    assert schedules.at(schedules.linear(0, 1, total=4), jnp.float32(3)) == 0.75
    assert schedules.at(0.25, None) == 0.25
