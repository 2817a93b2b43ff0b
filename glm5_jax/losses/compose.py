"""One specification of reinforcement learning losses, of slots that can be filled independently.

    loss = aggregate(-W(rho) S(r, A)),    r = pi / pi_reference,    rho = pi_old / pi_behaviour

pi is the trained policy, pi_old the trainer's when the batch began, pi_behaviour the engine's that sampled. W turns the
mismatch of the two engines into a weight, which has no gradient; S is the surrogate with its trust region. There is no
KL term. A named algorithm (`policy`, `distill`) is a `Spec`, and so is one of your own:

    spec = Spec(surrogate=scored(truncated(3.0)), weight=band(0.5, 5.0), aggregation="token_mean")
    value, metrics = loss(spec, logp, logp_behaviour=sampled, advantage=advantage, mask=mask)

B batch, T positions.
"""

import dataclasses
from typing import Callable, Literal, get_args

import jax
from jax import lax
import jax.numpy as jnp

from glm5_jax.losses import aggregate, arguments, diagnostics
from glm5_jax.losses.aggregate import Aggregation
from glm5_jax.losses.diagnostics import Metrics

Level = Literal["token", "geometric", "sequence"]
Result = tuple[jax.Array, Metrics]
# A weight for each ratio.
WeightMap = Callable[[jax.Array], jax.Array]
# (ratio, advantage, log pi) -> (what is maximised, what A grad log pi is weighed with in it), of each token; log pi is
# of the level of the ratio.
Surrogate = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Spec:
    """A loss by its slots; raises ValueError naming the field.

    `surrogate` is one of `clipped`, `scored`, `probability_band`. `reference` says whom r compares pi with: the
    trainer's "old" policy or the "behaviour" that sampled. A level says of what a ratio is made, and log pi with it: of
    each "token", of the whole "sequence" as the product of its tokens, or as the "geometric" mean of those; so a score
    function has the gradient of the ratio it is weighed with. `weight` is one of `band`, `truncated` (None: 1).
    `aggregation` is explained in `aggregate`; with a level other than "token" a sequence has one term.
    """

    surrogate: Surrogate
    reference: Literal["old", "behaviour"] = "old"
    level: Level = "token"
    weight: WeightMap | None = None
    weight_level: Level = "token"
    aggregation: Aggregation = "sequence_mean_of_token_means"

    def __post_init__(self) -> None:
        aggregate.check_aggregation(self.aggregation)
        if self.reference not in ("old", "behaviour"):
            raise ValueError(f"reference: expected 'old' or 'behaviour', found {self.reference!r}")
        for field in ("level", "weight_level"):
            if getattr(self, field) not in get_args(Level):
                raise ValueError(f"{field}: expected one of {get_args(Level)}, found {getattr(self, field)!r}")


def loss(spec: Spec, logp: jax.Array, *, logp_old: jax.Array | None = None, logp_behaviour: jax.Array | None = None,
         advantage: jax.Array, mask: jax.Array, segment_ids: jax.Array | None = None,
         denominator: jax.Array | float | None = None) -> Result:
    """The loss to minimise, a scalar, and the metrics of `diagnostics`; the arrays are those of `arguments.Arrays`.

    Computed in float32, or in float64 where `logp` is. Without `logp_behaviour` W is 1, and metrics of the engines'
    mismatch are left out. Raises ValueError naming the argument.
    """
    tokens = arguments.read(logp, logp_old=logp_old, logp_behaviour=logp_behaviour, advantage=advantage, mask=mask,
                            segment_ids=segment_ids)
    reference_BT = tokens.logp_old if spec.reference == "old" else tokens.logp_behaviour
    ratio_BT = _ratio(tokens.logp - reference_BT, spec.level, tokens)
    logp_BT = _of_level(tokens.logp, spec.level, tokens)
    objective_BT, score_weight_BT = spec.surrogate(ratio_BT, tokens.advantage, logp_BT)
    mismatch_BT = _ratio(tokens.logp_old - tokens.logp_behaviour, spec.weight_level, tokens)
    weight_BT = jnp.ones_like(ratio_BT)
    if spec.weight is not None and logp_behaviour is not None:
        weight_BT = lax.stop_gradient(spec.weight(mismatch_BT))
    value = aggregate.aggregate(-weight_BT * objective_BT, tokens.mask, tokens.sequence, aggregation=spec.aggregation,
                                denominator=denominator, one_per_sequence=spec.level != "token")

    tokens, ratio_BT, score_weight_BT = lax.stop_gradient((tokens, ratio_BT, score_weight_BT))
    metrics = diagnostics.of_policy(tokens, ratio_BT, score_weight_BT, weight_BT)
    if logp_behaviour is not None:
        metrics |= diagnostics.of_engine(tokens)
        if spec.weight is not None:
            metrics |= diagnostics.cut("weight", mismatch_BT, weight_BT, tokens.mask)
    return value, metrics


