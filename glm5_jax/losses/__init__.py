"""Losses of arrays alone: `token` and `auxiliary` for language models, the names below for reinforcement learning."""

from glm5_jax.losses.advantage import group_advantage, overlong_penalty, rloo_advantage
from glm5_jax.losses.aggregate import count
from glm5_jax.losses.compose import Spec, band, clipped, loss, probability_band, scored, truncated
from glm5_jax.losses.critic import gae, length_adaptive_lambda, value_loss
from glm5_jax.losses.distill import distillation, teacher_advantage
from glm5_jax.losses.policy import cispo, dapo, decoupled_ppo, double_sided_is, grpo, gspo, icepop, ppo, proximal, tis

__all__ = ["Spec", "band", "cispo", "clipped", "count", "dapo", "decoupled_ppo", "distillation", "double_sided_is",
           "gae", "group_advantage", "grpo", "gspo", "icepop", "length_adaptive_lambda", "loss", "overlong_penalty",
           "ppo", "probability_band", "proximal", "rloo_advantage", "scored", "teacher_advantage", "tis", "truncated",
           "value_loss"]
