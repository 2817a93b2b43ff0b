"""Schedules: plain functions of the tokens seen so far, so that a change of batch size does not bend them.

Each begins at 0 tokens; `staged` puts one behind the other. GLM-5's, in tokens:

    staged({0: warmup_cosine(2e-4, warmup=..., total=27e12, final=4e-5),      # learning rate: pre-training,
            27e12: linear(4e-5, 1e-5, total=1.55e12)})                        # mid-training
    warmup_cosine(5e-3, warmup=0, total=2.84e9, final=2e-4)                   # indexer warm-up
    batch_ramp(16e6, 64e6, total=500e9, multiple=4096)                        # tokens per step
    staged({0: 0.3, 15e12: 0.1})                                              # weight of the MTP loss
    staged({0: 1e-3, 15e12: 0.0})                                             # rate of the router bias

GLM-5 report, figure 5 and appendix A; GLM-4.5 report, section 2.4.
"""

from typing import Callable, Mapping

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]  # tokens seen, float32 [] -> value, float32 []


def at(value: float | Schedule, tokens: jax.Array | None) -> jax.Array:
    """The value at `tokens` seen, float32 []; a number is the same everywhere, and needs none."""
    return value(tokens) if callable(value) else jnp.float32(value)  # type: ignore[arg-type]


def linear(first: float, last: float, *, total: float) -> Schedule:
    """Goes from `first` to `last` on a straight line within `total` tokens, and stays there."""
    if not total > 0:
        raise ValueError(f"total: expected more than 0 tokens, found {total}")
    return lambda tokens: first + (last - first) * jnp.clip(tokens / total, 0, 1)


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


def batch_ramp(first: float, last: float, *, total: float, multiple: int) -> Schedule:
    """Tokens per step: `linear`, rounded down to a `multiple`, such as what all devices take in one row each."""
    if not 1 <= multiple <= min(first, last):
        raise ValueError(f"multiple: expected at least 1 and at most the smallest batch of {min(first, last)} tokens, "
                         f"found {multiple}")
    ramp = linear(first, last, total=total)
    return lambda tokens: jnp.floor(ramp(tokens) / multiple) * multiple


def staged(stages: Mapping[float, float | Schedule]) -> Schedule:
    """Each number or schedule from its key on, in tokens, until the next; a schedule counts from its own beginning.

    Before the first key the first one stands at its beginning.
    """
    starts = sorted(stages)
    if not starts:
        raise ValueError("stages: expected at least one, found none")

    def schedule(tokens: jax.Array) -> jax.Array:
        values = [at(stages[start], jnp.maximum(tokens - start, 0)) for start in starts]
        return jnp.select([tokens >= start for start in reversed(starts)], values[::-1], values[0])

    return schedule
