"""The algorithms of GLM-5's post-training by name: a loss, the advantages it takes, and when weights move.

    reasoning      GRPO with IcePop, no KL, on-policy                                   section 3.2 of the report
    agentic        double-sided importance sampling, asynchronous                       section 3.3
    general        as reasoning, on rewards blended of many scorers                     section 3.4
    distillation   reasoning's loss; a teacher's log-probs are each token's advantage   section 3.5

Each is a few lines of parts that stand elsewhere: one's own is too.
"""

import dataclasses
import functools
from collections.abc import Callable

from glm5_jax.losses import advantage, distill, policy
from glm5_jax.losses.aggregate import Aggregation
from glm5_jax.rl.batches import Advantage
from glm5_jax.rl.schedule import Async, Scheduler, Sync
from glm5_jax.train.policy_step import Loss


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """What distinguishes one stage of reinforcement learning from another.

    `scheduler` makes one for so many groups in a batch. With `teachers` every task needs one
    (`rl.trainer.Teachers`), and rewards move nothing. `reset_optimizer` is that of `rl.trainer.Plan`.
    """

    loss: Loss
    aggregation: Aggregation
    scheduler: Callable[[int], Scheduler] = Sync
    advantage: Advantage = advantage.group_advantage
    teachers: bool = False
    reset_optimizer: bool = False


def reasoning(*, beta: float = 2.0, clip_low: float = 0.2, clip_high: float = 0.28) -> Algorithm:
    """Equation 1 of the report, a batch generated and then trained on once."""
    return Algorithm(functools.partial(policy.icepop, beta=beta, clip_low=clip_low, clip_high=clip_high),
                     "sequence_mean_of_token_means")


def agentic(*, bound: int = 4, clip_low: float = 0.2, clip_high: float = 0.28) -> Algorithm:
    """Equations 3 to 5: generation never stops, and no token is staler than `bound` steps. The report leaves the bound
    and the clips open."""
    return Algorithm(functools.partial(policy.double_sided_is, clip_low=clip_low, clip_high=clip_high), "token_mean",
                     scheduler=functools.partial(Async, bound=bound),
                     advantage=functools.partial(advantage.group_advantage, std=False), reset_optimizer=True)


def general(*, beta: float = 2.0, clip_low: float = 0.2, clip_high: float = 0.28) -> Algorithm:
    """What the report says of this stage are its rewards; the rest is as in reasoning."""
    return reasoning(beta=beta, clip_low=clip_low, clip_high=clip_high)


def distillation(*, beta: float = 2.0, clip_low: float = 0.2, clip_high: float = 0.28) -> Algorithm:
    """Equation 1 with A = sg[log pi_teacher - log pi]; groups of one."""
    return Algorithm(functools.partial(distill.distillation, beta=beta, clip_low=clip_low, clip_high=clip_high),
                     "sequence_mean_of_token_means", teachers=True)
