"""Schedules: plain functions of the tokens seen so far, so that a change of batch size does not bend them."""

from typing import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]  # tokens seen, float32 [] -> value, float32 []


def constant(value: float) -> Schedule:
    return lambda tokens: jnp.full_like(tokens, value)


def warmup_cosine(peak: float, *, warmup: float, total: float, final: float = 0.0) -> Schedule:
    """Rises linearly to `peak` within `warmup` tokens, falls along a cosine to `final` at `total`, and stays there."""
    if not 0 <= warmup < total:
        raise ValueError(f"warmup: expected 0 or more and less than total = {total} tokens, found {warmup}")

    def schedule(tokens: jax.Array) -> jax.Array:
        rising = peak * tokens / max(warmup, 1)
        progress = jnp.clip((tokens - warmup) / (total - warmup), 0, 1)
        falling = final + (peak - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(tokens < warmup, rising, falling)

    return schedule
