"""On-policy distillation: the student samples, and its teacher's log-probabilities are the advantage of each token."""

from typing import Any, Unpack, cast

import jax
from jax import lax

from glm5_jax.core.metrics import Mean
from glm5_jax.losses import arguments, policy
from glm5_jax.losses.aggregate import Aggregation
from glm5_jax.losses.arguments import Arrays
from glm5_jax.losses.compose import Result


def teacher_advantage(logp_teacher: Any, logp_student: Any) -> jax.Array:
    """sg(log pi_teacher - log pi_student) of each token, [B, T]; to ascend it is to descend KL(student || teacher).

    Both are float32, of the student's own samples; where the loss's mask is 0 they may hold anything. The teacher may
    differ from row to row. The difference is kept within 20, so that a token the teacher excludes has a finite one.
    GLM-5 report, section 3.5. Raises ValueError naming the argument.
    """
    teacher = arguments.log_probs("logp_teacher", logp_teacher)
    student = arguments.log_probs("logp_student", logp_student)
    if teacher.shape != student.shape:
        raise ValueError(f"logp_teacher: expected the shape of logp_student, {student.shape}, found {teacher.shape}")
    return lax.stop_gradient(arguments.bounded(teacher - student))


def distillation(logp: jax.Array, *, beta: float = 2.0, clip_low: float = 0.2, clip_high: float = 0.28,
                 aggregation: Aggregation = "sequence_mean_of_token_means", **arrays: Unpack[Arrays]) -> Result:
    """`policy.icepop` with `teacher_advantage` as its advantage, [B, T]. GLM-5 report, section 3.5.

    Of its metrics `teacher_kl` is new, the mean of log pi_student - log pi_teacher: an estimate of the student's KL to
    the teacher, in nats per token.
    """
    loss, metrics = policy.icepop(logp, beta=beta, clip_low=clip_low, clip_high=clip_high, aggregation=aggregation,
                                  **arrays)
    gap = cast(Mean, metrics["advantage/mean"])
    return loss, metrics | {"teacher_kl": Mean(-gap.total, gap.count)}