def clipped(clip_low: float, clip_high: float, *, dual_clip: float | None = None) -> Surrogate:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A): no gradient where r is too far where A pushes it. PPO.

    With `dual_clip` it is at least dual_clip A where A < 0, so that no token costs without bound: arXiv 1912.09729.
    Raises ValueError for a negative distance, and for a `dual_clip` not above 1.
    """
    check_distances(clip_low=clip_low, clip_high=clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip: expected more than 1, found {dual_clip}")
    low, high = 1 - clip_low, 1 + clip_high

    def surrogate(ratio: jax.Array, advantage: jax.Array, logp: jax.Array) -> tuple[jax.Array, jax.Array]:
        falling = jnp.clip(ratio, low, dual_clip)
        bounded = jnp.where(advantage > 0, jnp.minimum(ratio, high), jnp.where(advantage < 0, falling, ratio))
        inside = bounded == ratio
        return jnp.where(inside, ratio, lax.stop_gradient(bounded)) * advantage, jnp.where(inside, ratio, 0)

    return surrogate


def scored(weight: WeightMap) -> Surrogate:
    """sg(weight(r)) A log pi: the score function, its weight detached whatever the map; r and log pi of one level."""
    def surrogate(ratio: jax.Array, advantage: jax.Array, logp: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = lax.stop_gradient(weight(ratio))
        return weights * advantage * logp, weights

    return surrogate


def probability_band(low: float, high: float) -> Surrogate:
    """r A of the tokens whose probability has not left that of the reference too far the way A pushes it.

    Dropped are those of A > 0 above it by more than `high`, and those of A <= 0 below it by more than `low`: of
    probabilities, not ratios, the binary total variation. For ratios per token. Raises ValueError for a negative bound.
    """
    check_distances(low=low, high=high)

    def surrogate(ratio: jax.Array, advantage: jax.Array, logp: jax.Array) -> tuple[jax.Array, jax.Array]:
        gained = lax.stop_gradient(jnp.exp(logp) * (1 - 1 / ratio))
        weights = jnp.where(jnp.where(advantage > 0, gained <= high, gained >= -low), ratio, 0)
        return weights * advantage, lax.stop_gradient(weights)

    return surrogate


def band(low: float, high: float, *, closed: bool = True) -> WeightMap:
    """The ratio itself from `low` to `high`, else 0; the ends belong to it if `closed`. Raises ValueError if empty."""
    if not (low <= high if closed else low < high):
        raise ValueError(f"band: expected low {'<=' if closed else '<'} high, found {low} and {high}")
    if closed:
        return lambda ratio: jnp.where((ratio >= low) & (ratio <= high), ratio, 0)
    return lambda ratio: jnp.where((ratio > low) & (ratio < high), ratio, 0)


def truncated(upper: float, lower: float = 0.0) -> WeightMap:
    """The ratio, no more than `upper` and no less than `lower`. Raises ValueError where these are not in order."""
    if not lower < upper:
        raise ValueError(f"upper: expected more than lower, which is {lower}, found {upper}")
    return lambda ratio: jnp.clip(ratio, lower, upper)


def check_distances(**distances: float) -> None:
    """Raises ValueError naming the distance from 1 (or from a probability) that is negative or NaN."""
    for name, value in distances.items():
        if not value >= 0:
            raise ValueError(f"{name}: expected 0 or more, found {value}")


def _ratio(log_ratio_BT: jax.Array, level: Level, tokens: arguments.Tokens) -> jax.Array:
    return jnp.exp(arguments.bounded(_of_level(log_ratio_BT, level, tokens)))


def _of_level(log_BT: jax.Array, level: Level, tokens: arguments.Tokens) -> jax.Array:
    """Logarithms of each token, or of its sequence: their sum or their mean, the same for all its tokens."""
    if level != "token":
        log_BT = aggregate.sequence_sum(tokens.mask * log_BT, tokens.sequence)
    if level == "geometric":
        log_BT /= aggregate.sequence_length(tokens.mask, tokens.sequence)
    return log_BT
