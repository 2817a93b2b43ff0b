"""Reinforcement learning losses written out in Python floats, a sequence and a token after the other; ragged batches.

The score function's weights are taken at `held`, so that a difference quotient over log pi sees them constant.
"""

import math

import jax
import numpy as np

# jax 0.7.2 has it under experimental only.
float64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

ROWS, LENGTH = 4, 7
SEQUENCE_MEANS = {"grpo", "icepop", "ppo", "tis", "decoupled_ppo", "distillation", "gspo"}


def batch(seed, *, packed=False, rows=ROWS, length=LENGTH, spread=0.4):
    """Arguments of a loss in float64: ragged sequences with gaps in the mask, some empty; NaN where nothing counts."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int64)
    for row in segments:
        at = 0
        while at < length:
            size = int(rng.integers(1, length + 1))
            row[at:at + size] = rng.integers(1, 99) if at == 0 else row[at - 1] + rng.integers(1, 5)
            at += size
            if not packed or rng.random() < 0.2:
                break
    mask = (segments != 0) & (rng.random(segments.shape) < 0.8)
    behaviour = np.log(rng.uniform(0.05, 0.9, mask.shape))
    old = behaviour + rng.normal(0, spread, mask.shape)
    logp = old + rng.normal(0, spread, mask.shape)
    advantage = rng.normal(0, 1, mask.shape) * (rng.random(mask.shape) < 0.9)
    arrays = {"logp": logp, "logp_old": old, "logp_behaviour": behaviour, "advantage": advantage}
    arrays = {name: np.where(mask, x, np.nan) for name, x in arrays.items()}
    return arrays | {"mask": mask} | ({"segment_ids": segments} if packed else {})


def padded(arrays):
    """The arrays [B, T] or [B] at the shape all batches have, which spares compiling for another; NaN is added."""
    grown = {}
    for name, x in arrays.items():
        x = np.asarray(x)
        grown[name] = np.full((ROWS, LENGTH)[:x.ndim], 0 if x.dtype != float or name == "mask" else np.nan, x.dtype)
        grown[name][tuple(slice(size) for size in x.shape)] = x
    return grown


def part(arrays, rows):
    """Some rows of a batch, and empty ones below them."""
    return padded({name: x[rows] for name, x in arrays.items()})


def sequences(mask, segment_ids=None, **_):
    """The places (b, t) that count, a list for each sequence that has any."""
    found = []
    for b, row in enumerate(np.asarray(mask)):
        ids = [1] * len(row) if segment_ids is None else list(segment_ids[b])
        for segment in sorted(set(ids) - {0}):
            places = [(b, t) for t in range(len(row)) if row[t] and ids[t] == segment]
            found += [places] if places else []
    return found


def clip(x, low, high):
    return min(max(x, low), high)


def clipped(r, a, low=0.2, high=0.28):
    return min(r * a, clip(r, 1 - low, 1 + high) * a)


def term(name, lp, old, q, a, held):
    """What one token adds to the objective of a token-level algorithm."""
    r, rho = math.exp(lp - old), math.exp(old - q)
    if name in ("grpo", "dapo", "ppo"):
        return clipped(r, a)
    if name in ("icepop", "distillation"):
        return (rho if 1 / 2 <= rho <= 2 else 0) * clipped(r, a)
    if name == "tis":
        return min(rho, 2) * clipped(r, a)
    if name == "decoupled_ppo":
        return min(rho, 5) * clipped(r, a)
    if name == "double_sided_is":
        to_engine = math.exp(held - q)
        return (to_engine if 0.8 < to_engine < 1.28 else 0) * a * lp
    if name == "cispo":
        return min(math.exp(held - old), 4) * a * lp
    raise KeyError(name)


def loss(name, arrays, logp=None, clip_low=3e-4, clip_high=4e-4):
    """The loss of an algorithm with its defaults at `logp`, by default the batch's own; the clips are those of gspo."""
    held, old, q, a = (arrays[k] for k in ("logp", "logp_old", "logp_behaviour", "advantage"))
    logp = held if logp is None else logp
    of_sequences, of_tokens = [], []
    for places in sequences(**arrays):
        if name == "gspo":
            s = math.exp(sum(logp[p] - old[p] for p in places) / len(places))
            terms = [clipped(s, a[p], clip_low, clip_high) for p in places]
        else:
            terms = [term(name, logp[p], old[p], q[p], a[p], held[p]) for p in places]
        of_sequences.append(sum(terms) / len(terms))
        of_tokens += terms
    every = of_sequences if name in SEQUENCE_MEANS else of_tokens
    return -sum(every) / len(every) if every else 0.0


def slope(function, logp, mask, h=1e-6):
    """Central differences of `function` over each log-probability that counts; 0 elsewhere."""
    gradient = np.zeros(mask.shape)
    for place in zip(*np.nonzero(mask)):
        up, down = logp.copy(), logp.copy()
        up[place] += h
        down[place] -= h
        gradient[place] = (function(up) - function(down)) / (2 * h)
    return gradient
