"""On-policy distillation: where its gradient is 0, that its mean is that of the KL, and what an advantage may be."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax import losses
from glm5_jax.core import metrics as core_metrics
from tests.losses import reference


@pytest.fixture(autouse=True, scope="module")
def wide():
    with reference.float64(True):
        yield


def test_14_a_teacher_that_is_the_student_moves_nothing():
    arrays = reference.batch(3, packed=True)
    arrays["advantage"] = losses.teacher_advantage(arrays["logp"], arrays["logp"])
    loss, gradient = jax.value_and_grad(lambda x: losses.distillation(x, **{
        k: v for k, v in arrays.items() if k != "logp"})[0])(arrays["logp"])
    assert loss == 0 and not np.asarray(gradient).any()
    arrays["advantage"] = losses.teacher_advantage(arrays["logp"] + 0.1, arrays["logp"])
    assert losses.distillation(**arrays)[0] != 0


def test_the_expected_gradient_is_that_of_the_kl_to_the_teacher():
    """Exactly: over all texts of two tokens, each weighed by the probability that the student samples it."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 1 + 2, 2))  # logits of the first token, and of the second behind each first
    texts = list(itertools.product(range(2), repeat=2))

    def log_probs(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.array([[logp[0, a], logp[1 + a, b]] for a, b in texts])

    def kl(logits):
        mine, theirs = log_probs(logits).sum(1), log_probs(teacher).sum(1)
        return jnp.sum(jnp.exp(mine) * (mine - theirs))

    chance = np.exp(log_probs(student).sum(1))
    gap = losses.teacher_advantage(log_probs(teacher), log_probs(student))
    to_go = np.asarray(gap)[:, ::-1].cumsum(1)[:, ::-1]  # what a token brings is also what it leads to

    def objective(logits):
        arrays = reference.padded({"advantage": to_go * chance[:, None], "mask": np.ones((4, 2))})
        logp = jnp.pad(log_probs(logits), ((0, 0), (0, reference.LENGTH - 2)))
        return losses.distillation(logp, **arrays, aggregation="sequence_mean", denominator=1)[0]

    np.testing.assert_allclose(jax.grad(objective)(student), jax.grad(kl)(student), atol=1e-12)


def test_it_is_icepop_of_the_teachers_advantage_and_reports_the_kl():
    arrays = reference.batch(4)
    teacher = np.where(arrays["mask"], arrays["logp"] + 0.3, np.nan)
    arrays["advantage"] = losses.teacher_advantage(teacher, arrays["logp"])
    (loss, metrics), (expected, _) = losses.distillation(**arrays), losses.icepop(**arrays)
    assert float(loss) == pytest.approx(float(expected))
    assert core_metrics.collect(metrics)["teacher_kl"] == pytest.approx(-0.3)


def test_the_advantage_is_constant_finite_and_checked():
    x = jnp.array([[-1.0, -2.0, -3.0]])
    gradient = jax.grad(lambda x: losses.teacher_advantage(2 * x, x).sum())(x)
    assert not np.asarray(gradient).any()
    np.testing.assert_array_equal(losses.teacher_advantage(jnp.array([[-jnp.inf, -1e9, -1.0]]), x), [[-20, -20, 2]])
    with pytest.raises(ValueError, match=r"logp_teacher: expected the shape of logp_student, \(1, 3\), found \(1, 2\)"):
        losses.teacher_advantage(x[:, :2], x)
    with pytest.raises(ValueError, match="logp_teacher: expected float32 log-probabilities, found bfloat16"):
        losses.teacher_advantage(x.astype(jnp.bfloat16), x)
