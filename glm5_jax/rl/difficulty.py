"""Which problems are worth practising: those that the policy mostly fails and a stronger one mostly solves.

    rates = solved(await play(services, {"sums": seeds * 4}))
    seeds = select(rates["sums"], stronger["sums"], at_most=0.5, at_least=0.75)

What both solve teaches nothing, what neither does may have no solution. GLM-5 report, section 3.2.
"""

from collections.abc import Iterable, Mapping

from glm5_jax.records import Trajectory

Rates = dict[int, float]


def solved(trajectories: Iterable[Trajectory]) -> Rates:
    """The mean reward on each seed; rollouts that failed are left out."""
    found: dict[int, list[float]] = {}
    for one in trajectories:
        if one.reward is not None:
            found.setdefault(one.seed, []).append(one.reward)
    return {seed: sum(rewards) / len(rewards) for seed, rewards in found.items()}


def select(weak: Mapping[int, float], strong: Mapping[int, float], *, at_most: float, at_least: float
           ) -> tuple[int, ...]:
    """The seeds on which the weak policy has `at_most` this mean reward and the strong one `at_least` that, in the
    order of `weak`; those that only one of them was tried on are left out. Raises ValueError where none is left."""
    found = tuple(seed for seed, rate in weak.items() if rate <= at_most and strong.get(seed, -1.0) >= at_least)
    if not found:
        raise ValueError(f"at_most, at_least: expected problems that the weak policy solves at most {at_most:g} of the "
                         f"time and the strong one at least {at_least:g}, found none among {len(weak)}")
    return found
