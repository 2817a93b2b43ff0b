"""Which rollouts of a group count, and the token rows of a rollout with forks."""

import random

import pytest

from glm5_jax.records import Completion, Failure, FailureReason, Group, Trajectory, Turn, extend
from glm5_jax.rl.assemble import Refused, rows, settle


def rollout(name: str, end: str = "done", reason: str = "environment") -> Trajectory:
    failure = Failure(FailureReason(reason), "step") if end == "failed" else None
    return Trajectory(name, "sums", 1, [], end, failure)


def group_of(*ends: str) -> list[Trajectory]:
    return [rollout(f"r{i}", *end.split()) for i, end in enumerate(ends)]


def test_a_full_group_is_taken_as_it_is():
    four = group_of("done", "tokens", "turns", "done")
    assert settle("g", 4, four) == Group("g", 4, four)


def test_complete_rollouts_stand_in_for_failed_ones_where_they_are_more_than_half():
    found = settle("g", 5, group_of("failed", "done", "failed", "done", "time"))
    assert [one.id for one in found.members] == ["r1", "r3", "r4", "r1", "r3"]
    assert len(found.trajectories) == 5  # with the failed ones, for the record


def test_half_is_not_enough():
    found = settle("g", 4, group_of("done", "failed worker", "failed", "done"))
    assert isinstance(found, Refused) and found.reason == "worker"
    found = settle("g", 3, group_of("failed", "failed timeout", "failed timeout"))
    assert found == Refused("timeout", "0 of 3 complete; failed: timeout 2, environment 1")


@pytest.mark.parametrize("ends", [("done", "aborted"), ("done",), ("done",) * 3])
def test_a_group_that_has_not_ended(ends):
    with pytest.raises(ValueError, match="group 'g': expected 2 rollouts that have ended"):
        settle("g", 2, group_of(*ends))


def test_every_number_of_failures_follows_the_rule():
    """Invariant 6: complete groups only, of exactly their size, whose members are all complete."""
    rng = random.Random(0)
    for _ in range(200):
        size = rng.randint(1, 9)
        ends = [rng.choice(["done", "tokens", "failed"]) for _ in range(size)]
        valid = sum(end != "failed" for end in ends)
        found = settle("g", size, group_of(*ends))
        assert isinstance(found, Group) == (valid > size / 2)
        if isinstance(found, Group):
            counts = [sum(one.id == member.id for member in found.members) for one in found.trajectories]
            complete = [count for count, end in zip(counts, ends) if end != "failed"]
            assert len(found.members) == size and sum(complete) == size
            assert max(complete) - min(complete) <= 1


def sampled(ids, version: int) -> Completion:
    return Completion(ids, [-0.5 * i for i in range(len(ids))], [version] * len(ids), "stop")


def say(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def forked() -> Trajectory:
    """Turn 1 extends turn 0, turn 2 extends turn 0 too, turn 3 begins anew."""
    a, b = say("user", "a"), say("user", "b")
    first = Turn([a], say("assistant", "x"), prompt=(1, 2), completion=sampled((3, 4), 0))
    second = extend([first], [a, first.reply, b], say("assistant", "y"), prompt=(1, 2, 3, 4, 5),
                    completion=sampled((6,), 1))
    third = extend([first, second], [a, first.reply, say("user", "c")], say("assistant", "z"), prompt=(1, 2, 3, 4, 7),
                   completion=sampled((8, 9), 1))
    fourth = extend([first, second, third], [b], say("assistant", "w"), prompt=(5,), completion=sampled((6, 2), 2))
    return Trajectory("r", "sums", 1, [first, second, third, fourth], "done")


def test_shared_turns_carry_loss_once():
    """Invariant 2, and 1: ids, masks, log-probs and versions have one length; the mask is on sampled tokens alone."""
    whole, fork, anew = rows(forked())
    assert (whole.ids, whole.trained) == ((1, 2, 3, 4, 5, 6), (False, False, True, True, False, True))
    assert (whole.logprobs, whole.versions) == ((0, 0, 0, -0.5, 0, 0), (-1, -1, 0, 0, -1, 1))
    assert (fork.ids, fork.trained) == ((1, 2, 3, 4, 7, 8, 9), (False,) * 5 + (True, True))
    assert (anew.ids, anew.trained) == ((5, 6, 2), (False, True, True))
    assert fork.versions == (-1,) * 5 + (1, 1)
    total = sum(len(turn.completion.ids) for turn in forked().turns)
    assert sum(sum(row.trained) for row in rows(forked())) == total


def test_a_rollout_without_tokens():
    turn = Turn([say("user", "a")], say("assistant", "x"))
    with pytest.raises(ValueError, match="rollout 'r': expected the tokens of every turn"):
        rows(Trajectory("r", "sums", 1, [turn], "done"))


def test_a_turn_that_nobody_read_to_its_end_is_not_trained_on():
    a = say("user", "a")
    lost = Turn([a], say("assistant", ""), prompt=(1, 2), completion=Completion((3,), (-0.5,), (0,), "abort"))
    again = Turn([a], say("assistant", "x"), prompt=(1, 2), completion=sampled((3, 4), 0))
    left, kept = rows(Trajectory("r", "sums", 1, [lost, again], "done"))
    assert not any(left.trained) and left.ids == (1, 2, 3) and kept.trained == (False, False, True, True)
