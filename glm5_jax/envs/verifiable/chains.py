"""Problems of several small steps: easy one after the other, hard to answer at once.

Each comes with its work, the steps that lead to the answer, as a thought would write them down. A model that was taught
both, to guess and to work it out, can learn from rewards alone which of the two is worth it.
"""

import dataclasses
from collections.abc import Callable, Mapping

from glm5_jax.envs.verifiable.task import INSTRUCTION, Dice, Task

WINDS = "NESW"
QUARTERS = {"back": 2, "left": 3, "right": 1}


@dataclasses.dataclass(frozen=True)
class Chain(Task):
    """A task of several steps."""

    work: str  # what is known after each step; the last of it is the answer


def sums(seed: int, *, level: int = 3, instruction: str = INSTRUCTION) -> Chain:
    """The last digit of a sum: any digit and `level` small ones."""
    digits = _digits("sums", seed, level, "0123456789", "123")
    return _folded("sums", seed, level, f"Last digit of {'+'.join(map(str, digits))}?", instruction, digits,
                   lambda last, digit: (last + digit) % 10)


def products(seed: int, *, level: int = 3, instruction: str = INSTRUCTION) -> Chain:
    """The last digit of a product, never 0: a digit and `level` small ones."""
    digits = _digits("products", seed, level, "12346789", "237")
    return _folded("products", seed, level, f"Last digit of {'*'.join(map(str, digits))}?", instruction, digits,
                   lambda last, digit: last * digit % 10)


def turns(seed: int, *, level: int = 3, instruction: str = INSTRUCTION) -> Chain:
    """Where somebody looks after `level` + 1 turns of a quarter or a half."""
    dice = _dice("turns", seed, level)
    quarters = dice.below(4)
    words = [dice.choice(list(QUARTERS)) for _ in range(level + 1)]
    prompt = f"Facing {WINDS[quarters]}, turn {' '.join(words)}. Where now?"
    work = ""
    for word in words:
        quarters += QUARTERS[word]
        work += f" {WINDS[quarters % 4]}"
    return Chain(f"turns-{level}", seed, f"{prompt} {instruction}".strip(), work[-1],
                 lambda answer: answer == work[-1], work.strip())


KINDS: Mapping[str, Callable[..., Chain]] = {"sums": sums, "products": products, "turns": turns}


def _dice(name: str, seed: int, level: int) -> Dice:
    if not 1 <= level <= 9:
        raise ValueError(f"level: expected 1 to 9 steps, found {level}")
    return Dice(name, level, seed)


def _digits(name: str, seed: int, level: int, first: str, others: str) -> list[int]:
    dice = _dice(name, seed, level)
    return [int(dice.choice(first)), *(int(dice.choice(others)) for _ in range(level))]


def _folded(name: str, seed: int, level: int, prompt: str, instruction: str, digits: list[int],
            step: Callable[[int, int], int]) -> Chain:
    known = digits[:1]
    for digit in digits[1:]:
        known.append(step(known[-1], digit))
    solution = str(known[-1])
    return Chain(f"{name}-{level}", seed, f"{prompt} {instruction}".strip(), solution,
                 lambda answer: answer == solution, ",".join(map(str, known)))
