import asyncio
import functools

import pytest

from glm5_jax.envs.verifiable.arithmetic import arithmetic
from glm5_jax.rewards import rules
from glm5_jax.rewards.base import Dimension, ScorerFailed
from glm5_jax.rewards.rules import Rule, final
from tests.rewards.episodes import NOTHING, episode


def judge(check, *trajectories):
    return [one.value for one in asyncio.run(Rule("rule", Dimension.QUALITY, check).score(trajectories))]


@pytest.mark.parametrize("check, text, value", [
    (rules.matches(r"\{.*\}"), "{\n}", 1), (rules.matches(r"\{.*\}"), "So: {}", 0),
    (rules.words(2, 3), "one", 0), (rules.words(2, 3), "one  two", 1), (rules.words(2, 3), "1 2 3", 1),
    (rules.words(2, 3), "1 2 3 4", 0), (rules.words(most=0), "", 1), (rules.words(2), "a b c d e", 1),
    (rules.characters(1, 3), "äöü", 1), (rules.characters(1, 3), "äöüß", 0), (rules.characters(1), "", 0),
    (rules.without(["as an AI", "sorry"]), "I said so.", 1), (rules.without(["as an AI"]), "As  an\nai, no.", 0),
    (rules.without(["an"]), "And Ann can.", 1), (rules.without(["(c)"]), "Copy (C) me.", 0),
    (rules.has(["please", "thank you"]), "Well, Thank  you!", 1), (rules.has(["please"]), "pleased", 0),
    (rules.opens(["Dear", "hello"]), " Hello, you", 1), (rules.opens(["hello"]), "Oh, hello", 0),
    (rules.opens(["hello"]), "Helloes", 0),
    (rules.fresh(2), "a b a b a", 0.5), (rules.fresh(2), "a b c", 1), (rules.fresh(3), "a b", 1),
    (rules.fresh(1), "No no no no", 0.25),
    (rules.every(rules.words(1, 2), rules.fresh(1)), "so so", 0.5),
    (rules.every(rules.words(3), rules.fresh(1)), "so so", 0),
    (rules.average(rules.words(3), rules.fresh(1)), "so so", 0.25),
], ids=lambda value: value.__qualname__.partition(".")[0] if callable(value) else str(value))
def test_checks(check, text, value):
    assert check(text) == value
    assert judge(final(check), episode(text)) == [value]


def test_an_exact_answer():
    check = rules.answers(functools.partial(arithmetic, level=2))
    right = [f"<answer>{arithmetic(seed, level=2).solution}</answer>" for seed in range(3)]
    assert judge(check, *(episode(right[seed], seed=seed) for seed in range(3))) == [1, 1, 1]
    assert judge(check, episode(right[0], seed=1), episode("I do not know.", seed=0)) == [0, 0]


def test_a_batch_keeps_its_order_and_says_who_judged():
    found = asyncio.run(Rule("short", Dimension.TONE, final(rules.words(most=1))).score([episode("a"), episode("a b")]))
    assert [(one.scorer, one.dimension, one.value) for one in found] == [("short", "tone", 1), ("short", "tone", 0)]


@pytest.mark.parametrize("check, trajectory, error", [
    (lambda _: 1 / 0, episode("a"), "scorer rule, trajectory a: ZeroDivisionError: division by zero"),
    (lambda _: 2.0, episode("a"), "scorer rule, trajectory a: ValueError: Judgement.value: expected 0 to 1 of scorer"),
    (lambda _: None, episode("a"), "scorer rule, trajectory a: TypeError: Judgement.value: expected a number"),
    (final(rules.words()), NOTHING, "trajectory empty: expected a turn"),
    (rules.answers(arithmetic), NOTHING, "trajectory empty: expected a turn"),
])
def test_a_rule_that_fails_raises(check, trajectory, error):
    with pytest.raises(ScorerFailed, match=error):
        judge(check, trajectory)


@pytest.mark.parametrize("make, error", [(lambda: rules.has(["  "]), "phrases: expected text in each, found '  '"),
                                         (lambda: rules.repeated("a", 0), "run: expected 1 or more, found 0")])
def test_rules_that_make_no_sense(make, error):
    with pytest.raises(ValueError, match=error):
        make()
