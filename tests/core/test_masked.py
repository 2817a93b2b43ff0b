import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.core.masked import LOG_ZERO, masked_log_softmax, masked_mean, masked_softmax, masked_sum

POISON = np.array([np.nan, np.inf, -np.inf, 3e38], np.float32)


def case(seed: int = 0, rows: int = 5, columns: int = 7):
    """Values whose masked entries are all poison; row 0 is fully masked, row 1 fully visible."""
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, columns)) < 0.6
    mask[0], mask[1] = False, True
    x = rng.normal(size=(rows, columns)).astype(np.float32) * 3
    x[~mask] = rng.choice(POISON, size=(~mask).sum())
    return x, mask


def numpy_log_softmax(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Row by row in float64, over the visible entries alone."""
    out = np.full(x.shape, LOG_ZERO)
    for row, visible, result in zip(x.astype(np.float64), mask, out):
        if visible.any():
            result[visible] = row[visible] - np.log(np.sum(np.exp(row[visible])))
    return out


def finite_differences(f, x: np.ndarray, mask: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences in float64 at the visible entries, 0 at the others."""
    x, grad = x.astype(np.float64), np.zeros(x.shape)
    for index in zip(*np.nonzero(mask)):
        up, down = x.copy(), x.copy()
        up[index], down[index] = x[index] + step, x[index] - step
        grad[index] = (f(up) - f(down)) / (2 * step)
    return grad


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1)])
def test_sum_and_mean_ignore_poison(axis):
    x, mask = case()
    clean = np.where(mask, x, 0).astype(np.float64)
    np.testing.assert_allclose(masked_sum(x, mask, axis), clean.sum(axis), rtol=1e-5, atol=1e-5)
    count = mask.sum(axis)
    np.testing.assert_allclose(masked_mean(x, mask, axis), clean.sum(axis) / np.maximum(count, 1), rtol=1e-5, atol=1e-5)


def test_sum_and_mean_take_weights():
    x, mask = case()
    weights = np.where(mask, np.random.default_rng(1).random(mask.shape) * 0.01, 0).astype(np.float32)
    clean = np.where(mask, x, 0).astype(np.float64)
    np.testing.assert_allclose(masked_sum(x, weights), (clean * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(masked_mean(x, weights), (clean * weights).sum() / weights.sum(), rtol=1e-5)


def test_gradients_of_mean_ignore_poison():
    x, mask = case()
    grad = jax.grad(lambda x: masked_mean(x, mask)**2)(jnp.asarray(x))
    mean = np.where(mask, x, 0).astype(np.float64).sum() / mask.sum()
    np.testing.assert_allclose(grad, np.where(mask, 2 * mean / mask.sum(), 0), rtol=1e-4)


def test_nothing_counts():
    x, mask = jnp.full((3,), jnp.nan), jnp.zeros((3,), bool)
    for reduce in (masked_sum, masked_mean):
        value, grad = jax.value_and_grad(reduce)(x, mask)
        assert value == 0 and not grad.any()


def test_mask_broadcasts_and_never_enlarges():
    x = jnp.arange(6.0).reshape(2, 3)
    assert masked_sum(x, jnp.array([True, False, True])) == 0 + 2 + 3 + 5
    assert masked_mean(x, jnp.array([[True], [False]])) == 1
    with pytest.raises(ValueError):
        masked_sum(x[0], jnp.ones((2, 3), bool))


def test_low_precision_is_accumulated_in_float32():
    x = jnp.ones((4096,), jnp.bfloat16)
    total = masked_sum(x, jnp.ones((4096,), bool).at[0].set(False))
    assert total.dtype == jnp.float32 and total == 4095
    assert masked_mean(jnp.arange(3), jnp.array([True, True, False])) == 0.5
    assert masked_softmax(x, jnp.ones((4096,), bool)).dtype == jnp.float32


def test_softmax_matches_float64():
    x, mask = case()
    truth = np.where(mask, np.exp(numpy_log_softmax(np.where(mask, x, 0), mask)), 0)
    np.testing.assert_allclose(jax.jit(masked_softmax)(x, mask), truth, rtol=1e-5)
    np.testing.assert_allclose(masked_softmax(x.T, mask.T, axis=0), truth.T, rtol=1e-5)
    assert not masked_softmax(x, mask)[0].any()


def test_log_softmax_matches_float64():
    x, mask = case()
    truth = numpy_log_softmax(np.where(mask, x, 0), mask)
    result = jax.jit(masked_log_softmax)(x, mask)
    np.testing.assert_allclose(result, truth, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(jnp.exp(result) > 0, mask)


def test_softmax_does_not_overflow():
    x, mask = jnp.array([1e4, 1e4 - 1, 3e38]), jnp.array([True, True, False])
    np.testing.assert_allclose(masked_softmax(x, mask), [0.7310586, 0.2689414, 0], rtol=1e-6)
    np.testing.assert_allclose(masked_log_softmax(-x, mask)[:2], [-1.3132616, -0.3132617], rtol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_gradients_match_finite_differences(name):
    x, mask = case()
    pull = np.random.default_rng(2).normal(size=x.shape)
    clean = np.where(mask, x, 0)

    def truth(z):
        logp = numpy_log_softmax(z, mask)
        return np.sum(np.where(mask, pull * (np.exp(logp) if name == "softmax" else logp), 0))

    f = masked_softmax if name == "softmax" else masked_log_softmax
    grad = jax.jit(jax.grad(lambda z: jnp.sum(pull.astype(np.float32) * f(z, mask))))(jnp.asarray(x))
    np.testing.assert_allclose(grad, finite_differences(truth, clean, mask), rtol=1e-3, atol=1e-5)
    assert not np.asarray(grad)[~mask].any()


def test_entropy_of_masked_rows_has_a_finite_gradient():
    x, mask = case()

    def entropy(z):
        return -jnp.sum(masked_softmax(z, mask) * masked_log_softmax(z, mask))

    def truth(z):
        logp = numpy_log_softmax(z, mask)
        return -np.sum(np.where(mask, np.exp(logp) * logp, 0))

    value, grad = jax.value_and_grad(entropy)(jnp.asarray(x))
    clean = np.where(mask, x, 0)
    np.testing.assert_allclose(value, truth(clean), rtol=1e-5)
    np.testing.assert_allclose(grad, finite_differences(truth, clean, mask), rtol=1e-3, atol=1e-5)


def test_a_visible_nan_is_not_hidden():
    x = jnp.array([1.0, jnp.nan, 2.0])
    assert jnp.isnan(masked_softmax(x, jnp.array([True, True, False]))).any()
    assert jnp.isnan(masked_sum(x, jnp.array([True, True, False])))


def test_softmax_rejects_weights_as_mask():
    with pytest.raises(ValueError, match="expected dtype bool, found int32"):
        masked_softmax(jnp.ones(3), jnp.ones(3, jnp.int32))


def test_nothing_passes_through_nan_on_the_way():
    x, mask = case()
    x[np.isnan(x)] = np.inf  # a NaN that is given would stop the debugger before anything else does
    with jax.debug_nans(True):
        for f in (masked_softmax, masked_log_softmax, masked_mean):
            jax.grad(lambda z: jnp.sum(f(z, mask)))(jnp.asarray(x))
