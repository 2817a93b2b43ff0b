"""What a reinforcement learning loss knows of its batch, as metrics that merge exactly over micro-batches and devices.

Each has `merge(other)` and `value()`, as `Mean` has, so that `core.metrics.merge` and `collect` take them all, and is
NaN where nothing was counted. A mask weighs, as in `masked_sum`.

B batch, T positions.
"""

from typing import Self

from flax import struct
import jax
import jax.numpy as jnp

from glm5_jax.core import masked
from glm5_jax.core.metrics import Mean
from glm5_jax.losses import aggregate
from glm5_jax.losses.arguments import Tokens, bounded


@struct.dataclass
class Max:
    """The largest value."""

    top: jax.Array

    @classmethod
    def of(cls, x: jax.Array, mask: jax.Array) -> Self:
        return cls(jnp.max(jnp.where(mask != 0, x, -jnp.inf), initial=-jnp.inf))

    def merge(self, other: Self) -> Self:
        return type(self)(jnp.maximum(self.top, other.top))

    def value(self) -> jax.Array:
        return jnp.where(self.top == -jnp.inf, jnp.nan, self.top)


@struct.dataclass
class EffectiveShare:
    """Kish's effective sample size of importance weights over their number, (sum w)^2 / (n sum w^2); 0 if all are 0."""

    total: jax.Array
    squares: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, weights: jax.Array, mask: jax.Array) -> Self:
        return cls(masked.masked_sum(weights, mask), masked.masked_sum(weights ** 2, mask), jnp.sum(mask))

    def merge(self, other: Self) -> Self:
        return jax.tree.map(jnp.add, self, other)

    def value(self) -> jax.Array:
        share = self.total ** 2 / jnp.where(self.squares > 0, self.count * self.squares, 1)
        return jnp.where(self.count > 0, share, jnp.nan)


@struct.dataclass
class Correlation:
    """Pearson's correlation of x and y; kept as centred sums, because raw moments cancel in float32."""

    count: jax.Array
    mean_x: jax.Array
    mean_y: jax.Array
    xx: jax.Array
    xy: jax.Array
    yy: jax.Array

    @classmethod
    def of(cls, x: jax.Array, y: jax.Array, mask: jax.Array) -> Self:
        mean_x, mean_y = masked.masked_mean(x, mask), masked.masked_mean(y, mask)
        sums = (masked.masked_sum(a * b, mask) for a, b in ((x - mean_x, x - mean_x), (x - mean_x, y - mean_y),
                                                            (y - mean_y, y - mean_y)))
        return cls(jnp.sum(mask), mean_x, mean_y, *sums)

    def merge(self, other: Self) -> Self:
        """Chan, Golub and LeVeque 1979."""
        count = self.count + other.count
        part = other.count / jnp.where(count > 0, count, 1)
        x, y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        moved = lambda mine, theirs, product: mine + theirs + product * self.count * part
        return type(self)(count, self.mean_x + x * part, self.mean_y + y * part, moved(self.xx, other.xx, x * x),
                          moved(self.xy, other.xy, x * y), moved(self.yy, other.yy, y * y))

    def value(self) -> jax.Array:
        """NaN where x or y does not vary."""
        return jnp.clip(_over(self.xy, jnp.sqrt(self.xx) * jnp.sqrt(self.yy)), -1, 1)  # rounding can lead outside


@struct.dataclass
class ExplainedVariance(Correlation):
    """The share of the variance of y that x explains, 1 - var(y - x) / var(y)."""

    def value(self) -> jax.Array:
        """NaN where y does not vary."""
        return 1 - _over(self.xx + self.yy - 2 * self.xy, self.yy)


Metric = Mean | Max | EffectiveShare | Correlation
Metrics = dict[str, Metric]


def of_policy(tokens: Tokens, ratio_BT: jax.Array, score_weight_BT: jax.Array, weight_BT: jax.Array) -> Metrics:
    """What the trained policy does: its ratio to the reference, and the weights that A grad log pi is left with.

    `surprisal` is the mean of -log pi, an estimate of the entropy where the policy itself sampled; `ppo_kl` the mean of
    log pi_old - log pi; `clip/low` and `clip/high` are the shares of tokens whose score weight is not their ratio, for
    ratios below and above 1; `weight` is the score's weight times that of the mismatch; `advantage/zero` is the share
    of tokens that teach nothing; `length` is the number of tokens that count in a sequence.
    """
    mask_BT = tokens.mask
    of = lambda x_BT: Mean.of(x_BT, mask_BT)
    sequences = aggregate.sequence_count(mask_BT, tokens.sequence)
    return {
        "surprisal": of(-tokens.logp),
        "ppo_kl": of(tokens.logp_old - tokens.logp),
        "ratio/mean": of(ratio_BT),
        "ratio/max": Max.of(ratio_BT, mask_BT),
        **cut("clip", ratio_BT, score_weight_BT, mask_BT),
        "weight/mean": of(weight_BT * score_weight_BT),
        "weight/effective": EffectiveShare.of(weight_BT * score_weight_BT, mask_BT),
        "advantage/mean": of(tokens.advantage),
        "advantage/abs": of(jnp.abs(tokens.advantage)),
        "advantage/zero": of(tokens.advantage == 0),
        "length/mean": Mean(jnp.sum(mask_BT), sequences),
        "length/max": Max.of(aggregate.sequence_sum(mask_BT, tokens.sequence), mask_BT),
    }


def of_engine(tokens: Tokens) -> Metrics:
    """How far p, the trainer's policy `logp_old`, is from q, the engine's that sampled, `logp_behaviour`.

    `k1` and `k3` estimate KL(q || p), `chi_square` the divergence mean((p / q)^2) - 1; `probability` is |p - q| of the
    sampled token, `log` the absolute difference of logarithms, `pearson` the correlation of p and q.
    """
    mask_BT = tokens.mask
    log_ratio_BT = tokens.logp_old - tokens.logp_behaviour
    held_BT = bounded(log_ratio_BT)
    p_BT, q_BT = jnp.exp(tokens.logp_old), jnp.exp(tokens.logp_behaviour)
    found: Metrics = {"k1": Mean.of(-log_ratio_BT, mask_BT),
                      "k3": Mean.of(jnp.expm1(held_BT) - log_ratio_BT, mask_BT),
                      "chi_square": Mean.of(jnp.expm1(2 * held_BT), mask_BT),
                      "pearson": Correlation.of(p_BT, q_BT, mask_BT)}
    for name, gap_BT in {"log": jnp.abs(log_ratio_BT), "probability": jnp.abs(p_BT - q_BT)}.items():
        found |= {f"{name}_mean": Mean.of(gap_BT, mask_BT), f"{name}_max": Max.of(gap_BT, mask_BT)}
    return {f"mismatch/{name}": metric for name, metric in found.items()}


def cut(name: str, ratio_BT: jax.Array, weight_BT: jax.Array, mask_BT: jax.Array) -> Metrics:
    """The shares of tokens whose weight is not their ratio, for ratios below and above 1."""
    changed_BT = weight_BT != ratio_BT
    return {f"{name}/low": Mean.of(changed_BT & (ratio_BT < 1), mask_BT),
            f"{name}/high": Mean.of(changed_BT & (ratio_BT > 1), mask_BT)}


def _over(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), jnp.nan)
