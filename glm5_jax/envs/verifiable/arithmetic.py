"""Calculations with integers and exact fractions."""

import re
from fractions import Fraction

from glm5_jax.envs.verifiable.task import INSTRUCTION, Dice, Task, graded

# How many numbers, the largest of them, and the operations; a subtree is always in brackets.
GRADES = ((2, 9, "+-"), (2, 99, "+-"), (2, 12, "+-*"), (3, 20, "+-*"), (3, 20, "+-*/"), (4, 99, "+-*/"),
          (5, 99, "+-*/"), (6, 999, "+-*/"))
NUMBER = re.compile(r"-?[0-9]{1,100}(?:[./][0-9]{1,100})?")


def arithmetic(seed: int, *, level: int = 1) -> Task:
    """The value of an expression; levels 1 to 8, with division from level 5 on.

    An answer is an integer, a fraction, reduced or not, or a decimal number, and has exactly this value.
    """
    count, largest, operations = graded(level, GRADES)
    text, value = _expression(Dice("arithmetic", level, seed), count, largest, operations)
    prompt = f"What is {text.removeprefix('(').removesuffix(')')}?"
    if "/" in operations:
        prompt += " Answer with an integer or a fraction such as -7/3."
    return Task(f"arithmetic-{level}", seed, f"{prompt} {INSTRUCTION}", str(value),
                lambda answer: parse_number(answer) == value)


def parse_number(text: str) -> Fraction | None:
    """The exact value of `12`, `-7/3` or `0.25`, at most 100 digits a side; None for anything else."""
    if not NUMBER.fullmatch(text) or re.search(r"/0+$", text):
        return None
    return Fraction(text)


def _expression(dice: Dice, count: int, largest: int, operations: str) -> tuple[str, Fraction]:
    if count == 1:
        number = dice.between(0, largest)
        return str(number), Fraction(number)
    first = dice.between(1, count - 1)
    left, a = _expression(dice, first, largest, operations)
    right, b = _expression(dice, count - first, largest, operations)
    operation = dice.choice(operations)
    if operation == "/" and b == 0:
        operation = "+"
    value = {"+": a + b, "-": a - b, "*": a * b}[operation] if operation != "/" else a / b
    return f"({left} {operation} {right})", value
