"""Problems of several steps: their work and their answer against what the prompt alone says."""

import itertools
import math
import re

import pytest

from glm5_jax.envs.verifiable.chains import KINDS, Chain
from glm5_jax.envs.verifiable.task import INSTRUCTION

LEVELS = range(1, 10)
AHEAD = {"N": 1j, "E": 1, "S": -1j, "W": -1}
TURNED = {"left": 1j, "right": -1j, "back": -1}


def steps_of(chain: Chain) -> list[str]:
    """What is known after each step, read from the prompt."""
    if found := re.fullmatch(r"Last digit of ([\d+]+)\?", chain.prompt):
        return [str(total % 10) for total in itertools.accumulate(map(int, found[1].split("+")))]
    if found := re.fullmatch(r"Last digit of ([\d*]+)\?", chain.prompt):
        factors = [int(factor) for factor in found[1].split("*")]
        return [str(math.prod(factors[:count]) % 10) for count in range(1, len(factors) + 1)]
    wind, words = re.fullmatch(r"Facing ([NESW]), turn ([a-z ]+)\. Where now\?", chain.prompt).groups()
    turned = itertools.accumulate((TURNED[word] for word in words.split()), lambda at, by: at * by,
                                  initial=AHEAD[wind])
    return [name for at in list(turned)[1:] for name, ahead in AHEAD.items() if ahead == at]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_the_work_is_that_of_the_prompt_and_ends_with_the_answer(kind, level):
    for seed in range(60):
        chain = KINDS[kind](seed, level=level, instruction="")
        steps = steps_of(chain)
        assert re.split("[, ]", chain.work) == steps and len(steps) == level + 1
        assert chain.solution == steps[-1] and (chain.name, chain.seed) == (f"{kind}-{level}", seed)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_answer_earns_anything(kind):
    for seed in range(30):
        chain, answers = KINDS[kind](seed, level=5), "NESW" if kind == "turns" else "0123456789"
        said = {answer: chain.reward({"role": "assistant", "content": f"{chain.work}. <answer>{answer}</answer>"})
                for answer in [*answers, chain.work, chain.solution * 2, chain.solution + ".", ""]}
        assert said == {answer: float(answer == chain.solution) for answer in said}
        assert chain.reward({"role": "assistant", "content": chain.solution}) == 0


@pytest.mark.parametrize("kind, firsts, answers", [
    ("sums", 10, "0123456789"), ("products", 8, "12346789"), ("turns", 4 * 3, "NESW")])
def test_thousands_of_problems_and_every_answer(kind, firsts, answers):
    drawn = [KINDS[kind](seed, level=5) for seed in range(6000)]
    assert 0.8 * firsts * 3 ** 5 < len({chain.prompt for chain in drawn}) <= firsts * 3 ** 5
    assert {chain.solution for chain in drawn} == set(answers)


@pytest.mark.parametrize("kind, prompt, work", [
    ("sums", "Last digit of 4+3+2+2?", "4,7,9,1"),
    ("products", "Last digit of 9*2*7*2?", "9,8,6,2"),
    ("turns", "Facing S, turn right back left back. Where now?", "W E N S"),
])
def test_the_same_seed_is_the_same_problem_on_every_python(kind, prompt, work):
    chain = KINDS[kind](7)
    assert (chain.name, chain.prompt, chain.work) == (f"{kind}-3", f"{prompt} {INSTRUCTION}", work)


def test_each_kind_and_level_has_its_own_dice():
    starts = {tuple(KINDS[kind](seed, level=level, instruction="").work[0] for seed in range(40))
              for kind in ("sums", "products") for level in LEVELS}
    assert len(starts) == 2 * len(LEVELS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0, 10, -1])
def test_a_level_that_does_not_exist(kind, level):
    with pytest.raises(ValueError, match=f"level: expected 1 to 9 steps, found {level}"):
        KINDS[kind](0, level=level)
