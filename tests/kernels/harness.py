"""What every implementation of an operation is held against: float64 NumPy, written the slow and obvious way.

B batch, T query positions, S key positions, I indexer heads, C channels per head, H heads, R latent rank, K keys.
"""

from typing import Any, Callable, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

# What the tests of an operation run. Those of Pallas are interpreted, so that they run on a CPU. To interpret the
# selections takes seconds a case: `test_tiles.py` has a few for every run, all are slow.
_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("pallas_tpu", "pallas_gpu")]
IMPLEMENTATIONS = {
    "index_scores": ["reference", "xla", "pallas_tpu", "pallas_gpu"],
    "select_topk": ["reference", "xla", *_SLOW],
    "sparse_mla": ["reference", "xla", "pallas_tpu", "pallas_gpu"],
}

# Of results and gradients against float64, relative to the largest value there: rounding in float32 and in bfloat16.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}


def run_with(implementation: str) -> dict[str, Any]:
    """The arguments that make an operation take this implementation on a CPU."""
    return {"implementation": implementation, "interpret": implementation.startswith("pallas")}


def assert_close(found: Any, expected: np.ndarray, dtype: str = "float32") -> None:
    """Equal where `expected` is not finite; elsewhere within the tolerance of the dtype, relative to its largest."""
    found = np.asarray(found, np.float64)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    largest = np.abs(expected[finite]).max(initial=1e-30)
    np.testing.assert_allclose(found[finite], expected[finite], rtol=0, atol=TOLERANCE[dtype] * largest)


def numerical_gradient(fn: Callable[..., float], *args: np.ndarray, step: float = 1e-5) -> list[np.ndarray]:
    """The gradient of a float64 function by central differences, one coordinate after the other."""
    gradients = []
    for which, array in enumerate(args):
        gradient = np.zeros(array.shape)
        for place in np.ndindex(array.shape):
            values = []
            for sign in (1, -1):
                moved = array.copy()
                moved[place] += sign * step
                values.append(fn(*args[:which], moved, *args[which + 1:]))
            gradient[place] = (values[0] - values[1]) / (2 * step)
        gradients.append(gradient)
    return gradients


class Indexed(NamedTuple):
    """The inputs of the indexer."""

    q_BTIC: np.ndarray
    k_BSC: np.ndarray
    w_BTI: np.ndarray
    q_positions: np.ndarray
    k_positions: np.ndarray
    q_segments: np.ndarray
    k_segments: np.ndarray

    def call(self, op: Callable[..., Any], dtype: str = "float32", **options: Any) -> Any:
        """The operation on these inputs; weights stay float32."""
        return op(jnp.asarray(self.q_BTIC, dtype), jnp.asarray(self.k_BSC, dtype), jnp.asarray(self.w_BTI, jnp.float32),
                  **{name: jnp.asarray(getattr(self, name)) for name in self._fields[3:]}, **options)


SCALE = 0.5


def indexed(queries: int, keys: int, *, batch: int = 2, heads: int = 3, channels: int = 4, whole: bool = True,
            seed: int = 0) -> Indexed:
    """A causal case whose queries are the last of the keys.

    With `whole`, small whole numbers: every score is exact in float32, whatever the order of its sum, and many tie.
    """
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.integers(-2, 3, shape).astype(float) if whole else rng.normal(size=shape)
    positions = np.tile(np.arange(keys), (batch, 1))
    ones = np.ones((batch, keys), np.int32)
    last = slice(keys - queries, keys) if keys >= queries else np.arange(queries) % keys
    return Indexed(draw(batch, queries, heads, channels), draw(batch, keys, channels), draw(batch, queries, heads),
                   positions[:, last].astype(np.int32), positions.astype(np.int32), ones[:, last], ones)


def scores_of(case: Indexed) -> np.ndarray:
    """float64 [B, T, S], -inf where not visible."""
    products = np.maximum(np.einsum("btic,bsc->btis", case.q_BTIC, case.k_BSC), 0)
    scores = SCALE * np.einsum("bti,btis->bts", case.w_BTI, products)
    for b, t, s in np.ndindex(scores.shape):
        same = case.q_segments[b, t] == case.k_segments[b, s] != 0
        if not (same and case.k_positions[b, s] <= case.q_positions[b, t]):
            scores[b, t, s] = -np.inf
    return scores


def selection_of(scores_BTS: np.ndarray, top_k: int) -> np.ndarray:
    """The selection contract, one query after the other: int32 [B, T, top_k]."""
    chosen = np.full((*scores_BTS.shape[:2], top_k), -1, np.int32)
    for b, t in np.ndindex(scores_BTS.shape[:2]):
        row = scores_BTS[b, t]
        candidates = [s for s in range(len(row)) if row[s] > -np.inf]  # NaN is not
        best = sorted(sorted(candidates, key=lambda s: (-row[s], s))[:top_k])
        chosen[b, t, :len(best)] = best
    return chosen


class Selected(NamedTuple):
    """The inputs of sparse attention."""

    q_BTHR: np.ndarray
    kv_BSR: np.ndarray
    indices_BTK: np.ndarray


MLA = {"scale": 0.3, "value_dim": 3}


def selected(queries: int, keys: int, top_k: int, *, batch: int = 2, heads: int = 2, rank: int = 5,
             missing: float = 0.2, seed: int = 0) -> Selected:
    """Random rows and distinct keys in any order; `missing` of them are -1, and all of one query."""
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((batch, queries, max(keys, top_k))))[..., :top_k]
    indices = np.where((order >= keys) | (rng.random(order.shape) < missing), -1, order)
    indices[0, queries // 2] = -1
    return Selected(rng.normal(size=(batch, queries, heads, rank)), rng.normal(size=(batch, keys, rank)),
                    indices.astype(np.int32))


def attention_of(q_BTHR: np.ndarray, kv_BSR: np.ndarray, indices_BTK: np.ndarray, *, scale: float,
                 value_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Dense float64 attention under the mask of the selection: the result, and the log-sum-exp of the logits."""
    mask_BTS = np.zeros((*indices_BTK.shape[:2], kv_BSR.shape[1]), bool)
    for b, t, k in np.ndindex(indices_BTK.shape):
        if indices_BTK[b, t, k] >= 0:
            mask_BTS[b, t, indices_BTK[b, t, k]] = True
    logits = np.where(mask_BTS[:, :, None], scale * np.einsum("bthr,bsr->bths", q_BTHR, kv_BSR), -np.inf)
    weights = np.exp(logits)
    total = weights.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.log(total)
    p = weights / np.where(total > 0, total, 1)[..., None]
    return np.einsum("bths,bsv->bthv", p, kv_BSR[..., :value_dim]), lse
