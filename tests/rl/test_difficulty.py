"""Which problems are worth practising, by hand."""

import pytest

from glm5_jax.records import Completion, Failure, FailureReason, Trajectory, Turn
from glm5_jax.rl.difficulty import select, solved


def rollout(seed: int, reward: float | None) -> Trajectory:
    turn = Turn([{"role": "user", "content": "?"}], {"role": "assistant", "content": "!"}, (1,),
                Completion((2,), (-0.5,), (0,), "stop"), reward=reward or 0.0)
    if reward is None:
        return Trajectory(f"r-{seed}", "sums", seed, (turn,), "failed", Failure(FailureReason.ENVIRONMENT, "step", ""))
    return Trajectory(f"r-{seed}", "sums", seed, (turn,), "done")


def test_rates_are_means_over_what_was_played_to_its_end():
    assert solved([rollout(1, 1.0), rollout(2, 0.0), rollout(1, 0.0), rollout(2, None), rollout(3, None)]) == {
        1: 0.5, 2: 0.0}


def test_kept_is_what_the_weak_fail_and_the_strong_solve():
    weak, strong = {1: 0.0, 2: 0.5, 3: 0.75, 4: 0.25, 5: 0.0}, {1: 0.75, 2: 1.0, 3: 1.0, 4: 0.5}
    assert select(weak, strong, at_most=0.5, at_least=0.75) == (1, 2)
    with pytest.raises(ValueError, match="at most 0.1 of the time and the strong one at least 1, found none among 5"):
        select(weak, strong, at_most=0.1, at_least=1)
