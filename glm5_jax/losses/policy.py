"""The named policy losses, each a few lines of specification. None has a KL term.

All have one call shape, `(logp, *, logp_old, logp_behaviour, advantage, mask, segment_ids, denominator, ...)`, whose
arrays `arguments.Arrays` describes, and return the loss to minimise and metrics (`compose.loss`). `aggregation` is
explained in `aggregate.aggregate`. r = pi / pi_old is the ratio of the trained policy, rho = pi_old / pi_behaviour the
mismatch of the engines, which enters the metrics alone unless a formula names it. All raise ValueError naming the
argument.
"""

from typing import Unpack

import jax
from jax import lax
import jax.numpy as jnp

from glm5_jax.losses import compose
from glm5_jax.losses.aggregate import Aggregation
from glm5_jax.losses.arguments import Arrays
from glm5_jax.losses.compose import Result, Spec


def grpo(logp: jax.Array, *, clip_low: float = 0.2, clip_high: float = 0.28,
         aggregation: Aggregation = "sequence_mean_of_token_means", **arrays: Unpack[Arrays]) -> Result:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), with advantages of a group. DeepSeekMath, section 4.1."""
    return compose.loss(Spec(compose.clipped(clip_low, clip_high), aggregation=aggregation), logp, **arrays)


def ppo(logp: jax.Array, *, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = None,
        aggregation: Aggregation = "sequence_mean_of_token_means", **arrays: Unpack[Arrays]) -> Result:
    """GRPO's term with the advantages of a critic; `dual_clip` c bounds it by c A where A < 0. arXiv 1707.06347."""
    spec = Spec(compose.clipped(clip_low, clip_high, dual_clip=dual_clip), aggregation=aggregation)
    return compose.loss(spec, logp, **arrays)


def icepop(logp: jax.Array, *, beta: float = 2.0, clip_low: float = 0.2, clip_high: float = 0.28,
           aggregation: Aggregation = "sequence_mean_of_token_means", **arrays: Unpack[Arrays]) -> Result:
    """GRPO's term times pop(rho), which is rho from 1 / beta to beta, else 0. GLM-5 report, equation 1."""
    if not beta >= 1:
        raise ValueError(f"beta: expected at least 1, found {beta}")
    spec = Spec(compose.clipped(clip_low, clip_high), weight=compose.band(1 / beta, beta), aggregation=aggregation)
    return compose.loss(spec, logp, **arrays)


def tis(logp: jax.Array, *, upper: float = 2.0, lower: float = 0.0, clip_low: float = 0.2, clip_high: float = 0.28,
        aggregation: Aggregation = "sequence_mean_of_token_means", **arrays: Unpack[Arrays]) -> Result:
    """GRPO's term times rho, no more than `upper` and no less than `lower`: truncated importance sampling."""
    spec = Spec(compose.clipped(clip_low, clip_high), weight=compose.truncated(upper, lower), aggregation=aggregation)
    return compose.loss(spec, logp, **arrays)


def decoupled_ppo(logp: jax.Array, *, upper: float = 5.0, clip_low: float = 0.2, clip_high: float = 0.28,
                  aggregation: Aggregation = "sequence_mean_of_token_means", **arrays: Unpack[Arrays]) -> Result:
    """PPO's term around a proximal policy, given as `logp_old`, times min(pi_proximal / pi_behaviour, upper).

    The proximal policy is a recent one of the trainer, so that samples of older versions are not clipped for their age;
    `proximal` spares its forward pass. AReaL, arXiv 2505.24298, section 5.2.
    """
    spec = Spec(compose.clipped(clip_low, clip_high), weight=compose.truncated(upper), aggregation=aggregation)
    return compose.loss(spec, logp, **arrays)


def proximal(logp: jax.Array, logp_behaviour: jax.Array, *, version_behaviour: jax.Array, version_old: jax.Array | int,
             version: jax.Array | int) -> jax.Array:
    """Log-probabilities [B, T] of a proximal policy between the one that sampled and the trained one; constant.

    Linear in the versions, integers [B, T] (or broadcast) of the sampled tokens, of the proximal and of the trained
    policy; the trained policy's own where it sampled itself. A-3PO, arXiv 2512.06547.
    """
    age = jnp.asarray(version) - version_behaviour
    share = jnp.where(age > 0, jnp.clip((version_old - version_behaviour) / jnp.maximum(age, 1), 0, 1), 1)
    return lax.stop_gradient(logp_behaviour + share.astype(logp.dtype) * (logp - logp_behaviour))


def double_sided_is(logp: jax.Array, *, clip_low: float = 0.2, clip_high: float = 0.28,
                    aggregation: Aggregation = "token_mean", **arrays: Unpack[Arrays]) -> Result:
    """sg(f(r)) A log pi with r = pi / pi_behaviour, and f(r) = r if 1 - clip_low < r < 1 + clip_high, else 0.

    A token outside the band has no gradient whatever the sign of A. No forward pass of an old policy is needed: a
    `logp_old` given beside `logp_behaviour` serves the metrics alone. GLM-5 report, equations 3 to 5.
    """
    compose.check_distances(clip_low=clip_low, clip_high=clip_high)
    weight = compose.band(1 - clip_low, 1 + clip_high, closed=False)
    return compose.loss(Spec(compose.scored(weight), reference="behaviour", aggregation=aggregation), logp, **arrays)


def cispo(logp: jax.Array, *, upper: float = 4.0, lower: float = 0.0, aggregation: Aggregation = "token_mean",
          **arrays: Unpack[Arrays]) -> Result:
    """sg(clip(r, lower, upper)) A log pi: no token loses its gradient. MiniMax-M1, arXiv 2506.13585, section 3.1."""
    spec = Spec(compose.scored(compose.truncated(upper, lower)), aggregation=aggregation)
    return compose.loss(spec, logp, **arrays)


def dapo(logp: jax.Array, *, clip_low: float = 0.2, clip_high: float = 0.28, aggregation: Aggregation = "token_mean",
         **arrays: Unpack[Arrays]) -> Result:
    """GRPO's term, the upper clip the wider, averaged over all tokens. arXiv 2503.14476, sections 3.1 and 3.3.

    Its penalty for length is `advantage.overlong_penalty`; groups of one reward are for the loop to sample anew.
    """
    return compose.loss(Spec(compose.clipped(clip_low, clip_high), aggregation=aggregation), logp, **arrays)


def gspo(logp: jax.Array, *, clip_low: float = 3e-4, clip_high: float = 4e-4,
         aggregation: Aggregation = "sequence_mean", **arrays: Unpack[Arrays]) -> Result:
    """min(s A, clip(s) A) of each sequence, s = exp(mean over its tokens of log r). arXiv 2507.18071, section 4.1.

    The gradient flows through s to all tokens of the sequence alike.
    """
    spec = Spec(compose.clipped(clip_low, clip_high), level="geometric", aggregation=aggregation)
    return compose.loss(spec, logp, **arrays)
